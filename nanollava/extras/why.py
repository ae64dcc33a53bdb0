"""Why: where an answer looked, as numbers and as a picture.

    llava.chat("page.png", "what is the tax?")
    print(llava.seen.describe())  # grid, scale, tokens, whether the type was legible
    llava.why().save("why.png")  # where in the base view and the tiles the answer looked

Attention tells where an answer's information may have come from, not what was made of it.
"""

from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from nanollava.anyres import Layout, stitch
from nanollava.pooling import as_maps
from nanollava.prompts import IMAGE
from nanollava.sequence import Document, pack

HEAT = (255, 80, 0)  # orange, the more opaque the more attention
HEIGHT = 384  # pixels of the picture


@torch.inference_mode()
def attention(model: Any, document: Document, written: list[int]) -> Tensor:
    """How much of an answer's attention each position of its prompt got, float32[S].

    The mean over the answer's tokens, the heads and the layers; prompt and answer share 1.
    """
    if not written:
        raise ValueError("the answer is empty: nothing looked anywhere")
    start, ids = len(document.ids), torch.cat([document.ids, torch.tensor(written)])
    row = pack([replace(document, ids=ids, labels=ids)], model.spec.tile).to(model.newline.device)
    layers: list[tuple[Tensor, Tensor]] = []
    with model.autocast():
        model.read(model.embed(row), row.positions, list(row.lengths), packed_watch=layers)
    total = torch.zeros(len(ids))
    for query, key in layers:  # (1, H, S, d), (1, H_kv, S, d)
        key = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).float()
        query = query[0, :, start - 1 : -1].float()  # of the positions that foretell the answer
        scores = query @ key.transpose(1, 2) / sqrt(query.shape[-1])
        future = torch.ones_like(scores, dtype=torch.bool).triu(start)
        total += scores.masked_fill(future, -torch.inf).softmax(-1).mean((0, 1)).cpu()
    return total[:start] / len(layers)


def look(model: Any, document: Document, written: list[int]) -> Image.Image:
    """Each image's base view and its tiles side by side, orange where the answer looked.

    The colour's strength is relative to the most looked-at visual token.
    """
    if not document.layouts:
        raise ValueError("the question was about no image")
    given = attention(model, document, written)
    seen = given[document.ids == IMAGE].split([p.length for p in document.layouts])
    views, panels = document.views.split([p.views for p in document.layouts]), []
    most = max(x.max().item() for x in seen)
    for tiles, heat, lay in zip(views, seen, document.layouts, strict=True):
        base, raster = as_maps(heat / most, lay)
        panels.append(overlay(tiles[0], base))
        if lay.views > 1:
            panels.append(tiled(tiles, raster, lay))
    sheet, x = Image.new("RGB", (sum(p.width + 8 for p in panels) - 8, HEIGHT), "white"), 0
    for panel in panels:
        sheet.paste(panel, (x, 0))
        x += panel.width + 8
    return sheet


def tiled(views: Tensor, heat: Tensor, lay: Layout) -> Image.Image:
    """The tiles as one picture with the heat (rows, columns) of their raster, and the grid."""
    (a, b), (top, bottom, left, right), R, s = lay.grid, lay.crop, lay.tile, lay.side
    heat = F.interpolate(heat[None, None], (bottom - top, right - left))
    heat = F.pad(heat, (left, a * s - right, top, b * s - bottom))
    heat = F.interpolate(heat, (b * R, a * R))[0, 0]
    (x, y), (w, h) = lay.offset, lay.fitted
    panel = overlay(stitch(views, lay), heat[y : y + h, x : x + w])
    draw, zoom = ImageDraw.Draw(panel), panel.height / h
    for i in range(1, a):
        draw.line(((i * R - x) * zoom, 0, (i * R - x) * zoom, panel.height), "gray")
    for i in range(1, b):
        draw.line((0, (i * R - y) * zoom, panel.width, (i * R - y) * zoom), "gray")
    return panel


def overlay(pixels: Tensor, heat: Tensor) -> Image.Image:
    """uint8[3, h, w] with the heat of its parts, from 0 to 1, in front; HEIGHT pixels high."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    size = round(image.width * HEIGHT / image.height), HEIGHT
    mask = Image.fromarray((heat * 200).byte().numpy()).resize(size, Image.NEAREST)
    return Image.composite(Image.new("RGB", size, HEAT), image.resize(size, Image.BICUBIC), mask)
