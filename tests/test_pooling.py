"""Pooling: which feature becomes which visual token, against plain loops; views never mix."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nanollava.anyres import Visual, layout
from nanollava.pooling import add_newlines, pool, resample


def plan_of(size=(144, 96), side=6, **keys):
    keys = {"max_grid": "3x3", "max_visual_tokens": "10T"} | keys
    return layout(size, Visual(**keys), 48, side)


def features(plan, side=6, width=5, seed=0):
    return torch.randn(plan.views, side * side, width, generator=torch.manual_seed(seed))


def test_nothing_to_pool_is_the_identity():
    """The base view, then the tiles as one picture: row by row across all tiles of the row."""
    plan = plan_of()
    assert plan.grid == (3, 2)
    x = features(plan)
    for method in ("bilinear", "average"):
        tokens = pool(x, plan, method)
        assert torch.equal(tokens[:36], x[0])
        k = 36
        for row in range(2 * 6):
            for column in range(3 * 6):
                tile = 1 + row // 6 * 3 + column // 6
                assert torch.equal(tokens[k], x[tile, row % 6 * 6 + column % 6]), (row, column)
                k += 1
        assert k == len(tokens) == plan.tokens


def test_flat_keeps_view_after_view():
    plan = plan_of(arrange="flat")
    x = features(plan)
    assert torch.equal(pool(x, plan, "bilinear", flat=True), x.flatten(0, 1))
    small = plan_of(arrange="flat", pool_stride=2)
    tokens = pool(x, small, "average", flat=True).unflatten(0, (small.views, -1))
    for view, found in zip(x, tokens):
        assert torch.allclose(found, halved(view), atol=1e-6)


def halved(view):
    """(36, C) -> (9, C): the mean of each 2 x 2 block, by hand."""
    out = []
    for i in range(0, 6, 2):
        for j in range(0, 6, 2):
            at = [(i + di) * 6 + j + dj for di in (0, 1) for dj in (0, 1)]
            out.append(view[at].mean(0))
    return torch.stack(out)


@pytest.mark.parametrize("method", ["bilinear", "average"])
def test_halving_is_the_mean_of_four(method):
    """At exactly one half, both methods are the mean of 2 x 2 features (align_corners False)."""
    plan = plan_of(pool_stride=2)
    x = features(plan)
    tokens = pool(x, plan, method)
    assert torch.allclose(tokens[:9], halved(x[0]), atol=1e-6)
    raster = tokens[9:].unflatten(0, plan.raster)
    for tile, (j, i) in enumerate(((j, i) for j in range(2) for i in range(3)), start=1):
        found = raster[j * 3 : j * 3 + 3, i * 3 : i * 3 + 3].flatten(0, 1)
        assert torch.allclose(found, halved(x[tile]), atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "average"])
@pytest.mark.parametrize("tau", ["176", "90"])
def test_uneven_pooling_equals_torch_on_each_view(method, tau):
    """6 -> 5 and 6 -> 3 by the budget; bilinear without antialias, as the released code."""
    plan = plan_of(max_visual_tokens=tau)
    x = features(plan)
    assert plan.side == {"176": 5, "90": 3}[tau]
    maps = x.transpose(1, 2).reshape(-1, 5, 6, 6)
    expected = (
        F.adaptive_avg_pool2d(maps, plan.side)
        if method == "average"
        else F.interpolate(maps, (plan.side,) * 2, mode="bilinear", align_corners=False)
    )
    tokens, s = pool(x, plan, method), plan.side
    assert torch.equal(tokens[: s * s], expected[0].flatten(1).T)
    raster = tokens[s * s :].unflatten(0, plan.raster)
    for tile in range(6):
        j, i = divmod(tile, 3)
        found = raster[j * s : j * s + s, i * s : i * s + s].permute(2, 0, 1)
        assert torch.equal(found, expected[1 + tile])


def test_methods_differ_where_they_should():
    plan = plan_of(max_visual_tokens="176")
    x = features(plan)
    assert not torch.allclose(pool(x, plan, "bilinear"), pool(x, plan, "average"), atol=1e-3)


@pytest.mark.parametrize("method", ["bilinear", "average"])
@pytest.mark.parametrize("arrange", ["raster", "flat"])
@pytest.mark.parametrize("tau", ["10T", "176", "90"])
def test_views_never_mix(method, arrange, tau):
    """Change one view: only its own tokens change, and all of them."""
    plan, flat = plan_of(max_visual_tokens=tau, arrange=arrange), arrange == "flat"
    x, s = features(plan), plan.side
    before = pool(x, plan, method, flat)
    owner = torch.arange(plan.views)[:, None, None].expand(-1, s * s, 1).float()
    owner = pool(owner, replace(plan), method, flat)[:, 0].round().long()
    for view in range(plan.views):
        changed = x.clone()
        changed[view] += 1
        moved = (pool(changed, plan, method, flat) != before).any(1)
        assert torch.equal(moved, owner == view)
        assert moved.sum() == s * s


def test_newlines_end_the_raster_rows():
    """Positions by hand: base view, then [row, newline] for each row; the base view has none."""
    plan = plan_of()
    tokens = torch.arange(plan.tokens, dtype=torch.float)[:, None].expand(-1, 3)
    out = add_newlines(tokens, plan, torch.tensor([-1.0, -2.0, -3.0]))
    assert len(out) == plan.length == 36 + 12 * 19
    at = [36 + 19 * row + 18 for row in range(12)]
    assert out[at].tolist() == [[-1.0, -2.0, -3.0]] * 12
    rest = [i for i in range(plan.length) if i not in at]
    assert torch.equal(out[rest], tokens)


def test_base_view_alone_is_pooled_too():
    plan = plan_of(max_grid="base", max_visual_tokens="9")
    x = features(plan)
    assert plan.views == 1 and len(x) == 1
    assert torch.allclose(pool(x, plan, "average"), halved(x[0]), atol=1e-6)


def test_one_row_of_tiles_of_one_token_has_one_newline():
    plan = plan_of((96, 48), max_visual_tokens="3")
    assert plan.grid == (2, 1) and plan.side == 1 and plan.length == 3 + 1
    out = add_newlines(torch.tensor([[1.0], [2.0], [3.0]]), plan, torch.tensor([9.0]))
    assert out[:, 0].tolist() == [1, 2, 3, 9]


def test_no_newlines_without_tiles_or_when_flat():
    newline = torch.zeros(4)
    for plan in (plan_of(max_grid="base"), plan_of(arrange="flat")):
        tokens = torch.randn(plan.tokens, 4)
        assert add_newlines(tokens, plan, newline) is tokens


def test_newline_takes_the_tokens_precision_and_gets_its_gradient():
    plan, newline = plan_of(), torch.randn(4, requires_grad=True)
    out = add_newlines(torch.zeros(plan.tokens, 4, dtype=torch.bfloat16), plan, newline)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert newline.grad.tolist() == [12.0] * 4


# ---- mosaic


def marked(plan, side=6):
    """Features that hold their own place in the tiles' raster: (row, column, base view?)."""
    (a, b) = plan.grid
    x = torch.zeros(plan.views, side, side, 3)
    x[0, ..., 2] = 1
    for tile in range(a * b):
        j, i = divmod(tile, a)
        x[1 + tile, ..., 0] = torch.arange(j * side, j * side + side)[:, None]
        x[1 + tile, ..., 1] = torch.arange(i * side, i * side + side)[None]
    return x.flatten(1, 2)


