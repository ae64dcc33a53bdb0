"""AnyRes: an image -> the best grid of tiles -> one base view and a x b tiles, uint8.

`layout` holds every integer about an image, and data, model, cost and demo all read it there, so
that they cannot disagree. The blog (Section 2): "For AnyRes with a grid configuration of width a,
height b, and #token T per grid, the total number of visual tokens in is L=(a×b+1)×T." The budget:

    T_new = tau / (a b + 1)  if L > tau,  else T

Sizes are (width, height) here, and (H, W) only inside tensors.
"""

import io
import re
import struct
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isqrt, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

MAX_PIXELS = 150_000_000
# Pixels only: Pillow hands EPS to another program, and some video containers name other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
RUN_LENGTHS = (1, 2)  # of BMP, which Pillow decodes in Python, byte by byte
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    struct.error,
    MemoryError,
    Image.DecompressionBombError,
)
GRIDS = {
    "base": ((0, 0),),  # no tiles: the base view alone, T tokens
    "5grids": ((2, 2), (1, 2), (1, 3), (2, 1), (3, 1)),  # the blog's baseline
    "7grids": ((2, 2), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1)),  # Section 2's text
}


def one_of(*choices: str) -> Any:
    """A key with these choices, of which the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


def at_least(least: int) -> Any:
    """A key that is a number, by default the least one that it may be."""
    return field(default=least, metadata={"least": least})


@dataclass(frozen=True)
class Visual:
    """How an image becomes visual tokens: the recipe's `visual` keys."""

    max_grid: str = "5grids"  # base | 5grids | 7grids | 6x6 (all up to) | 2x2..6x6 | 1x2+2x1
    lift: int = at_least(0)  # resolution lifting: enlarge until the long side is lift * R or more
    max_visual_tokens: str = "5T"  # the budget tau: "5T", "(4+1)T", "(4+1)t" or a number
    budget: str = one_of("per_view", "mosaic")  # the blog's formula | the released code
    pooling: str = one_of("bilinear", "average")  # how a view's features are made fewer
    pool_stride: int = at_least(1)  # 2: every view is pooled to t/4, whatever the budget
    pool_after_projector: bool = True  # false: pool first, as an ablation of the blog does
    arrange: str = one_of("raster", "flat")  # one picture of tiles, a newline per row | by view


@dataclass(frozen=True)
class Layout:
    """The integers of one image; grid (0, 0) means that the base view stands alone."""

    size: tuple[int, int]  # W, H of the image, after EXIF rotation
    tile: int  # R, pixels
    grid: tuple[int, int]  # a columns, b rows
    fitted: tuple[int, int]  # W, H of the whole image inside the canvas of a R x b R pixels
    side: int  # tokens along one side of a view after pooling
    crop: tuple[int, int, int, int]  # top, bottom, left, right: kept part of the tiles' raster
    raster: tuple[int, int]  # rows, columns of the tiles' tokens as the LLM gets them
    newlines: int  # one per raster row, or none
    # How its features become tokens. Part of the layout, so that two images with equal layouts and
    # views have equal keys and values: generation reuses them on that ground.
    pooling: str = Visual.pooling
    pool_after_projector: bool = Visual.pool_after_projector
    arrange: str = Visual.arrange

    @property
    def views(self) -> int:
        """a b + 1: the tiles and the base view."""
        return self.grid[0] * self.grid[1] + 1

    @property
    def tokens(self) -> int:
        """L: visual tokens of the base view and the tiles, newlines not counted."""
        return self.side**2 + self.raster[0] * self.raster[1]

    @property
    def length(self) -> int:
        """Positions in the LLM's sequence: visual tokens and newlines."""
        return self.tokens + self.newlines

    @property
    def offset(self) -> tuple[int, int]:
        """Left and top edge of the fitted image in its canvas: it is centred on black."""
        (a, b), (w, h) = self.grid, self.fitted
        return (a * self.tile - w) // 2, (b * self.tile - h) // 2


def parse_grids(text: str) -> tuple[tuple[int, int], ...]:
    """'5grids', '3x3' (1x1 to 3x3), '2x2..6x6' or '1x2+2x1' -> (columns, rows) pairs."""
    if text in GRIDS:
        return GRIDS[text]
    if re.fullmatch(r"[1-9]\d?x[1-9]\d?(\.\.[1-9]\d?x[1-9]\d?)?", text):
        first, last = (tuple(map(int, g.split("x"))) for g in f"1x1..{text}".split("..")[-2:])
        pairs = [(a, b) for a in range(first[0], last[0] + 1) for b in range(first[1], last[1] + 1)]
        if pairs:
            return tuple(pairs)
    if re.fullmatch(r"[1-9]\d?x[1-9]\d?(\+[1-9]\d?x[1-9]\d?)+", text):
        return tuple(tuple(map(int, g.split("x"))) for g in text.split("+"))
    raise ValueError(
        f"max_grid {text!r} is no grid: write {', '.join(GRIDS)}, '6x6' (all from 1x1 up to it), "
        "'2x2..6x6' or a list like '1x2+2x1'"
    )


