"""Generation: documents -> answers, greedily, with a KV cache and without padding.

    llava = nanollava.load("runs/nano")
    llava.chat("page.png", "what is the tax?")            # one answer
    for piece in llava.chat(image, question, stream=True): # the same, as it is written

A batch is one packed row: prompts of any length first, then one position per unfinished answer.
A second question on the same images reuses the keys and values that the first one left, and
questions of a batch on the same images read them once.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from nanollava.anyres import describe, open_image
from nanollava.checkpoint import load as load_model
from nanollava.extras import why
from nanollava.llm import Cache
from nanollava.model import VLM
from nanollava.prompts import PLACEHOLDER, Turn, stop_ids
from nanollava.recipe import with_visual
from nanollava.sequence import Document, pack

Picture = str | Path | bytes | Image


@dataclass
class Seen:
    """What the last answer was made from."""

    document: Document  # the prompt
    features: int  # T of the encoder
    glyphs: tuple[float, ...]  # pixels of the text in each image where known, else 0
    reused: int  # positions of the prompt that were taken from the cache
    written: list[int] = field(default_factory=list)  # the answer's ids
    first: float = 0.0  # seconds to the first token
    seconds: float = 0.0

    def describe(self) -> str:
        """What the model saw, two lines per image, and how fast it answered."""
        pairs = zip(self.document.layouts, self.glyphs, strict=True)
        lines = [describe(lay, self.features, glyph) for lay, glyph in pairs]
        lines.append(
            f"prompt {len(self.document.ids)} positions, {self.reused} reused; first token "
            f"{self.first:.3f} s, {len(self.written)} tokens in {self.seconds:.3f} s"
        )
        return "\n".join(lines)


class Assistant:
    """A model that answers."""

    def __init__(self, model: VLM):
        self.model = model.eval()
        self.memory = Cache([]), [], (0, 0)  # of the last conversation: what its ids left, its head
        self.heads: tuple[dict, Cache | None] = {}, None  # that the next documents share
        self.seen: Seen | None = None  # after a chat

    @torch.inference_mode()
    def stream(
        self, documents: Sequence[Document], room: int, cache: Cache | None = None
    ) -> Iterator[list[int | None]]:
        """Yield each step's token of every document, None for those that have ended.

        A `cache` holds what comes before them.
        """
        model = self.model
        stops = stop_ids(model.tokenizer, model.recipe.template)
        row = pack(documents, model.spec.tile).to(model.newline.device)
        lengths, cache = list(row.lengths), cache or Cache([len(d.ids) + room for d in documents])
        before = torch.tensor(cache.used).repeat_interleave(torch.tensor(lengths))
        positions = row.positions + before.to(row.positions.device)
        with model.autocast():
            embeds = model.embed(row)  # (1, S, D)
        for _ in range(room):
            ids = self._next(embeds, positions, lengths, cache)
            found = iter(ids.tolist())
            out = [next(found) if n else None for n in lengths]
            out = [None if token in stops else token for token in out]
            yield out
            lengths = [int(token is not None) for token in out]
            if not any(lengths):
                return
            alive = [pair for pair in zip(out, cache.used, strict=True) if pair[0] is not None]
            tokens, positions = torch.tensor(alive, device=ids.device).T[:, None]
            embeds = model.llm.get_input_embeddings()(tokens)  # (1, alive, D)

    def _next(self, embeds: Tensor, positions: Tensor, lengths: list[int], cache: Cache) -> Tensor:
        """One pass over a row; the likeliest next id of every document with positions in it."""
        with self.model.autocast():
            hidden = self.model.read(embeds, positions, lengths, packed_cache=cache)
            ends = torch.tensor([n for n in lengths if n], device=hidden.device).cumsum(0) - 1
            ids = self.model.llm.lm_head(hidden[ends]).argmax(-1)
        cache.advance(lengths)
        return ids

    @torch.inference_mode()
    def _read_heads(
        self, documents: Sequence[Document], room: int, then: tuple[int, int] | None
    ) -> Cache | None:
        """A cache of what documents share with each other, with those before or the one to come:
        their images and the words before them, read once. None where nothing is shared.
        """
        heads, (places, cache) = {d.prefix: d for d in documents}, self.heads
        shared = len(heads) < len(documents) or heads.keys() & {then, *places}
        if not shared or not all(d.layouts for d in documents):
            self.heads = {}, None
            return None
        if not heads.keys() <= places.keys():
            parts = [replace(d, ids=d.ids[:n], labels=d.labels[:n]) for (n, _), d in heads.items()]
            row = pack(parts, self.model.spec.tile).to(self.model.newline.device)
            places, cache = {head: i for i, head in enumerate(heads)}, Cache(row.lengths)
            with self.model.autocast():
                self._next(self.model.embed(row), row.positions, list(row.lengths), cache)
        self.heads = (places, cache) if then in places else ({}, None)
        of, most = [places[d.prefix] for d in documents], [len(d.ids) + room for d in documents]
        return cache.fork(of, most, [d.prefix[0] for d in documents])

    def answer(
        self, documents: Sequence[Document], room: int, then: tuple[int, int] | None = None
    ) -> list[tuple[str, bool]]:
        """Answers to a batch of prompts, each of at most `room` tokens; True: it was cut there.

        `then`: the head of the next document, if it is known.
        """
        written: list[list[int]] = [[] for _ in documents]
        if cache := self._read_heads(documents, room, then):
            documents = [d.suffix(n) for d, n in zip(documents, cache.used, strict=True)]
        for step in self.stream(documents, room, cache):
            for ids, token in zip(written, step, strict=True):
                if token is not None:
                    ids.append(token)
        texts = self.model.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [(text, len(ids) == room) for text, ids in zip(texts, written, strict=True)]

    def chat(
        self,
        images: Picture | Sequence[Picture] | None,
        text: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_new_tokens: int = 128,
        stream: bool = False,
        **visual: str | int | bool | None,
    ) -> str | Iterator[str]:
        """Answer a question about images, after the (question, answer) pairs of `history`.

        `visual` replaces keys of the recipe's, e.g. max_grid="3x3", max_visual_tokens="10T".
        `self.seen` then tells the grid, tokens and times. Raises ValueError for an unreadable image
        or an impossible setting.
        """
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        pictures = [open_image(image) for image in images]
        changes = {key: value for key, value in visual.items() if value is not None}
        keys = with_visual(self.model.recipe, changes).visual
        for pair in history or []:
            if not isinstance(pair, (tuple, list)) or [type(x) for x in pair] != [str, str]:
                raise ValueError(f"history has {pair!r:.80}; expected (question, answer) pairs")
        first, *further = (words for pair in [*(history or []), (text,)] for words in pair)
        n = len(pictures)
        turns = [Turn("user", f"{PLACEHOLDER}\n" * n + first, n)]
        turns += [Turn(("assistant", "user")[i % 2], words) for i, words in enumerate(further)]
        document = self.model.writer(keys)(turns, pictures, name="chat", answer=True)
        glyphs = tuple(float(x.info.get("glyph_px", 0)) for x in pictures)
        pieces = self._speak(document, glyphs, max_new_tokens)
        return pieces if stream else "".join(pieces)

    def _speak(self, document: Document, glyphs: tuple[float, ...], room: int) -> Iterator[str]:
        """Pieces of one answer; keeps its keys and values for the next question."""
        ids, start = document.ids.tolist(), time.perf_counter()
        if document.prefix != self.memory[2]:  # none of it can be used again
            self.memory = Cache([]), [], document.prefix
        skip = len(commonprefix([ids[:-1], self.memory[1]]))
        cache = self.memory[0].fork([0], [len(ids) + room], [skip])
        self.seen = Seen(document, self.model.spec.side**2, glyphs, skip)
        written, said = self.seen.written, ""
        for (token,) in self.stream([document.suffix(skip)], room, cache):
            self.seen.first = self.seen.first or time.perf_counter() - start
            written += [] if token is None else [token]
            text = self.model.tokenizer.decode(written, skip_special_tokens=True)
            if token is None or len(written) == room or not text.endswith("\ufffd"):
                yield text[len(said) :]  # not half of a character, unless the answer ends there
                said = text
        self.seen.seconds = time.perf_counter() - start
        self.memory = cache, (ids + written)[: cache.used[0]], document.prefix

    def why(self) -> Image:
        """A picture of where the last answer looked: base view and tiles of each image."""
        if self.seen is None:
            raise ValueError("nothing has been asked yet: chat first")
        return why.look(self.model, self.seen.document, self.seen.written)


def load(run: str | Path, device: str = "") -> Assistant:
    """A run folder, one of its stages or a LlavaOnevision folder, ready to chat.

    Each of a launcher's processes takes the GPU of its number.
    """
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Assistant(load_model(run, device))