@pytest.mark.parametrize(
    "size,grid,rows,columns",
    [
        ((144, 60), (3, 2), (2, 10), (0, 18)),  # 7.5 rows of features, 8 kept: 2 off at each edge
        ((60, 144), (2, 3), (0, 18), (2, 10)),
        ((96, 96), (2, 2), (0, 12), (0, 12)),
        ((144, 24), (3, 1), (1, 5), (0, 18)),  # 3 rows of features; floor keeps one more
    ],
)
def test_mosaic_cuts_exactly_the_padding(size, grid, rows, columns):
    """By hand: the features whose place is in the kept rows and columns, in reading order."""
    name = f"{grid[0]}x{grid[1]}"
    plan = plan_of(size, max_grid=f"{name}..{name}", budget="mosaic", max_visual_tokens="37T")
    tokens = pool(marked(plan), plan, "bilinear")
    kept = [[i, j, 0] for i in range(*rows) for j in range(*columns)]
    assert tokens[:36].tolist() == [[0, 0, 1]] * 36
    assert tokens[36:].long().tolist() == kept
    assert plan.raster == (rows[1] - rows[0], columns[1] - columns[0])


@pytest.mark.parametrize("method", ["bilinear", "average"])
def test_mosaic_shrinks_the_raster_as_a_whole(method):
    plan = plan_of((144, 144), budget="mosaic", max_visual_tokens="5T")
    x = features(plan)
    assert plan.grid == (3, 3) and plan.raster == (12, 12) and plan.side == 6
    whole = x[1:].reshape(3, 3, 6, 6, 5).permute(4, 0, 2, 1, 3).reshape(1, 5, 18, 18)
    expected = (
        F.adaptive_avg_pool2d(whole, (12, 12))
        if method == "average"
        else F.interpolate(whole, (12, 12), mode="bilinear", align_corners=False)
    )
    tokens = pool(x, plan, method)
    assert torch.equal(tokens[:36], x[0]), "the base view keeps its T tokens"
    assert torch.allclose(tokens[36:], expected[0].flatten(1).T, atol=1e-6)


