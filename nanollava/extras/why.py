"""Why: where an answer looked, as numbers and as a picture.

    llava.chat("page.png", "what is the tax?")
    print(llava.seen.describe())  # grid, scale, tokens, whether the type was legible
    llava.why().save("why.png")  # where in the base view and the tiles the answer looked

Attention shows which positions the answer's information may have come from. It does not show what
the model made of that information.
"""

from dataclasses import replace
from math import sqrt

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from nanollava.anyres import Layout, stitch
from nanollava.model import VLM
from nanollava.pooling import as_maps
from nanollava.prompts import IMAGE
from nanollava.sequence import Document, pack

HEAT = (255, 80, 0)  # orange, drawn over the image where the answer looked
OPAQUE = 200  # of 255: how opaque the orange is on the token with the most attention
HEIGHT = 384  # pixels of the picture
GAP = 8  # white pixels between two panels


@torch.inference_mode()
def attention(model: VLM, document: Document, written: list[int]) -> Tensor:
    """How much of an answer's attention each of the S positions of its prompt gets, float32[S].

    The mean over the answer's A tokens, the heads and the layers. Prompt and answer share 1, so the
    prompt's values add up to less than that.
    """
    if not written:
        raise ValueError("the answer is empty, so it looked nowhere: ask another question")
    start = len(document.ids)
    ids = torch.cat([document.ids, torch.tensor(written)])  # (S + A,)
    packed = pack([replace(document, ids=ids, labels=ids)], model.spec.tile)
    packed = packed.to(model.newline.device)
    layers: list[tuple[Tensor, Tensor]] = []  # the query and the key of each layer
    with model.autocast():
        embeds = model.embed(packed)  # (1, S + A, D)
        model.read(embeds, packed.positions, list(packed.lengths), packed_watch=layers)
    total = torch.zeros(len(ids))
    for query, key in layers:
        total += layer_attention(query, key, start).cpu()
    return total[:start] / len(layers)


def layer_attention(query: Tensor, key: Tensor, start: int) -> Tensor:
    """One layer's query (1, H, S + A, d) and key (1, H_kv, S + A, d) -> float32[S + A]: how much
    attention each position gets from the answer, which begins at position `start` = S.
    """
    # The kernels return no attention weights, so they are computed here, for the A positions that
    # predict the answer only. Each of those stands just before the token that it predicts.
    group = query.shape[1] // key.shape[1]  # heads that share a key
    key = key[0].repeat_interleave(group, 0).float()  # (H, S + A, d)
    query = query[0, :, start - 1 : -1].float()  # (H, A, d)
    scores = query @ key.transpose(1, 2) / sqrt(query.shape[-1])  # (H, A, S + A)
    future = torch.ones_like(scores, dtype=torch.bool).triu(start)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights.mean((0, 1))  # (S + A,)


def look(model: VLM, document: Document, written: list[int]) -> Image.Image:
    """Each image's base view next to its tiles, orange where the answer looked.

    The orange is relative to the visual token with the most attention.
    """
    layouts = document.layouts
    if not layouts:
        raise ValueError("the last question had no image: ask one about an image first")
    heat = attention(model, document, written)[document.ids == IMAGE]  # visual tokens, newlines
    heat = heat / heat.max().item()
    heats = heat.split([lay.length for lay in layouts])
    views = document.views.split([lay.views for lay in layouts])  # (N, 3, R, R) of each image
    panels = []
    for lay, tiles, tokens in zip(layouts, views, heats, strict=True):
        base, raster = as_maps(tokens, lay)  # (s, s), (rows, columns)
        panels.append(overlay(tiles[0], base))
        if lay.views > 1:
            panels.append(draw_tiles(tiles, raster, lay))
    return side_by_side(panels)


def side_by_side(panels: list[Image.Image]) -> Image.Image:
    """The panels on one white sheet, from left to right."""
    width = sum(panel.width + GAP for panel in panels) - GAP
    sheet = Image.new("RGB", (width, HEIGHT), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    return sheet


def draw_tiles(views: Tensor, heat: Tensor, lay: Layout) -> Image.Image:
    """The tiles as one picture with the heat (rows, columns) of their raster, and the grid."""
    columns, rows = lay.grid
    top, bottom, left, right = lay.crop
    R, side = lay.tile, lay.side
    # Undo what the budget did: it cropped the raster of all tiles to the image, then shrank it.
    heat = F.interpolate(heat[None, None], (bottom - top, right - left))
    heat = F.pad(heat, (left, columns * side - right, top, rows * side - bottom))  # (1, 1, bs, as)
    heat = F.interpolate(heat, (rows * R, columns * R))[0, 0]  # (bR, aR): the canvas
    x, y = lay.offset
    width, height = lay.fitted
    visible = heat[y : y + height, x : x + width]  # without the black around the image
    panel = overlay(stitch(views, lay), visible)
    zoom = panel.height / height
    draw = ImageDraw.Draw(panel)
    for column in range(1, columns):
        edge = (column * R - x) * zoom
        draw.line((edge, 0, edge, panel.height), "gray")
    for row in range(1, rows):
        edge = (row * R - y) * zoom
        draw.line((0, edge, panel.width, edge), "gray")
    return panel


def overlay(pixels: Tensor, heat: Tensor) -> Image.Image:
    """Pixels uint8[3, h, w] under orange, as strong as the heat (rows, columns) from 0 to 1."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (h, w, 3)
    size = round(image.width * HEIGHT / image.height), HEIGHT
    image = image.resize(size, Image.BICUBIC)
    opacity = Image.fromarray((heat * OPAQUE).byte().numpy())
    opacity = opacity.resize(size, Image.NEAREST)  # each token stays a rectangle
    return Image.composite(Image.new("RGB", size, HEAT), image, opacity)
