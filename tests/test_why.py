"""Where an answer looked: the orange lies on the right pixels, and the CLI writes the picture."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanollava.anyres import Visual, layout
from nanollava.extras import why
from nanollava.generate import Assistant
from nanollava.model import VLM
from nanollava.pooling import add_newlines, as_maps, pool

SETTINGS = [
    {"max_grid": "base"},
    {},
    {"arrange": "flat"},
    {"max_visual_tokens": "4T"},
    {"budget": "mosaic", "max_visual_tokens": "4T"},
]


@pytest.mark.parametrize("keys", SETTINGS)
def test_maps_undo_the_order_in_which_the_llm_reads(keys):
    visual = Visual(**{"max_grid": "3x3", "max_visual_tokens": "10T"} | keys)
    plan = layout((230, 140), visual, 48, 6)
    y, x = torch.arange(6.0)[:, None], torch.arange(6.0)
    (a, b), views = plan.grid, [1000 + 30 * y + x]  # a number for each place of the canvas
    views += [30 * (6 * j + y) + 6 * i + x for j in range(b) for i in range(a)]
    features = torch.stack(views).reshape(-1, 36, 1)
    row = add_newlines(
        pool(features, plan, "bilinear", visual.arrange == "flat"), plan, torch.tensor([-9.0])
    )
    base, tiles = as_maps(row[:, 0], plan)
    assert base.shape == (plan.side, plan.side) and tiles.shape == plan.raster
    assert (base.diff(dim=0) > 0).all() and (base.diff(dim=1) > 0).all() and base.min() >= 1000
    assert (tiles.diff(dim=0) > 0).all() and (tiles.diff(dim=1) > 0).all() and (tiles >= 0).all()


def asked(tiny_recipe, size, **keys) -> Assistant:
    """An assistant that has answered a question about a grey picture."""
    visual = replace(tiny_recipe.visual, **keys)
    torch.manual_seed(0)
    assistant = Assistant(VLM(replace(tiny_recipe, visual=visual)))
    assistant.chat(Image.new("RGB", size, (90, 90, 90)), "what is it?", max_new_tokens=4)
    return assistant


@pytest.mark.parametrize("keys", SETTINGS)
def test_the_orange_lies_on_the_pixels_of_the_token(tiny_recipe, monkeypatch, keys):
    """One token gets all attention: the middle of the orange is its place in the image."""
    assistant = asked(tiny_recipe, (96, 192), **keys)
    document, (plan,) = assistant.seen.document, assistant.seen.document.layouts
    given, (rows, columns) = torch.zeros(len(document.ids)), plan.raster
    start, r, c = int((document.ids < 0).nonzero()[0]), rows - 2, columns // 2
    if not plan.grid[0]:
        r, c, rows, columns, at = 1, 3, plan.side, plan.side, plan.side + 3
    elif plan.newlines:
        at = plan.side**2 + r * (columns + 1) + c
    else:
        s, (a, _) = plan.side, plan.grid
        at = s * s * (1 + r // s * a + c // s) + r % s * s + c % s
    given[start + at] = 0.2
    monkeypatch.setattr(why, "attention", lambda *_: given)
    picture = np.asarray(assistant.why()).astype(int)
    ys, xs = np.nonzero(picture[..., 0] - picture[..., 2] > 80)
    panel = (392, 192) if plan.grid[0] else (0, 384)  # left edge and width of the tiles' picture
    x, y = (xs.mean() + 0.5 - panel[0]) / panel[1] * columns, (ys.mean() + 0.5) / 384 * rows
    assert abs(y - r - 0.5) < 0.5 and abs(x - c - 0.5) < 0.5  # inside it
    assert picture.shape == (384, sum(panel), 3)


PICTURES = [  # of each of SETTINGS, as drawn before the code was rewritten
    "62da7ca26100d818",
    "1921ab58da4c0464",
    "691030fe61ed64a9",
    "107f9c99ed512ec5",
    "6c3244345e019c24",
]


@pytest.mark.parametrize(("keys", "digest"), zip(SETTINGS, PICTURES))
def test_a_picture_keeps_every_pixel(tiny_recipe, monkeypatch, keys, digest):
    """A noise image of 230 x 140 pixels, with attention from 0 to 6 in turn."""
    draw = np.random.default_rng(0)
    visual = replace(tiny_recipe.visual, **keys)
    assistant = Assistant(VLM(replace(tiny_recipe, visual=visual)))
    noise = Image.fromarray(draw.integers(0, 256, (140, 230, 3), dtype=np.uint8))
    assistant.chat(noise, "what is it?", max_new_tokens=1)
    given = torch.arange(len(assistant.seen.document.ids)) % 7.0
    monkeypatch.setattr(why, "attention", lambda *_: given)
    pixels = np.asarray(assistant.why()).tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == digest


def test_without_an_answer_about_an_image_there_is_no_picture(tiny_recipe):
    assistant = Assistant(VLM(tiny_recipe))
    with pytest.raises(ValueError, match="chat first"):
        assistant.why()
    assistant = asked(tiny_recipe, (60, 60))
    assistant.seen.written.clear()
    with pytest.raises(ValueError, match="answer is empty"):
        assistant.why()
    assistant.chat(None, "what is it?", max_new_tokens=2)
    with pytest.raises(ValueError, match="had no image"):
        assistant.why()


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"max_grid": "base"},
            "36 features -> 36 visual tokens + 0 newlines\ntype of 12 pixels is "
            "0.4 visual tokens high: illegible; type from 32 pixels on is legible",
        ),
        ({"max_grid": "2x2"}, "0.8 visual tokens high: hardly legible; type from 16 pixels"),
        (
            {},
            "360 features -> 360 visual tokens + 18 newlines\ntype of 12 pixels is 1.1 visual "
            "tokens high: legible; type from 11 pixels",
        ),
        (
            {"max_visual_tokens": "5T"},
            "360 features -> 160 visual tokens + 12 newlines\ntype of 12 "
            "pixels is 0.8 visual tokens high: hardly legible",
        ),
        ({"max_visual_tokens": "5T", "budget": "mosaic"}, "type from 16 pixels on is legible"),
    ],
)
def test_legibility_counts_visual_tokens_per_glyph(tiny_recipe, keys, told):
    assistant = asked(tiny_recipe, (192, 192), **keys)
    assistant.seen.glyphs = (12.0,)
    assert told in assistant.seen.describe()
