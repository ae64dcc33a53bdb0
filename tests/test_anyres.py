"""AnyRes: which grid, how many tokens, which pixels; integer by integer as the references do."""

import random
from math import ceil, isqrt, sqrt

import numpy as np
import pytest
import torch
from PIL import Image

from nanollava.anyres import (
    Visual,
    best_grid,
    cut_views,
    fit,
    layout,
    parse_budget,
    parse_grids,
    stitch,
)

SHAPES = [(48, 48), (1, 5000), (5000, 1), (97, 33), (33, 97), (200, 200), (640, 360), (363, 641)]


def sizes(count, seed=0, most=5000):
    """Random (W, H), half of them shaped like photographs and pages, half of any shape."""
    rng = random.Random(seed)
    for i in range(count):
        W = rng.randint(1, most)
        H = rng.randint(1, most) if i % 2 else max(1, int(W * rng.uniform(0.4, 2.5)))
        yield W, H


def noise(W, H, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8))


# ---- grids


def test_grid_sets_are_the_blogs():
    """Section 2: {2x2, 1x{2,3,4}, {2,3,4}x1}; the released scripts stop at 3."""
    columns, rows = {(1, n) for n in (2, 3)}, {(n, 1) for n in (2, 3)}
    assert set(parse_grids("5grids")) == {(2, 2)} | columns | rows
    assert set(parse_grids("7grids")) == {(2, 2), (1, 4), (4, 1)} | columns | rows
    assert parse_grids("base") == ((0, 0),)


def test_ranges_and_lists():
    assert parse_grids("3x2") == ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2))
    assert parse_grids("2x3..3x4") == ((2, 3), (2, 4), (3, 3), (3, 4))
    assert len(parse_grids("6x6")) == 36
    assert parse_grids("1x2+2x1+12x1") == ((1, 2), (2, 1), (12, 1))


@pytest.mark.parametrize(
    "text",
    ["", "0x2", "2x0", "x", "2", "2x2x2", "3x3..2x2", "2x2..3x1", "five", "1x2+", "2x2..", "100x1"],
)
def test_no_grid_is_named(text):
    with pytest.raises(ValueError, match="is not a grid. Use base, 5grids"):
        parse_grids(text)


def test_budgets():
    for text in ("5T", "(4+1)T", "5*T", "3645"):
        assert parse_budget(text, 729) == 3645
    for text in ("", "T5", "5.5T", "-5T", "(4)T", "4+1T", "T"):
        with pytest.raises(ValueError, match="is not a budget. Use 5T"):
            parse_budget(text, 729)


@pytest.mark.parametrize("grids", ["6x6", "5grids", "7grids"])
def test_grid_choice_equals_hf(grids):
    """10,000 random sizes; HF writes (height, width) throughout."""
    from transformers.image_processing_utils import select_best_resolution

    grids = parse_grids(grids)
    points = [(b * 384, a * 384) for a, b in grids]
    count = 10_000 if len(grids) == 36 else 2_000
    for W, H in sizes(count, seed=len(grids)):
        h, w = select_best_resolution((H, W), points)
        assert best_grid((W, H), 384, grids) == (w // 384, h // 384), (W, H)


def test_best_grid_by_hand():
    """Most effective pixels, then least waste, then the first of equals."""
    grids = parse_grids("3x3")
    assert best_grid((300, 100), 100, grids) == (3, 1)
    assert best_grid((100, 300), 100, grids) == (1, 3)
    assert best_grid((100, 100), 100, grids) == (1, 1)
    assert best_grid((101, 100), 100, grids) == (2, 1), "one pixel more does not fit 1x1"
    assert best_grid((100, 100), 100, ((2, 1), (1, 2))) == (2, 1), "the first of equals"
    assert best_grid((100, 100), 100, ((1, 2), (2, 1))) == (1, 2)


# ---- the mosaic budget


def hf_tokens(size, grid, side, extra):
    """HF LlavaOnevision's own count of one image: base view, tiles and newlines."""
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.vision_aspect_ratio = f"anyres_max_{extra}"
    (W, H), (a, b) = size, grid
    tokens, newlines = processor._get_unpadded_features(H, W, side, side, b, a)
    return side * side + tokens + newlines


@pytest.mark.parametrize("extra", [4, 9, 16])
def test_mosaic_tokens_equal_hf(extra):
    """Token for token on 10,000 random sizes, at (4+1)T, (9+1)T and (16+1)T."""
    visual = Visual("6x6", max_visual_tokens=f"({extra}+1)T", budget="mosaic")
    for size in [*sizes(10_000, seed=extra), (3969, 98), (384, 384), (1, 5000), (5000, 1)]:
        plan = layout(size, visual, 384, 27)
        assert plan.length == hf_tokens(size, plan.grid, 27, extra), size


@pytest.mark.parametrize("side,grids", [(6, "3x3"), (24, "5grids"), (24, "2x2")])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 900), (900, 2), (50, 50), (31, 47)])
def test_mosaic_of_other_towers_equals_hf(side, grids, size):
    """An even side and a hair-thin image: HF keeps no column of it, only the newlines."""
    visual = Visual(grids, max_visual_tokens="5T", budget="mosaic")
    plan = layout(size, visual, 14 * side, side)
    assert plan.length == hf_tokens(size, plan.grid, side, 4)


