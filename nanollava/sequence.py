"""Sequence: documents -> one packed row, in which nothing is padding.

A document is one sample: its ids with an IMAGE id at every visual position, its labels and its
views. `pack` lays documents end to end, and positions restart at each. Hidden state i predicts
token i + 1 of the same document, and the lm_head runs only where that token is supervised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from nanollava.anyres import Layout, Visual, cut_views, layout
from nanollava.prompts import IGNORE, IMAGE, Turn, encode

Turns = Sequence[Turn]
Images = Sequence[Image]


@dataclass(frozen=True)
class Document:
    """One sample, ready to be packed."""

    ids: Tensor  # int64[S], IMAGE at visual positions
    labels: Tensor  # int64[S], IGNORE where not supervised
    views: Tensor  # uint8[N, 3, R, R], all images' views one after another
    layouts: tuple[Layout, ...]  # one per image
    source: str = ""
    name: str = ""
    note: str = ""  # what was cut or left out of it

    @property
    def learned(self) -> int:
        """Supervised tokens. The first token is not one: nothing predicts it."""
        return int((self.labels[1:] != IGNORE).sum())

    @cached_property
    def prefix(self) -> tuple[int, int]:
        """The number of positions up to the last visual token, and a hash of their contents.

        Documents with equal prefixes have the same keys and values there, so generation computes
        them once. 0 positions for a document without images.
        """
        visual = (self.ids == IMAGE).nonzero()  # (V, 1)
        length = int(visual[-1]) + 1 if len(visual) else 0
        contents = [x.numpy().tobytes() for x in (self.ids[:length], self.views)]
        return length, hash((*contents, self.layouts))

    def suffix(self, n: int) -> "Document":
        """What follows the first n positions, which hold all of the images or, with n = 0, none."""
        if not n:
            return self
        ids, labels = self.ids[n:], self.labels[n:]
        return replace(self, ids=ids, labels=labels, views=self.views[:0], layouts=())


@dataclass(frozen=True)
class Pack:
    """Several documents as one row of S positions."""

    ids: Tensor  # int64[S], 0 at visual positions
    visual: Tensor  # int64[V], the positions of visual tokens
    positions: Tensor  # int64[1, S], restarting at each document
    predict: Tensor  # int64[K], the hidden states that predict a supervised token
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
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def __deepcopy__(self, memo: dict) -> "Pack":
        """The pack itself, which is frozen: Composer copies every microbatch (40 ms a step)."""
        return self


def silent(tile: int) -> Document:
    """A document of one position that supervises nothing: it stands for a sample left out."""
    views = torch.zeros(0, 3, tile, tile, dtype=torch.uint8)
    return Document(torch.tensor([0]), torch.tensor([IGNORE]), views, layouts=())


def expand(ids: list[int], labels: list[int], layouts: Sequence[Layout]) -> Tensor:
    """Repeat each IMAGE id for every position of its image; returns ids and labels, int64[2, S]."""
    both = torch.tensor([ids, labels], dtype=torch.int64)  # (2, text tokens and images)
    images = both[0] == IMAGE
    assert images.sum() == len(layouts), "one IMAGE id stands for each image"
    times = torch.ones_like(both[0])
    times[images] = times.new_tensor([lay.length for lay in layouts])
    return both.repeat_interleave(times, dim=1)


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

    def layouts(self, images: Images) -> tuple[Layout, ...]:
        """One image gets AnyRes; several get a base view each, as in the released code."""
        visual = replace(self.visual, max_grid="base") if len(images) > 1 else self.visual
        return tuple(layout(image.size, visual, self.tile, self.side) for image in images)

    def plain(
        self, turns: Turns, images: Images, name: str = "", source: str = "", answer: bool = False
    ) -> Document:
        """A document without its pixels, shortened where it is longer than `max_length`.

        Raises ValueError where nothing is supervised, except in a prompt: with `answer`, the
        document ends where an answer begins, for generation.
        """
        layouts = self.layouts(images)
        ids, labels = encode(self.tokenizer, turns, self.template, self.label_mask, answer)
        ids, labels = expand(ids, labels, layouts)  # int64[S] each
        document = Document(ids, labels, silent(self.tile).views, layouts, source, name)
        if not answer and not document.learned:
            raise ValueError(f"sample {name}: no supervised token. Every sample needs an answer.")
        if len(ids) > self.max_length:
            return self.shorten(document, answer)
        return document

    def shorten(self, document: Document, answer: bool) -> Document:
        """Cut the end off a document that is too long, and say so in its note.

        If the cut would remove visual tokens or all supervised tokens, the sample is left out: one
        silent position remains. Raises ValueError for a prompt (`answer`), which is never cut.
        """
        end = self.max_length
        visual = sum(lay.length for lay in document.layouts)
        sizes = [lay.size for lay in document.layouts]
        message = (
            f"sample {document.name} has {len(document.ids)} positions ({visual} for images of "
            f"{sizes} pixels), but max_length is {end}. Raise it or lower visual.max_visual_tokens"
        )
        if answer:
            raise ValueError(message)
        ids, labels = document.ids[:end], document.labels[:end]
        cut = replace(document, ids=ids, labels=labels, note=f"{message}; the end is cut")
        if cut.learned and document.prefix[0] <= end:
            return cut
        note = f"{message}; the sample is left out"
        return replace(silent(self.tile), source=document.source, name=document.name, note=note)

    def __call__(
        self, turns: Turns, images: Images, name: str = "", source: str = "", answer: bool = False
    ) -> Document:
        """A document with its pixels; see `plain`."""
        plain = self.plain(turns, images, name, source, answer)
        # Not strict: a sample that is left out has no layouts, however many images it has.
        views = [cut_views(*pair) for pair in zip(images, plain.layouts, strict=False)]
        return replace(plain, views=torch.cat([plain.views, *views]))


def pack(documents: Sequence[Document], tile: int) -> Pack:
    """Lay documents end to end; without any, one position that predicts nothing."""
    documents = documents or [silent(tile)]
    lengths = [len(d.ids) for d in documents]
    ids = torch.cat([d.ids for d in documents])  # (S,)
    labels = torch.cat([d.labels for d in documents])  # (S,)
    positions = torch.cat([torch.arange(n) for n in lengths])  # (S,)
    # Nothing predicts a document's first token, at position 0: the hidden state before it belongs
    # to another document.
    learned = ((labels != IGNORE) & (positions > 0)).nonzero().flatten()  # (K,)
    owner = torch.arange(len(documents)).repeat_interleave(torch.tensor(lengths))  # (S,)
    visual = ids == IMAGE
    return Pack(
        ids=ids.masked_fill(visual, 0),
        visual=visual.nonzero().flatten(),
        positions=positions[None],
        predict=learned - 1,
        targets=labels[learned],
        owner=owner[learned],
        views=torch.cat([d.views for d in documents]),
        layouts=sum((d.layouts for d in documents), ()),
        lengths=tuple(lengths),
        sources=tuple(d.source for d in documents),
    )


def count_tokens(batch: list[Document] | Pack) -> dict[str, int]:
    """Positions and supervised tokens of a batch or of one pack."""
    docs = [batch] if isinstance(batch, Pack) else batch
    return {"total": sum(len(d.ids) for d in docs), "loss_generating": sum(d.learned for d in docs)}


def split(documents: Sequence[Document], budget: int) -> list[list[Document]]:
    """First-fit decreasing: as few packs of at most `budget` positions as it finds.

    The longest document comes first, and each goes into the first pack that has space for it. A
    document longer than the budget gets a pack of its own.
    """
    packs: list[list[Document]] = []
    space: list[int] = []  # positions left in each pack
    for document in sorted(documents, key=lambda d: len(d.ids), reverse=True):
        length = len(document.ids)
        fits = [i for i, left in enumerate(space) if length <= left]
        if not fits:
            fits = [len(packs)]
            packs.append([])
            space.append(budget)
        packs[fits[0]].append(document)
        space[fits[0]] -= length
    return packs
