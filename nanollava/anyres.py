"""AnyRes: an image -> the best grid of tiles -> one base view and a x b tiles, uint8.

`layout` computes every integer about an image. Data, model, cost and demo all read them there, so
they cannot disagree. The blog (Section 2): "For AnyRes with a grid configuration of width a,
height b, and #token T per grid, the total number of visual tokens in is L=(a×b+1)×T." The budget:

    T_new = tau / (a b + 1)  if L > tau,  else T

Sizes are (width, height) here, and (H, W) only inside tensors.
"""

import io
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import inf, isqrt, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # (width, height) in pixels
Grid = tuple[int, int]  # (columns, rows) of tiles
Crop = tuple[int, int, int, int]  # (top, bottom, left, right) in tokens

MAX_PIXELS = 150_000_000
# Only formats that hold pixels: Pillow runs another program to read EPS, and some video containers
# refer to other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What Pillow raises for damaged files.
UNREADABLE = (OSError, SyntaxError, ValueError, ArithmeticError, struct.error, MemoryError)
GRIDS = {  # short names for lists
    "5grids": "2x2+1x2+1x3+2x1+3x1",  # the blog's baseline
    "7grids": "2x2+1x2+1x3+1x4+2x1+3x1+4x1",  # Section 2's text
}
GRID = r"([1-9]\d?)x([1-9]\d?)"  # the pattern of one grid, such as 2x3


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
    """The integers of one image. Grid (0, 0) means that the base view stands alone."""

    size: Size  # of the image, after EXIF rotation
    tile: int  # R, pixels
    grid: Grid  # a columns, b rows
    fitted: Size  # of the whole image inside the canvas of a R x b R pixels
    side: int  # tokens along one side of a view after pooling
    crop: Crop  # the part of the tiles' raster that is kept
    raster: tuple[int, int]  # rows, columns of the tiles' tokens as the LLM reads them
    # How the features become tokens. This is part of the layout, so that equal views and layouts
    # mean equal keys and values: generation reuses them on that ground.
    pooling: str
    pool_after_projector: bool
    arrange: str

    @property
    def views(self) -> int:
        """a b + 1: the tiles and the base view."""
        return prod(self.grid) + 1

    @property
    def tokens(self) -> int:
        """L: visual tokens of the base view and the tiles, without newlines."""
        return self.side**2 + prod(self.raster)

    @property
    def newlines(self) -> int:
        """Learned newlines: one ends each row of the raster; a flat arrangement has no rows."""
        return 0 if self.arrange == "flat" else self.raster[0]

    @property
    def length(self) -> int:
        """Positions in the LLM's sequence: visual tokens and newlines."""
        return self.tokens + self.newlines

    @property
    def offset(self) -> tuple[int, int]:
        """Left and top edge of the fitted image, which is centred in its canvas."""
        (a, b), (w, h) = self.grid, self.fitted
        return (a * self.tile - w) // 2, (b * self.tile - h) // 2


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, in integers."""
    return -(-a // b)


def parse_grids(text: str) -> tuple[Grid, ...]:
    """The grids that a `max_grid` allows, in the order in which ties are broken.

    'base' is no tiles at all, '3x3' is all grids from 1x1 to 3x3, '2x2..6x6' a range, '1x2+2x1' a
    list, and GRIDS has names for lists. Raises ValueError for anything else.
    """
    if text == "base":
        return ((0, 0),)
    text = GRIDS.get(text, text)
    if re.fullmatch(rf"{GRID}(\+{GRID})+", text):
        return tuple((int(a), int(b)) for a, b in re.findall(GRID, text))
    span = re.fullmatch(rf"(?:{GRID}\.\.)?{GRID}", text)
    if span:
        a, b, last_a, last_b = map(int, span.groups("1"))  # 6x6 is 1x1..6x6
        grids = tuple(product(range(a, last_a + 1), range(b, last_b + 1)))
        if grids:  # 3x3..2x2 has none
            return grids
    raise ValueError(
        f"max_grid {text!r} is not a grid. Use base, 5grids, 7grids, a size such as 6x6 (all from "
        "1x1 up to it), a range such as 2x2..6x6, or a list such as 1x2+2x1."
    )


def parse_budget(text: str, T: int, t: int = 0) -> int:
    """The budget tau in tokens: '5T' and '(4+1)T' are 5 T, and a number stands for itself.

    A small letter, as in '(4+1)t', counts the `t` tokens that pool_stride leaves of a view. Raises
    ValueError for any other text.
    """
    match = re.fullmatch(r"(\d+)|(\d+|\(\d+\+1\))([Tt])", text.replace("*", ""))
    if not match:
        raise ValueError(f"max_visual_tokens {text!r} is not a budget. Use 5T, (4+1)T or a number.")
    tokens, views, unit = match.groups()
    if tokens:
        return int(tokens)
    per_view = t if unit == "t" and t else T
    return per_view * sum(map(int, re.findall(r"\d+", views)))  # 5, or 4 + 1


def best_grid(size: Size, tile: int, grids: tuple[Grid, ...]) -> Grid:
    """The grid that keeps the most pixels of the image and, among those, wastes the fewest.

    An image is shrunk or enlarged to fit the grid's canvas of a R x b R pixels. *Effective* pixels
    are what it covers there, at most as many as it has; *wasted* pixels are the rest of the canvas.
    The first of equal grids wins. For an image of 300x100 pixels and tiles of 100:

        grid  canvas   fitted   effective  wasted
        1x1   100x100  100x33       3,300   6,700
        2x2   200x200  200x66      13,200  26,800
        3x1   300x100  300x100     30,000       0   <- the best
        3x2   300x200  300x100     30,000  30,000
    """
    W, H = size

    def rank(grid: Grid) -> tuple[int, int]:
        w, h = (edge * tile for edge in grid)
        canvas = w * h
        # Rounded down, where `fit` rounds up: the released code does both.
        if w * H < h * W:  # the image is wider than the canvas, so it fits by its width
            h = H * w // W
        else:
            w = W * h // H
        effective = min(w * h, W * H)
        wasted = canvas - effective
        return effective, -wasted

    return max(grids, key=rank)


def fit(size: Size, canvas: Size) -> Size:
    """The largest size of the image's shape inside the canvas; its short side is rounded up.

    300x100 fits 200x200 as 200x67, by its width; 100x300 fits it as 67x200, by its height.
    """
    W, H = size
    w, h = canvas
    if w * H < h * W:  # the image is wider than the canvas
        return w, ceil_div(H * w, W)
    return ceil_div(W * h, H), h


@lru_cache(maxsize=65536)
def layout(size: Size, visual: Visual, tile: int, side: int) -> Layout:
    """Lay out an image for an encoder with `side`**2 = T tokens per R x R view.

    Raises ValueError for a budget that leaves less than one token for each view.
    """
    s = ceil_div(side, visual.pool_stride)  # 27 -> 14: the released code rounds up, too
    tau = parse_budget(visual.max_visual_tokens, side * side, s * s)
    # Resolution lifting: the blog describes it; there is no released code for it.
    long = max(*size, visual.lift * tile)
    lifted = tuple(ceil_div(edge * long, max(size)) for edge in size)
    a, b = grid = best_grid(lifted, tile, parse_grids(visual.max_grid))
    fitted = fit(lifted, (a * tile, b * tile))
    views = a * b + 1
    if visual.budget == "per_view":
        s = min(s, isqrt(tau // views))  # the largest square with views * s * s <= tau
    if s < 1:
        raise ValueError(
            f"max_visual_tokens {visual.max_visual_tokens} = {tau} tokens is below one token for "
            f"each of the {views} views of grid {a}x{b}. Raise it or lower max_grid."
        )
    crop, raster = (0, b * s, 0, a * s), (b * s, a * s)  # all of the tiles' tokens
    if visual.budget == "mosaic" and a:
        crop, raster = mosaic(size, *raster, tau - side * side)  # the base view keeps T
    pooled_how = visual.pooling, visual.pool_after_projector, visual.arrange
    return Layout(size, tile, grid, fitted, s, crop, raster, *pooled_how)


def mosaic(size: Size, rows: int, columns: int, budget: int) -> tuple[Crop, tuple[int, int]]:
    """The released code's budget: the part of the tiles' raster that is kept, and its rows and
    columns after pooling. `budget` is what the base view leaves of tau.

    First the padding around the image is cut off. What remains is pooled as a whole if it has more
    than 1.1^2 times `budget` tokens. The ratio stays in floating point, as in HF LlavaOnevision: a
    processor and a model that disagree by one row are the most reported bug of this family.
    """
    W, H = size
    top = left = 0
    if W * rows > columns * H:  # the image is wider than the raster: padding above and below
        top = (rows - H * columns // W) // 2
    else:
        left = (columns - W * rows // H) // 2
    h, w = rows - 2 * top, columns - 2 * left
    crop = top, top + h, left, left + w
    ratio = sqrt(h * w / budget) if budget > 0 else inf
    if ratio <= 1.1:  # a hair-thin image may have no row or column here: as in HF
        return crop, (h, w)
    raster = int(h // ratio), int(w // ratio)
    if 0 in raster:
        raise ValueError(
            f"max_visual_tokens leaves {budget} tokens for the tiles of an image of {W}x{H} "
            "pixels. Raise it: a mosaic budget must be at least 2T."
        )
    return crop, raster


def describe(lay: Layout, features: int, glyph: float = 0.0) -> str:
    """Two lines on one image: its grid, scale and tokens, and the smallest legible type.

    `features` is the encoder's T, `glyph` the height of the image's type in pixels where known.
    """
    (a, b), (W, H) = lay.grid, lay.size
    views = f"grid {a}x{b} + base view: {lay.views} views" if a else "base view only: 1 view"
    w, h = lay.fitted if a else (lay.tile, lay.tile)  # a base view is squashed to R x R
    # Rows pooled into one; a hair-thin image can have none under a mosaic budget.
    merged = (lay.crop[1] - lay.crop[0]) / max(1, lay.raster[0]) if a else 1
    token = merged * lay.tile / lay.side * H / h  # height of a visual token, in the image's pixels
    known = ""
    if glyph:
        height = glyph / token
        known = f"type of {glyph:g} pixels is {height:.1f} visual tokens high: {legible(height)}; "
    return (
        f"saw {W}x{H} pixels as {views} of {lay.tile} pixels "
        f"(scale {w / W:.2f} x {h / H:.2f}), {lay.views * features} features "
        f"-> {lay.tokens} visual tokens + {lay.newlines} newlines\n"
        f"{known}type from {token:.0f} pixels on is legible"
    )


def legible(height: float) -> str:
    """Whether type of a height in visual tokens can be read.

    Measured on the nano world, whose documents are 0.4, 0.8 and 1.1 tokens high at base, 2x2 and
    3x3.
    """
    if height >= 1:
        return "legible"
    if height >= 0.5:
        return "hardly legible"
    return "illegible"


def open_image(data: bytes | str | Path | Image.Image, limit: int = MAX_PIXELS) -> Image.Image:
    """Bytes, a file or an opened image of any size and mode -> RGB, upright, first frame.

    Raises ValueError for what cannot be read, and for more pixels than the limit.
    """
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        # Only the header has been read so far: refuse before the pixels take memory.
        if image.width * image.height > limit:
            raise ValueError(f"{image.width}x{image.height} pixels, limit {limit:,}")
        # Pillow decodes BMPs in run lengths, compressions 1 and 2, in Python, byte by byte.
        if image.format == "BMP" and image.info["compression"] in (1, 2):
            raise ValueError("a run-length encoded BMP is slow to read. Save it as PNG.")
        image.load()
        return upright_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"unreadable image: none of {', '.join(FORMATS)}") from error
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, rotated as EXIF says. 16-bit and float pixels are scaled to 8 bits.

    Transparent parts become white. The released code drops alpha, which blackens many drawings.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("F", "I")):
        pixels = np.asarray(image, np.float32)
        # White is 1 in most float images, else the largest value of 8, 16 or 32 bits: the smallest
        # of these that no pixel exceeds.
        white = [level for level in (1, 255, 65535, 2.0**32) if pixels.max() <= level]
        if not white:
            raise ValueError("a pixel is NaN or above 2**32. Save it as an 8-bit PNG.")
        image = Image.fromarray((pixels * (255 / white[0])).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.info = image.info  # the result takes its metadata from the paper
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def resize(pixels: Tensor, size: Size) -> Tensor:
    """uint8[H, W, 3] -> uint8[3, h, w], bicubic and antialiased, for a (w, h) in pixels.

    The input stays channels-last in memory, which is twice as fast here.
    """
    image = pixels.permute(2, 0, 1)[None]  # (1, 3, H, W)
    return F.interpolate(image, size[::-1], mode="bicubic", antialias=True)[0]


def fitted_part(canvas: Tensor, lay: Layout) -> Tensor:
    """What the image covers of its canvas, (3, b R, a R) -> (3, h, w)."""
    (left, top), (w, h) = lay.offset, lay.fitted
    return canvas[:, top : top + h, left : left + w]


def cut_views(image: Image.Image, lay: Layout) -> Tensor:
    """RGB image -> uint8[N, 3, R, R]: the whole image squashed, then its tiles, row by row."""
    (a, b), R = lay.grid, lay.tile
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
    base = resize(pixels, (R, R))[None]  # (1, 3, R, R)
    if not a:
        return base
    canvas = torch.zeros(3, b * R, a * R, dtype=torch.uint8)  # black, before normalisation
    fitted_part(canvas, lay).copy_(resize(pixels, lay.fitted))
    tiles = canvas.unflatten(1, (b, R)).unflatten(3, (a, R))  # (3, b, R, a, R)
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (b a, 3, R, R)
    return torch.cat([base, tiles])


def join_tiles(tiles: Tensor, grid: Grid) -> Tensor:
    """Tiles (b a, C, s, s), row by row -> the picture that they make, (C, b s, a s)."""
    rows = tiles.unflatten(0, grid[::-1]).permute(2, 0, 3, 1, 4)  # (C, b, s, a, s)
    return rows.flatten(3).flatten(1, 2)


def stitch(views: Tensor, lay: Layout) -> Tensor:
    """The reverse of `cut_views`: uint8[N, 3, R, R] -> the fitted image, uint8[3, h, w]."""
    return fitted_part(join_tiles(views[1:], lay.grid), lay)
