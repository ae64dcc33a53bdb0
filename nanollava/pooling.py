"""Pooling: the features of one image -> at most tau tokens, in the order in which the LLM reads.

Works on any width, so the same lines run before or after the projector. The blog (Section 2) on
the t/4 variant: "In the following experiment, we pool the feature map for each grid to t'=1/4 t."
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollava.anyres import Layout


def resample(maps: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """(N, C, H, W) -> (N, C, *size); the same size is left alone."""
    if maps.shape[-2:] == size:
        return maps
    if method == "average":
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def pool(features: Tensor, lay: Layout, method: str, flat: bool = False) -> Tensor:
    """Features (N, T, C) of one image -> visual tokens (L, C): base view first, then the tiles.

    Every view is pooled to side x side; the tiles become one raster, which the mosaic budget
    crops to the image and shrinks as a whole. `flat` keeps the tiles view after view instead.
    """
    side = isqrt(features.shape[1])
    maps = features.transpose(1, 2).unflatten(2, (side, side))  # (N, C, P, P)
    maps = resample(maps, (lay.side, lay.side), method)  # (N, C, s, s)
    if flat or lay.views == 1:
        return maps.flatten(2).transpose(1, 2).flatten(0, 1)
    (a, b), (top, bottom, left, right) = lay.grid, lay.crop
    tiles = maps[1:].unflatten(0, (b, a)).permute(2, 0, 3, 1, 4)  # (C, b, s, a, s)
    raster = tiles.flatten(3).flatten(1, 2)[:, top:bottom, left:right]  # (C, h, w)
    raster = resample(raster[None], lay.raster, method)[0]
    return torch.cat([maps[0].flatten(1), raster.flatten(1)], dim=1).T


def add_newlines(tokens: Tensor, lay: Layout, newline: Tensor) -> Tensor:
    """Visual tokens (L, D) -> (length, D): the learned newline (D,) after each raster row."""
    if not lay.newlines:
        return tokens
    base, tiles = tokens.split([lay.side**2, lay.tokens - lay.side**2])
    rows = tiles.unflatten(0, lay.raster)  # (rows, columns, D)
    ends = newline.to(tokens.dtype).expand(lay.raster[0], 1, -1)
    return torch.cat([base, torch.cat([rows, ends], dim=1).flatten(0, 1)])


def as_maps(row: Tensor, lay: Layout) -> tuple[Tensor, Tensor]:
    """The LLM's row (length,) of one image -> its base view (s, s) and its tiles' raster
    (rows, columns), the newlines left out; the raster is empty where the base view is alone.
    """
    base, tiles = row.split([lay.side**2, lay.length - lay.side**2])
    if lay.newlines:
        tiles = tiles.unflatten(0, (lay.newlines, -1))[:, :-1].flatten()
    elif lay.views > 1:  # view after view
        (a, b), s = lay.grid, lay.side
        tiles = tiles.unflatten(0, (b, a, s, s)).transpose(1, 2).flatten()
    return base.unflatten(0, (lay.side, lay.side)), tiles.reshape(lay.raster)
