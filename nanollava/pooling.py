"""Pooling: the features of one image -> at most tau tokens, in the order in which the LLM reads.

The code works on any width, so the same lines run before or after the projector. The blog
(Section 2) on the t/4 variant: "In the following experiment, we pool the feature map for each grid
to t'=1/4 t."
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollava.anyres import Layout, join_tiles


def resample(maps: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """(N, C, H, W) -> (N, C, *size); maps that already have this size are returned as they are."""
    if maps.shape[-2:] == size:
        return maps
    if method == "average":
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def pool(features: Tensor, lay: Layout, method: str, flat: bool = False) -> Tensor:
    """Features (N, T, C) of one image -> visual tokens (L, C): base view first, then the tiles.

    Every view's P x P features are pooled to s x s. The tiles then become one raster, which the
    mosaic budget crops to the image and shrinks as a whole. `flat` keeps the tiles view after view.
    """
    P, s = isqrt(features.shape[1]), lay.side
    maps = features.transpose(1, 2).unflatten(2, (P, P))  # (N, C, P, P)
    maps = resample(maps, (s, s), method)  # (N, C, s, s)
    if flat or lay.views == 1:
        return maps.flatten(2).transpose(1, 2).flatten(0, 1)  # (N s s, C)
    top, bottom, left, right = lay.crop
    raster = join_tiles(maps[1:], lay.grid)  # (C, b s, a s)
    raster = raster[:, top:bottom, left:right]  # (C, h, w)
    raster = resample(raster[None], lay.raster, method)[0]  # (C, rows, columns)
    return torch.cat([maps[0].flatten(1), raster.flatten(1)], dim=1).T  # (L, C)


def add_newlines(tokens: Tensor, lay: Layout, newline: Tensor) -> Tensor:
    """Visual tokens (L, D) -> (length, D): the learned newline (D,) after each raster row."""
    if not lay.newlines:
        return tokens
    base, tiles = tokens.split([lay.side**2, lay.tokens - lay.side**2])
    rows = tiles.unflatten(0, lay.raster)  # (rows, columns, D)
    ends = newline.to(tokens.dtype).expand(lay.newlines, 1, -1)  # (rows, 1, D)
    rows = torch.cat([rows, ends], dim=1)  # (rows, columns + 1, D)
    return torch.cat([base, rows.flatten(0, 1)])


def as_maps(values: Tensor, lay: Layout) -> tuple[Tensor, Tensor]:
    """Undo the LLM's order: a value per position (length,) -> the base view's (s, s) and the tiles'
    raster (rows, columns), without the newlines. The raster is empty for a base view alone.
    """
    s = lay.side
    base, tiles = values.tensor_split([s * s])
    if lay.newlines:
        tiles = tiles.unflatten(0, (lay.newlines, -1))[:, :-1]  # the newline is the last column
    elif lay.views > 1:
        tiles = join_tiles(tiles.reshape(-1, 1, s, s), lay.grid)  # flat: view after view
    return base.unflatten(0, (s, s)), tiles.reshape(lay.raster)
