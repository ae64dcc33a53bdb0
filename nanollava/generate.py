"""Generation: documents -> answers, greedily, with a KV cache and without padding.

    llava = nanollava.load("runs/nano")
    llava.chat("page.png", "what is the tax?")            # one answer
    for piece in llava.chat(image, question, stream=True): # the same, as it is written

A batch is one pack (1, S): first all prompts, of any length, end to end (the prefill), then one
position per unfinished answer (decoding). Questions about the same images share their keys and
values: in a conversation with the last question, in a batch with each other.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from pathlib import Path

import torch
from PIL.Image import Image

from nanollava.anyres import describe, open_image
from nanollava.checkpoint import load as load_model
from nanollava.extras import why
from nanollava.llm import Cache
from nanollava.model import VLM
from nanollava.prompts import PLACEHOLDER, Turn, stop_ids
from nanollava.recipe import with_visual
from nanollava.sequence import Document, pack

Picture = str | Path | bytes | Image
Prefix = tuple[int, int]  # `Document.prefix`: its length, and a hash of ids, views and layouts


@dataclass
class Seen:
    """What the last answer was made from."""

    document: Document  # the prompt
    features: int  # T of the encoder
    glyphs: tuple[float, ...]  # height in pixels of the text in each image, 0 if unknown
    reused: int = 0  # positions of the prompt that came from the cache
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


@dataclass(frozen=True)
class PrefixCache:
    """The keys and values of documents, from which others with the same images can continue.

    Documents with equal prefixes have the same views, in the same layouts, at the same places. So
    they have equal keys and values as far as their ids agree.
    """

    cache: Cache
    ids: dict[Prefix, list[int]]  # the ids of each document in the cache, in its order

    def fork(self, documents: Sequence[Document], max_new_tokens: int) -> Cache:
        """A cache that holds what is known of each document, with space for the rest of it."""
        places = {prefix: i for i, prefix in enumerate(self.ids)}
        sources, lengths = [], []
        for d in documents:
            sources.append(places.get(d.prefix, 0))
            # The last id is always read: its hidden state gives the first token.
            shared = commonprefix([d.ids[:-1].tolist(), self.ids.get(d.prefix, [])])
            lengths.append(len(shared))
        return self.cache.fork(sources, [len(d.ids) + max_new_tokens for d in documents], lengths)


EMPTY = PrefixCache(Cache([]), {})  # every document starts from nothing


class Assistant:
    """A model that answers."""

    def __init__(self, model: VLM):
        self.model = model.eval()
        self.chat_cache = EMPTY  # the last chat
        self.batch_cache = EMPTY  # the prefixes that the next batch shares with the last one
        self.seen: Seen | None = None  # after a chat

    @torch.inference_mode()
    def stream(
        self, documents: Sequence[Document], max_new_tokens: int, cache: Cache | None = None
    ) -> Iterator[list[int | None]]:
        """Yield each step's token of every document, None for those that have ended.

        A `cache` holds what comes before them, and afterwards what was read and written.
        """
        model = self.model
        device = model.newline.device
        stops = stop_ids(model.tokenizer, model.recipe.template)
        cache = cache or EMPTY.fork(documents, max_new_tokens)
        # 1. Prefill: the first pack has all prompts end to end.
        packed = pack(documents, model.spec.tile).to(device)
        lengths = list(packed.lengths)
        with model.autocast():
            embeds = model.embed(packed)  # (1, S, D)
        for _ in range(max_new_tokens):
            # 2. One forward pass gives the likeliest next token of every unfinished document.
            spans = zip(cache.lengths, lengths, strict=True)
            places = [torch.arange(start, start + n, device=device) for start, n in spans]
            unfinished = [i for i, n in enumerate(lengths) if n]
            ends = torch.tensor(lengths).cumsum(0)[unfinished] - 1
            with model.autocast():
                hidden = model.read(embeds, torch.cat(places)[None], lengths, packed_cache=cache)
                next_ids = model.llm.lm_head(hidden[ends]).argmax(-1)  # hidden is (S, D)
            cache.advance(lengths)
            # 3. A document whose token ends an answer is finished; the others go on.
            drawn = zip(unfinished, next_ids.tolist(), strict=True)
            going = {i: token for i, token in drawn if token not in stops}
            yield [going.get(i) for i in range(len(lengths))]
            if not going:
                return
            # 4. Decode: the next pack has one position for each of them.
            lengths = [int(i in going) for i in range(len(lengths))]
            ids = torch.tensor([[*going.values()]], device=device)
            embeds = model.llm.get_input_embeddings()(ids)  # (1, S, D)

    def prefill_shared_prefixes(
        self, documents: Sequence[Document], next_prefix: Prefix | None
    ) -> PrefixCache:
        """A cache of the documents' prefixes, or an empty one if reading them first saves nothing.

        Equal prefixes are read once, within this batch and from batch to batch.
        """
        by_prefix = {d.prefix: d for d in documents}
        known, self.batch_cache = self.batch_cache, EMPTY
        # 1. Is a prefix shared, with another document of this batch, of the last or of the next?
        shared = len(by_prefix) < len(documents) or by_prefix.keys() & {next_prefix, *known.ids}
        if not shared or not all(d.layouts for d in documents):
            return EMPTY
        # 2. Read the prefixes, unless the last batch has left all of them.
        if not by_prefix.keys() <= known.ids.keys():
            prefixes = [
                replace(d, ids=d.ids[:n], labels=d.labels[:n]) for (n, _), d in by_prefix.items()
            ]
            cache = Cache([len(d.ids) for d in prefixes])
            next(self.stream(prefixes, 1, cache))  # its first step fills the cache
            known = PrefixCache(cache, {d.prefix: d.ids.tolist() for d in prefixes})
        # 3. Keep them only if the next batch needs one: they take much memory.
        if next_prefix in known.ids:
            self.batch_cache = known
        return known

    def answer(
        self, documents: Sequence[Document], max_new_tokens: int, next_prefix: Prefix | None = None
    ) -> list[tuple[str, bool]]:
        """Answers to a batch of prompts; True marks one that `max_new_tokens` cut off.

        `next_prefix` is the prefix of the next batch's first document, if it is known.
        """
        known = self.prefill_shared_prefixes(documents, next_prefix)
        cache = known.fork(documents, max_new_tokens)
        rests = [d.suffix(n) for d, n in zip(documents, cache.lengths, strict=True)]
        steps = list(self.stream(rests, max_new_tokens, cache))
        written = [[x for x in column if x is not None] for column in zip(*steps, strict=True)]
        texts = self.model.tokenizer.batch_decode(written, skip_special_tokens=True)
        cut = [len(ids) == max_new_tokens for ids in written]
        return list(zip(texts, cut, strict=True))

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

        `visual` replaces visual keys of the recipe, e.g. max_grid="3x3", max_visual_tokens="10T".
        Afterwards `self.seen` holds the grid, tokens and times. Raises ValueError for an image
        that cannot be read and for a setting that cannot work.
        """
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        pictures = [open_image(image) for image in images]
        changes = {key: value for key, value in visual.items() if value is not None}
        write = self.model.writer(with_visual(self.model.recipe, changes).visual)
        turns = turns_of(history or [], text, len(pictures))
        document = write(turns, pictures, name="chat", answer=True)
        glyphs = tuple(float(picture.info.get("glyph_px", 0)) for picture in pictures)
        pieces = self._speak(Seen(document, self.model.spec.side**2, glyphs), max_new_tokens)
        return pieces if stream else "".join(pieces)

    def _speak(self, seen: Seen, max_new_tokens: int) -> Iterator[str]:
        """Yield one answer in pieces; keep its keys and values for the next question."""
        start = time.perf_counter()
        document = seen.document
        # 1. Continue the last chat, if it was about the same images; else forget it at once.
        if document.prefix not in self.chat_cache.ids:
            self.chat_cache = EMPTY
        cache = self.chat_cache.fork([document], max_new_tokens)
        # 2. Decode. A piece never ends inside a character, unless the answer does.
        seen.reused = cache.lengths[0]
        self.seen = seen
        said = text = ""
        for (token,) in self.stream([document.suffix(seen.reused)], max_new_tokens, cache):
            seen.first = seen.first or time.perf_counter() - start
            if token is not None:
                seen.written.append(token)
            text = self.model.tokenizer.decode(seen.written, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text
        yield text[len(said) :]
        seen.seconds = time.perf_counter() - start
        # 3. Keep what the cache holds. The last token of an answer that was cut off is not in it.
        ids = [*document.ids.tolist(), *seen.written]
        self.chat_cache = PrefixCache(cache, {document.prefix: ids[: cache.lengths[0]]})

    def why(self) -> Image:
        """A picture of where the last answer looked: base view and tiles of each image."""
        if self.seen is None:
            raise ValueError("why() explains the last answer, but there is none yet: chat first")
        return why.look(self.model, self.seen.document, self.seen.written)


def turns_of(history: Sequence[tuple[str, str]], text: str, images: int) -> list[Turn]:
    """The turns of (question, answer) pairs and a last question; images belong to the first."""
    turns = []
    for pair in history:
        match pair:
            case [str(question), str(answer)]:
                turns += [Turn("user", question), Turn("assistant", answer)]
            case _:
                raise ValueError(f"history has {pair!r:.80}. Give (question, answer) pairs.")
    turns.append(Turn("user", text))
    turns[0] = Turn("user", f"{PLACEHOLDER}\n" * images + turns[0].text, images)
    return turns


def load(run: str | Path, device: str = "") -> Assistant:
    """An assistant from a run folder, one of its stages or a LlavaOnevision folder.

    Under a launcher each process takes the GPU of its number.
    """
    if torch.cuda.is_available():
        device = device or "cuda"
        if "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Assistant(load_model(run, device or "cpu"))