def test_mosaic_of_a_hair_has_newlines_only():
    plan = plan_of((1, 5000), budget="mosaic", max_visual_tokens="5T")
    out = add_newlines(pool(features(plan), plan, "bilinear"), plan, torch.full((5,), 7.0))
    assert plan.grid == (1, 1) and len(out) == plan.length == 36 + 6
    assert (out[36:] == 7).all()


def test_resample_leaves_the_same_size_alone():
    maps = torch.randn(1, 2, 4, 4)
    assert resample(maps, (4, 4), "average") is maps
    for size in ((4, 2), (2, 4)):
        assert torch.equal(resample(maps, size, "average"), F.adaptive_avg_pool2d(maps, size))


# ---- through the model: pooling before and after the projector are orthogonal to the rest


def model_with(tiny_model, **keys):
    model = copy(tiny_model)  # the same parts under another recipe
    model.recipe = replace(model.recipe, visual=Visual(**keys))
    return model


@pytest.mark.parametrize(
    "budget,arrange", [("per_view", "raster"), ("per_view", "flat"), ("mosaic", "raster")]
)
@pytest.mark.parametrize("pooling", ["bilinear", "average"])
@pytest.mark.parametrize("after", [True, False])
def test_see_is_the_parts_in_a_row(tiny_model, budget, arrange, pooling, after):
    """Two images of different grids: each part applied by hand, image by image."""
    keys = {
        "max_grid": "3x3",
        "max_visual_tokens": "4T",
        "budget": budget,
        "pooling": pooling,
        "arrange": arrange,
        "pool_after_projector": after,
    }
    model = model_with(tiny_model, **keys)
    plans = tuple(layout(size, Visual(**keys), 48, 6) for size in ((100, 60), (48, 150)))
    views = torch.randint(
        0,
        256,
        (sum(p.views for p in plans), 3, 48, 48),
        dtype=torch.uint8,
        generator=torch.manual_seed(1),
    )
    expected, start = [], 0
    with torch.no_grad():
        for plan in plans:
            x = model.encoder(views[start : start + plan.views])
            start += plan.views
            x = model.projector(x) if after else x
            x = pool(x, plan, pooling, arrange == "flat")
            x = x if after else model.projector(x)
            expected.append(add_newlines(x, plan, model.newline))
        found = model.see(views, plans)
    assert len(found) == sum(plan.length for plan in plans)
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


def test_before_and_after_agree_only_when_nothing_is_pooled(tiny_model):
    """A token-wise projector commutes with order and newlines, not with averaging."""
    views = torch.randint(0, 256, (7, 3, 48, 48), dtype=torch.uint8)
    for tau, same in (("7T", True), ("3T", False)):
        keys = {"max_grid": "3x2..3x2", "max_visual_tokens": tau}
        plans = (
            layout((144, 96), Visual(**keys, pool_after_projector=p), 48, 6) for p in (True, False)
        )
        with torch.no_grad():
            after, before = (tiny_model.see(views, (plan,)) for plan in plans)
        assert torch.allclose(after, before, atol=1e-6) == same