def released_tokens(size, grid, side, extra):
    """LLaVA-NeXT's unpad_image and budget with its own rounding: int(), where HF rounds first."""
    (W, H), (h, w) = size, (grid[1] * side, grid[0] * side)
    if w / h < W / H:
        h -= (h - int(H * (w / W))) // 2 * 2
    else:
        w -= (w - int(W * (h / H))) // 2 * 2
    times = sqrt(h * w / (extra * side**2))
    if times > 1.1:
        h, w = int(h // times), int(w // times)
    return side**2 + h * w + h


def test_the_known_rounding_case_of_the_released_code():
    """3969x98: 98 * (162 / 3969) is 3.9999999999999996 in floats, which int() cuts to 3."""
    visual = Visual("6x6", max_visual_tokens="(4+1)T", budget="mosaic")
    differ = []
    for size in [*sizes(3000, seed=1), (3969, 98)]:
        plan = layout(size, visual, 384, 27)
        if plan.length != released_tokens(size, plan.grid, 27, 4):
            differ.append((size, released_tokens(size, plan.grid, 27, 4), plan.length))
    assert differ == [((3969, 98), 1544, 1218)] or differ == [((3969, 98), 1218, 1544)]


def test_mosaic_keeps_its_base_view_and_its_known_maximum():
    """facts 4.5: the 1.1 rule and newlines make at most 4,341 / 8,765 / 14,904 tokens."""
    for extra, most in ((4, 4341), (9, 8765), (16, 14904)):
        visual = Visual("6x6", max_visual_tokens=f"({extra}+1)T", budget="mosaic")
        plans = [layout(size, visual, 384, 27) for size in sizes(1000, seed=2)]
        assert all(p.side == 27 and p.newlines == p.raster[0] for p in plans)
        assert max(p.length for p in plans) <= most
        square = layout((2304, 2304), visual, 384, 27)  # fills 6x6
        assert square.length == {4: 3699, 9: 7371, 16: 12501}[extra]


def test_mosaic_crop_covers_the_image_and_little_else():
    """What is kept holds the fitted image whole; one more row or column would be padding."""
    visual = Visual("6x6", max_visual_tokens="37T", budget="mosaic")
    for size in sizes(500, seed=3, most=3000):
        plan = layout(size, visual, 384, 27)
        (a, b), (top, bottom, left, right), (w, h) = plan.grid, plan.crop, plan.fitted
        rows, cols = b * 27, a * 27
        assert 0 <= top < bottom <= rows and 0 <= left < right <= cols
        assert top == rows - bottom and left == cols - right and 0 in (top, left)
        assert abs((bottom - top) - h * rows / (b * 384)) < 2.01
        assert abs((right - left) - w * cols / (a * 384)) < 2.01


def test_mosaic_budget_of_nothing_is_an_error():
    for budget in ("1T", "729", "36"):
        with pytest.raises(ValueError, match="a mosaic budget must be at least 2T"):
            layout((500, 500), Visual("2x2", max_visual_tokens=budget, budget="mosaic"), 384, 27)


# ---- the blog's budget


def test_per_view_never_exceeds_tau():
    """L = (ab + 1) t^2 <= tau for every grid to 6x6, and t + 1 would exceed it or T."""
    for side in (6, 14, 24, 27):
        for a, b in parse_grids("6x6"):
            T, n = side * side, a * b + 1
            for tau in sorted({*range(n, 40 * T, 1 + 97 * side // 27), n, n * 4 - 1, n * 4, n * T}):
                visual = Visual(f"{a}x{b}..{a}x{b}", max_visual_tokens=str(tau))
                plan = layout.__wrapped__((a * 48, b * 48), visual, 48, side)
                assert plan.grid == (a, b) and plan.views == n
                assert plan.tokens == n * plan.side**2 <= tau
                assert plan.side == side or n * (plan.side + 1) ** 2 > tau


def test_below_one_token_per_view_is_an_error():
    visual = Visual("3x3", max_visual_tokens="9")
    assert layout((48, 48), visual, 48, 6).side == 2, "1x1 has two views: 2 * 2^2 <= 9"
    with pytest.raises(ValueError, match="9 tokens is below one token for each of the 10 views"):
        layout((144, 144), visual, 48, 6)
    assert layout((144, 144), Visual("3x3", max_visual_tokens="10"), 48, 6).side == 1


def test_quarter_of_27_is_14_and_shrinks_further_only_by_the_budget():
    """The released code rounds up: 14 x 14 = 196 tokens, where the blog prints 183."""
    plan = layout((768, 768), Visual("2x2", max_visual_tokens="37T", pool_stride=2), 384, 27)
    assert plan.side == 14 and plan.tokens == 5 * 196
    plan = layout((768, 768), Visual("2x2", max_visual_tokens="980", pool_stride=2), 384, 27)
    assert plan.side == 14
    plan = layout((768, 768), Visual("2x2", max_visual_tokens="979", pool_stride=2), 384, 27)
    assert plan.side == 13
    mosaic = Visual("2x2", max_visual_tokens="37T", pool_stride=2, budget="mosaic")
    plan = layout((768, 768), mosaic, 384, 27)
    assert plan.side == 14 and plan.raster == (28, 28)


# ---- resolution lifting


def test_lifting_enlarges_until_the_long_side_is_k_tiles():
    small, lifted = Visual("6x6", max_visual_tokens="37T"), Visual("6x6", 4, "37T")
    assert layout((96, 96), small, 48, 6).grid == (2, 2)
    assert layout((96, 96), lifted, 48, 6).grid == (4, 4)
    assert layout((96, 96), lifted, 48, 6).fitted == (192, 192)
    assert layout((96, 48), lifted, 48, 6).grid == (4, 2)
    assert layout((48, 96), lifted, 48, 6).grid == (2, 4)
    assert layout((96, 47), lifted, 48, 6).fitted == (192, 94)
    for size in ((192, 80), (250, 100), (288, 288)):  # long enough already
        assert layout(size, lifted, 48, 6) == layout(size, small, 48, 6), size
    assert layout((191, 80), lifted, 48, 6).fitted[0] == 192
    for size in sizes(300, seed=5, most=400):
        plan = layout(size, lifted, 48, 6)
        assert plan.size == size, "the image keeps its own size in the plan"
        assert min(size) < 20 or max(plan.fitted) >= 4 * 48


# ---- the layout's integers agree with each other


@pytest.mark.parametrize("budget", ["per_view", "mosaic"])
@pytest.mark.parametrize("arrange", ["raster", "flat"])
@pytest.mark.parametrize("grids", ["base", "5grids", "3x3"])
def test_layout_is_consistent(budget, arrange, grids):
    visual = Visual(grids, max_visual_tokens="6T", budget=budget, arrange=arrange)
    for size in [*SHAPES, *sizes(200, seed=6, most=900)]:
        plan = layout(size, visual, 48, 6)
        (a, b), (top, bottom, left, right) = plan.grid, plan.crop
        assert plan.views == a * b + 1 and plan.grid in parse_grids(grids)
        assert plan.tokens == plan.side**2 + plan.raster[0] * plan.raster[1]
        assert plan.newlines == (plan.raster[0] if arrange == "raster" else 0)
        assert plan.length == plan.tokens + plan.newlines
        assert bottom - top >= plan.raster[0] and right - left >= plan.raster[1]
        if budget == "per_view":
            assert plan.raster == (bottom, right) == (b * plan.side, a * plan.side)
        if not a:
            assert plan.length == plan.tokens == plan.side**2 == 36
            continue
        assert fit(size, (a * 48, b * 48)) == plan.fitted
        (x, y), (w, h) = plan.offset, plan.fitted
        assert (w == a * 48 or h == b * 48) and 1 <= w <= a * 48 and 1 <= h <= b * 48
        assert 0 <= a * 48 - w - 2 * x <= 1 and 0 <= b * 48 - h - 2 * y <= 1, "centred"


def test_fit_rounds_the_short_side_up_as_the_released_code_does():
    """resize_and_pad_image: min(ceil(side * scale), target), here without its float noise."""
    for (W, H), (a, b) in zip(sizes(2000, seed=7), [(1, 1), (3, 2), (1, 3), (6, 6)] * 500):
        w, h = a * 384, b * 384
        scale_w, scale_h = w / W, h / H
        expected = (
            (w, min(ceil(round(H * scale_w, 6)), h))
            if scale_w < scale_h
            else (min(ceil(round(W * scale_h, 6)), w), h)
        )
        assert fit((W, H), (w, h)) == expected, (W, H)


# ---- pixels


@pytest.mark.parametrize("size", [(320, 240), (97, 33), (480, 600), (1000, 700), (61, 240)])
@pytest.mark.parametrize("R,side", [(384, 27), (48, 6)])
def test_views_equal_pil_bicubic(size, R, side):
    """PERFORMANCE C1: at most 2/255 off in any pixel, 0.01/255 on average, on noise."""
    image = noise(*size)
    plan = layout(size, Visual("4x4", max_visual_tokens="37T"), R, side)
    views = cut_views(image, plan)
    assert views.dtype == torch.uint8 and views.shape == (plan.views, 3, R, R)
    pairs = [(views[0], image.resize((R, R), Image.BICUBIC))]  # squashed, aspect not kept
    pairs += [(stitch(views, plan), image.resize(plan.fitted, Image.BICUBIC))]
    for ours, theirs in pairs:
        error = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(theirs)).int()).abs()
        assert error.max() <= 2
        assert error.float().mean() <= 0.01


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("grids", ["5grids", "3x3", "2x3..2x3"])
def test_tiles_are_the_padded_image_cut_row_by_row(size, grids):
    """Against a plain loop: fit, centre on black, crop; each pixel lies in exactly one tile."""
    image, R = noise(*size), 48
    plan = layout(size, Visual(grids, max_visual_tokens="10T"), R, 6)
    views = cut_views(image, plan)
    (a, b), fitted = plan.grid, stitch(views, plan)
    h, w = fitted.shape[1:]
    assert (w, h) == plan.fitted
    canvas = np.zeros((b * R, a * R, 3), np.uint8)
    y, x = (b * R - h) // 2, (a * R - w) // 2
    canvas[y : y + h, x : x + w] = fitted.permute(1, 2, 0).numpy()
    for j in range(b):
        for i in range(a):
            tile = canvas[j * R : (j + 1) * R, i * R : (i + 1) * R]
            assert (views[1 + j * a + i].permute(1, 2, 0).numpy() == tile).all(), (i, j)


def test_stitch_finds_every_pixel_once():
    """A picture whose pixels are all different, at a size that needs no resizing."""
    numbers = np.arange(96 * 144, dtype=np.uint32).reshape(96, 144)
    image = Image.fromarray(
        np.stack([numbers & 255, numbers >> 8, numbers * 0], axis=-1).astype(np.uint8)
    )
    plan = layout((144, 96), Visual("3x3", max_visual_tokens="10T"), 48, 6)
    assert plan.grid == (3, 2) and plan.fitted == (144, 96) and plan.offset == (0, 0)
    views = cut_views(image, plan)
    assert (stitch(views, plan).permute(1, 2, 0).numpy() == np.asarray(image)).all()
    codes = views[1:, 0].int() + 256 * views[1:, 1].int()
    assert codes.flatten().sort().values.tolist() == list(range(96 * 144))


def test_padding_is_black_and_outside_only():
    white = Image.new("RGB", (100, 40), (255, 255, 255))
    for size in ((100, 40), (40, 100), (49, 48), (51, 97)):
        plan = layout(size, Visual("2x2..2x2", max_visual_tokens="5T"), 48, 6)
        views = cut_views(white.resize(size), plan)
        assert (views[0] == 255).all(), "the base view is squashed, not padded"
        assert (stitch(views, plan) == 255).all()
        assert (views[1:] == 255).sum() == 3 * plan.fitted[0] * plan.fitted[1]
        assert ((views[1:] == 255) | (views[1:] == 0)).all()


def test_base_view_alone_ignores_the_shape():
    plan = layout((100, 40), Visual("base"), 48, 6)
    views = cut_views(noise(100, 40), plan)
    assert plan.grid == (0, 0) and plan.views == 1 and len(views) == 1
    with_tiles = layout((100, 40), Visual("5grids"), 48, 6)
    assert (views[0] == cut_views(noise(100, 40), with_tiles)[0]).all()


def test_cutting_leaves_the_image_alone():
    image = noise(90, 50)
    before = image.tobytes()
    cut_views(image, layout((90, 50), Visual("5grids"), 48, 6)).zero_()
    assert image.tobytes() == before


def test_isqrt_bound_is_exact_at_squares():
    for t in range(1, 28):
        for tau, expected in ((5 * t * t, t), (5 * t * t - 1, isqrt(t * t - 1))):
            visual = Visual("2x2..2x2", max_visual_tokens=str(tau))
            if expected:
                assert layout((96, 96), visual, 48, 27).side == expected


def test_a_budget_counts_as_it_is_written():
    assert [parse_budget(x, 36, 9) for x in ("5T", "(4+1)T", "(4+1)t", "77", "0T", "(0+1)T")] == [
        180,
        180,
        45,
        77,
        0,
        36,
    ]
