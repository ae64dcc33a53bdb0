"""Prompts: a conversation -> token ids, and which of them are learned.

The text of a template is exact to the character. Labels come from where each token lies in the
text, never from tokenising twice: a token is learned when it overlaps an answer or its end of
turn. What a user types is tokenised with special tokens switched off, so it always stays text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE, IGNORE = -200, -100  # an image's place among the ids; a label that is not learned
PLACEHOLDER = "<image>"
MASKS = ("answers", "released")


@dataclass(frozen=True)
class Turn:
    """One turn; `text` with one PLACEHOLDER for each image, in order of appearance."""

    role: str  # "user" or "assistant"
    text: str
    images: int = 0  # how many placeholders stand for images; any further one is plain text


@dataclass(frozen=True)
class Template:
    """A chat format: the text around the turns; `end` closes an answer and is learned with it."""

    start: str
    user: tuple[str, str]
    assistant: str
    end: str
    after: str = ""
    images_only: bool = False  # stage 1: the user's words are dropped
    specials: tuple[str, ...] = ()


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES = {
    "plain": Template("", ("", ""), "", "\n", images_only=True),
    "qwen_1_5": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        ("<|im_start|>user\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
        specials=("<|im_start|>", "<|im_end|>"),
    ),
    "vicuna_v1": Template(
        "<s>" + VICUNA, ("USER: ", " "), "ASSISTANT: ", "</s>", specials=("<s>", "</s>")
    ),
}


def read_turns(conversations: Sequence[dict], images: int) -> list[Turn]:
    """A LLaVA record's `conversations` -> turns; raises ValueError for anything malformed.

    As in the released code, a turn's only `<image>` moves to the front, followed by a newline.
    """
    if not isinstance(conversations, (list, tuple)) or not conversations:
        told = f"conversations: {conversations!r:.40}"
        raise ValueError(f"{told}; expected turns from human and gpt")
    turns: list[Turn] = []
    for i, message in enumerate(conversations):
        expected, role = (("human", "user"), ("gpt", "assistant"))[i % 2]
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise ValueError(f"turn {i} is {message!r:.80}; expected a from and a text value")
        if message.get("from") != expected:
            raise ValueError(f"turn {i} is from {message.get('from')!r}; expected {expected!r}")
        text = message["value"].strip()
        count = text.count(PLACEHOLDER) if role == "user" else 0
        if count == 1:
            text = f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()
        turns.append(Turn(role, text, count))
    found = sum(turn.images for turn in turns)
    if found != images:
        raise ValueError(f"{found} {PLACEHOLDER} in the conversation for {images} images")
    return turns


def _pieces(turns: Sequence[Turn], template: Template, answer: bool) -> Iterator[tuple]:
    """Yield (text, is it learned?, is it markup: special tokens, PLACEHOLDER for an image?)."""
    yield template.start, False, True
    head = template.assistant.rstrip(" ")  # its space begins the answer's first token: learned
    for turn in turns:
        if turn.role == "assistant":
            yield head, False, True
            yield template.assistant[len(head) :] + turn.text, True, False
            yield template.end, True, True
            yield template.after, False, True
            continue
        yield template.user[0], False, True
        words = turn.text if not template.images_only else PLACEHOLDER * turn.images
        *before, last = words.split(PLACEHOLDER, turn.images)
        for text in before:
            yield text, False, False
            yield PLACEHOLDER, False, True
        yield last, False, False
        yield template.user[1], False, True
    if answer:
        yield head, False, True


def _runs(pieces: Iterable[tuple], specials: Sequence[str]) -> Iterator[tuple]:
    """Merge the text between special tokens and images.

    Yield (text, learned? of each character, False), or (token or PLACEHOLDER, learned?, True).
    """
    pattern = "(" + "|".join(map(re.escape, specials)) + ")"
    text, learned = "", []
    for piece, learn, markup in pieces:
        for part in re.split(pattern, piece) if markup else [piece]:
            if markup and part in specials:
                yield text, learned, False
                yield part, [learn], True
                text, learned = "", []
            else:
                text, learned = text + part, learned + [learn] * len(part)
    yield text, learned, False


def encode(
    tokenizer: Any,
    turns: Sequence[Turn],
    template: str,
    label_mask: str = "answers",
    answer: bool = False,
) -> tuple[list[int], list[int]]:
    """Turns -> ids and labels of equal length; each image is one IMAGE id.

    `answer` ends the ids where an answer begins, for generation. Raises ValueError when the
    tokenizer lacks a special token of the template.
    """
    form = TEMPLATES[template]
    missing = [s for s in form.specials if s not in tokenizer.all_special_tokens]
    if missing:
        raise ValueError(f"template {template} needs {missing}, which this tokenizer has not")
    ids, labels = [], []
    pieces = _pieces(turns, form, answer)
    for text, learned, whole in _runs(pieces, (*form.specials, PLACEHOLDER)):
        if whole:
            image = text == PLACEHOLDER
            ids.append(IMAGE if image else tokenizer.convert_tokens_to_ids(text))
            labels.append(ids[-1] if learned[0] else IGNORE)
        elif text:
            out = tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
            )
            for token, (a, b) in zip(out["input_ids"], out["offset_mapping"], strict=True):
                ids.append(token)
                labels.append(token if any(learned[a : max(b, a + 1)]) else IGNORE)
    return ids, _released(tokenizer, ids, labels, form) if label_mask == "released" else labels


def _released(tokenizer: Any, ids: list[int], labels: list[int], form: Template) -> list[int]:
    """The released code's mask for ChatML: headers of answers, and im_start, im_end and newlines
    everywhere, user turns included. Kept to show what it costs.
    """
    if "<|im_start|>" not in form.specials:
        return labels
    newline, header = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", form.assistant)
    )
    always, out = {*tokenizer.convert_tokens_to_ids(form.specials), *newline}, list(labels)
    for i, token in enumerate(ids):
        if token in always:
            out[i] = token
        if ids[i : i + len(header)] == header:
            out[i : i + len(header)] = header
    return out


def stop_ids(tokenizer: Any, template: str) -> list[int]:
    """The ids that end an answer."""
    form = TEMPLATES[template]
    if form.end in form.specials:
        return [tokenizer.convert_tokens_to_ids(form.end)]
    return tokenizer(form.end, add_special_tokens=False)["input_ids"][-1:]