def parse_budget(text: str, T: int, t: int = 0) -> int:
    """tau in tokens: '5T' or '(4+1)T' -> 5 T, '(4+1)t' by the `t` tokens that pool_stride leaves, a
    plain number as it is; else ValueError.
    """
    match = re.fullmatch(r"(?:(\d+)|\((\d+)\+1\))([Tt])|(\d+)", text.replace("*", ""))
    if not match:
        raise ValueError(f"max_visual_tokens {text!r}: write '5T', '(4+1)T' or a number of tokens")
    times, tiles, unit, plain = match.groups()
    views = int(times) if times else int(tiles or 0) + 1
    return int(plain) if plain else views * (t if unit == "t" and t else T)


def best_grid(
    size: tuple[int, int], tile: int, grids: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The grid that keeps the most pixels of the image, then the one that wastes the fewest.

    The first of equals wins, in integers: the image fits by its width when w H <= h W.
    """
    W, H = size

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        w, h = grid[0] * tile, grid[1] * tile
        inside = (w, H * w // W) if w * H <= h * W else (W * h // H, h)
        effective = min(inside[0] * inside[1], W * H)
        return effective, effective - w * h

    return max(grids, key=rank)


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest (w, h) of the image's shape inside the canvas, short side rounded up."""
    (W, H), (w, h) = size, canvas
    return (w, min(-(-H * w // W), h)) if w * H < h * W else (min(-(-W * h // H), w), h)


@lru_cache(maxsize=65536)
def layout(size: tuple[int, int], visual: Visual, tile: int, side: int) -> Layout:
    """Plan one image of (W, H) pixels for an encoder with `side`**2 = T tokens per R x R view."""
    (W, H), t = size, -(-side // visual.pool_stride)  # 27 x 27 -> 14 x 14: as the released code
    tau = parse_budget(visual.max_visual_tokens, side * side, t * t)
    long = max(W, H, visual.lift * tile)  # resolution lifting: the blog gives no code for it
    W, H = -(-W * long // max(size)), -(-H * long // max(size))
    a, b = grid = best_grid((W, H), tile, parse_grids(visual.max_grid))
    if visual.budget == "per_view":
        t = min(t, isqrt(tau // (a * b + 1)))  # so that L <= tau for every grid
    if t < 1:
        raise ValueError(
            f"max_visual_tokens {visual.max_visual_tokens} = {tau} tokens is below one token for "
            f"each of the {a * b + 1} views of grid {a}x{b}: raise it or lower max_grid"
        )
    fitted = fit((W, H), (a * tile, b * tile)) if a else (0, 0)
    lay = Layout(
        size,
        tile,
        grid,
        fitted,
        t,
        (0, b * t, 0, a * t),
        (b * t, a * t),
        0,
        visual.pooling,
        visual.pool_after_projector,
        visual.arrange,
    )
    if visual.budget == "mosaic" and a:
        lay = _mosaic(lay, tau - side * side)
    return lay if visual.arrange == "flat" else replace(lay, newlines=lay.raster[0])


def _mosaic(lay: Layout, rest: int) -> Layout:
    """The released code's budget: cut the padding, then shrink the raster if it is over 1.1^2
    times what the base view leaves of tau, `rest`.

    The two square roots stay in floating point, as in HF LlavaOnevision: a processor and a model
    that disagree by one row are the most reported bug of this family.
    """
    (W, H), (rows, cols) = lay.size, lay.raster
    top = left = 0
    if W * rows > cols * H:  # wider than the raster: cut above and below
        top = (rows - H * cols // W) // 2
    else:
        left = (cols - W * rows // H) // 2
    h, w = rows - 2 * top, cols - 2 * left
    times = sqrt(h * w / rest) if rest > 0 else 0
    raster = (int(h // times), int(w // times)) if times > 1.1 else (h, w)
    if rest <= 0 or (times > 1.1 and 0 in raster):  # a hair-thin image has no row: as in HF
        raise ValueError(
            f"max_visual_tokens leaves {rest} tokens for the {h}x{w} raster of an image of {W}x{H} "
            "pixels beside its base view: a mosaic budget must be at least 2T"
        )
    return replace(lay, crop=(top, rows - top, left, cols - left), raster=raster)


def describe(lay: Layout, features: int, glyph: float = 0.0) -> str:
    """Grid, scale, tokens of an image with T `features` a view, and from what size on its type is
    legible; `glyph`: the size of its type in pixels, where it is known.

    Type as high as one visual token is legible, below half of one it is not (measured on the nano
    world, whose documents are 0.4, 0.8 and 1.1 tokens high at base, 2x2 and 3x3).
    """
    (a, b), (W, H), (w, h) = lay.grid, lay.size, lay.fitted if lay.grid[0] else (lay.tile, lay.tile)
    shrunk = (lay.crop[1] - lay.crop[0]) / lay.raster[0] if a else 1  # by a mosaic budget
    token = shrunk * lay.tile / lay.side * H / h  # its height in pixels of the image
    seen = glyph / token
    word = "legible" if seen >= 1 else "hardly legible" if seen >= 0.5 else "illegible"
    known = f"type of {glyph:g} pixels is {seen:.1f} visual tokens high: {word}; " if glyph else ""
    views = f"{lay.views} views" if a else "1 view"
    return (
        f"saw {W}x{H} pixels as {f'grid {a}x{b} + base view' if a else 'base view only'}: "
        f"{views} of {lay.tile} pixels (scale {w / W:.2f} x {h / H:.2f}), "
        f"{lay.views * features} features -> {lay.tokens} visual tokens + {lay.newlines} newlines\n"
        f"{known}type from {token:.0f} pixels on is legible"
    )


def open_image(data: bytes | str | Path | Image.Image, limit: int = MAX_PIXELS) -> Image.Image:
    """Bytes, a file or an opened image of any size and mode -> RGB, upright, first frame.

    Raises ValueError for what cannot be read, and for more pixels than the limit.
    """
    try:
        data = io.BytesIO(data) if isinstance(data, bytes) else data
        image = data if isinstance(data, Image.Image) else Image.open(data, formats=FORMATS)
        if image.width * image.height > limit:
            raise ValueError(f"{image.width}x{image.height} pixels, limit {limit:,}")
        if image.format == "BMP" and image.info["compression"] in RUN_LENGTHS:
            raise ValueError("a BMP in run lengths is slow to read; save it as PNG")
        image.load()
        return upright_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"unreadable image: none of {', '.join(FORMATS)}") from error
    except UNREADABLE as error:
        raise ValueError(f"unreadable image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, turned as EXIF says, what is transparent on white (the released code drops
    alpha, which blackens many drawings); 16-bit and float pixels are scaled to 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float32)
        white = next(w for w in (1, 255, 65535, float(2**32)) if pixels.max() <= w)
        image = Image.fromarray((pixels * (255 / white)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.info = image.info
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8[H, W, 3] -> uint8[3, h, w], bicubic and antialiased, for a (w, h) in pixels.

    The input stays channels-last in memory, which is twice as fast here.
    """
    image = pixels.permute(2, 0, 1)[None]
    return F.interpolate(image, size[::-1], mode="bicubic", antialias=True)[0]


def cut_views(image: Image.Image, lay: Layout) -> Tensor:
    """RGB image -> uint8[N, 3, R, R]: the whole image squashed, then its tiles, row by row."""
    pixels = torch.from_numpy(np.asarray(image).copy())  # (H, W, 3)
    (a, b), R = lay.grid, lay.tile
    base = resize(pixels, (R, R))[None]
    if not a:
        return base
    (left, top), (w, h) = lay.offset, lay.fitted
    canvas = torch.zeros(3, b * R, a * R, dtype=torch.uint8)  # black, before normalisation
    canvas[:, top : top + h, left : left + w] = resize(pixels, (w, h))
    tiles = canvas.unflatten(1, (b, R)).unflatten(3, (a, R))  # (3, b, R, a, R)
    return torch.cat([base, tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)])


def stitch(views: Tensor, lay: Layout) -> Tensor:
    """The reverse of `cut_views`: uint8[N, 3, R, R] -> the fitted image, uint8[3, h, w]."""
    (a, b), (left, top), (w, h) = lay.grid, lay.offset, lay.fitted
    canvas = views[1:].unflatten(0, (b, a)).permute(2, 0, 3, 1, 4)  # (3, b, R, a, R)
    return canvas.flatten(3).flatten(1, 2)[:, top : top + h, left : left + w]
