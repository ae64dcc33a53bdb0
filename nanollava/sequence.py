"""Sequence: documents -> one packed row, on which nothing is padding.

A document is one sample: its ids with an IMAGE id at every visual position, its labels, its
views. `pack` lays documents end to end; positions restart at each; hidden state i predicts token
i + 1 of the same document, and only where that token is learned is the lm_head run at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from nanollava.anyres import Layout, Visual, cut_views, layout
from nanollava.prompts import IGNORE, IMAGE, Turn, encode


@dataclass(frozen=True)
class Document:
    """One sample, ready to be packed."""

    ids: Tensor  # int64[S], IMAGE at visual positions
    labels: Tensor  # int64[S], IGNORE where not learned
    views: Tensor  # uint8[N, 3, R, R], all images' views one after another
    layouts: tuple[Layout, ...]  # one per image
    source: str = ""
    name: str = ""
    note: str = ""  # what was cut or left out of it

    @property
    def learned(self) -> int:
        """Supervised tokens, counted after the shift."""
        return int((self.labels[1:] != IGNORE).sum())

    @cached_property
    def prefix(self) -> tuple[int, int]:
        """How many positions there are up to its last visual token, and a hash of all in them."""
        n = int((self.ids == IMAGE).nonzero()[-1]) + 1 if self.layouts else 0
        parts = (x.contiguous().numpy().tobytes() for x in (self.ids[:n], self.views))
        return n, hash((*parts, self.layouts))

    def suffix(self, n: int) -> "Document":
        """What follows its first n positions: all of its images are before or after them."""
        rest = replace(self, ids=self.ids[n:], labels=self.labels[n:])
        return replace(rest, views=self.views[:0], layouts=()) if n else rest


@dataclass(frozen=True)
class Pack:
    """Several documents as one row of S positions."""

    ids: Tensor  # int64[S], 0 at visual positions
    visual: Tensor  # int64[V], the positions of visual tokens
    positions: Tensor  # int64[1, S], restarting at each document
    predict: Tensor  # int64[K], hidden states that predict a learned token
    targets: Tensor  # int64[K], those tokens
    owner: Tensor  # int64[K], which document each belongs to
    views: Tensor  # uint8[N, 3, R, R]
    layouts: tuple[Layout, ...]
    lengths: tuple[int, ...]  # of the documents; they add up to S
    sources: tuple[str, ...]

    @property
    def learned(self) -> int:
        """Supervised tokens."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its tensors on a device."""
        moved = {
            f.name: x.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def __deepcopy__(self, memo: dict) -> "Pack":
        """Frozen, so a copy is itself: Composer copies every microbatch (40 ms of tiles a step)."""
        return self


def expand(
    ids: Sequence[int], labels: Sequence[int], layouts: Sequence[Layout]
) -> tuple[Tensor, Tensor]:
    """Replace each IMAGE id by as many as its image has positions; int64[S] ids and labels."""
    assert sum(i == IMAGE for i in ids) == len(layouts), (ids.count(IMAGE), len(layouts))
    each = iter(layouts)
    times = torch.tensor([next(each).length if i == IMAGE else 1 for i in ids], dtype=torch.int64)
    pairs = torch.tensor([ids, labels], dtype=torch.int64).repeat_interleave(times, 1)
    return pairs[0], pairs[1]


@dataclass(frozen=True)
class Writer:
    """Turns and images -> documents, under one stage's settings."""

    tokenizer: Any
    visual: Visual
    tile: int
    side: int
    template: str
    label_mask: str = "answers"
    max_length: int = 32768

    def layouts(self, images: Sequence[Image]) -> tuple[Layout, ...]:
        """One image gets AnyRes; several get a base view each, as in the released code."""
        alone = self.visual if len(images) == 1 else replace(self.visual, max_grid="base")
        return tuple(layout(image.size, alone, self.tile, self.side) for image in images)

    def plain(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image],
        name: str = "",
        source: str = "",
        answer: bool = False,
    ) -> Document:
        """A document without its pixels.

        One over `max_length` loses its last words; where image tokens or all that is supervised
        would go, it is left out: one position that teaches nothing. Its `note` says so. Raises
        ValueError for a question that does not fit and, unless `answer`, where nothing is learned.
        """
        layouts, most = self.layouts(images), self.max_length
        words, marks = encode(self.tokenizer, turns, self.template, self.label_mask, answer)
        ids, labels = expand(words, marks, layouts)
        none = torch.zeros(0, 3, self.tile, self.tile, dtype=torch.uint8)
        if not answer and not (labels[1:] != IGNORE).any():
            raise ValueError(f"sample {name}: no supervised token; an answer is empty or missing")
        if len(ids) <= most:
            return Document(ids, labels, none, layouts, source, name)
        visual, sizes = sum(lay.length for lay in layouts), [lay.size for lay in layouts]
        told = f"sample {name}: {len(ids)} positions, {visual} of them for images of {sizes} pixels"
        told += f"; max_length is {most}. Raise it or lower visual.max_visual_tokens"
        if answer:
            raise ValueError(told)
        if (labels[1:most] != IGNORE).any() and not (ids[most:] == IMAGE).any():
            return Document(ids[:most], labels[:most], none, layouts, source, name, f"{told}; cut")
        zero = torch.zeros(1, dtype=torch.int64)
        return Document(zero, zero + IGNORE, none, (), source, name, f"{told}; left out")

    def __call__(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image],
        name: str = "",
        source: str = "",
        answer: bool = False,
    ) -> Document:
        """A document; with `answer` it ends where an answer begins, for generation."""
        plain = self.plain(turns, images, name, source, answer)
        views = [cut_views(image, lay) for image, lay in zip(images, plain.layouts, strict=False)]
        return replace(plain, views=torch.cat([plain.views, *views]))


def pack(documents: Sequence[Document], tile: int) -> Pack:
    """Lay documents end to end; without any, one position that predicts nothing."""
    zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(0, 3, tile, tile).byte()
    documents = documents or [Document(zero, zero, nothing, ())]
    lengths = [len(d.ids) for d in documents]
    ids, labels = (torch.cat([getattr(d, key) for d in documents]) for key in ("ids", "labels"))
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # it has nothing that could predict it
    learned = (labels.index_fill(0, first, IGNORE) != IGNORE).nonzero()[:, 0]
    owner = torch.arange(len(documents)).repeat_interleave(torch.tensor(lengths))
    return Pack(
        ids=ids.masked_fill(ids == IMAGE, 0),
        visual=(ids == IMAGE).nonzero()[:, 0],
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        predict=learned - 1,
        targets=labels[learned],
        owner=owner[learned],
        views=torch.cat([d.views for d in documents]),
        layouts=tuple(lay for d in documents for lay in d.layouts),
        lengths=tuple(lengths),
        sources=tuple(d.source for d in documents),
    )


def count_tokens(batch: list[Document] | Pack) -> dict[str, int]:
    """Positions and supervised tokens of a batch or of one pack."""
    rows = [batch] if isinstance(batch, Pack) else batch
    return {"total": sum(len(r.ids) for r in rows), "loss_generating": sum(r.learned for r in rows)}


def split(documents: Sequence[Document], budget: int) -> list[list[Document]]:
    """First-fit decreasing: as few packs of at most `budget` positions as that finds.

    A document longer than the budget gets a pack of its own.
    """
    packs: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        n = len(document.ids)
        i = next((i for i, left in enumerate(room) if n <= left), len(packs))
        if i == len(packs):
            packs.append([])
            room.append(budget)
        packs[i].append(document)
        room[i] -= n
    return packs
