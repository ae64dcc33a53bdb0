r"""Prompts: a conversation -> token ids, and which of them are supervised.

    <|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n
                                                                         ------------------
The model learns to write only the underlined part: each answer and the end of its turn.

The text of a template is exact to the character. Whether a token is supervised follows from where
it lies in the text; nothing is tokenised twice. A token that overlaps an answer or its end of turn
is supervised. What a user types is tokenised with special tokens switched off, so it stays text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IMAGE = -200  # stands for an image among the ids, until its visual tokens take its place
IGNORE = -100  # the label of a token that is not supervised: cross-entropy skips it
PLACEHOLDER = "<image>"
MASKS = ("answers", "released")


@dataclass(frozen=True)
class Turn:
    """One turn; its text has one PLACEHOLDER for each image, in order of appearance."""

    role: str  # "user" or "assistant"
    text: str
    images: int = 0  # so many placeholders stand for images; any further one is plain text


@dataclass(frozen=True)
class Template:
    """A chat format: the text around the turns."""

    start: str
    user: tuple[str, str]  # before and after a user's words
    assistant: str  # before an answer
    end: str  # closes an answer and is supervised with it
    after: str = ""  # follows `end` and is not supervised
    images_only: bool = False  # stage 1: the user's words are dropped
    specials: tuple[str, ...] = ()  # the special tokens in these texts


VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES = {
    # Stage 1: images and their caption, with nothing around.
    "plain": Template("", ("", ""), "", "\n", images_only=True),
    # ChatML, with the system prompt that Qwen1.5 was trained with.
    "qwen_1_5": Template(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        ("<|im_start|>user\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
        specials=("<|im_start|>", "<|im_end|>"),
    ),
    # Vicuna 1.1: </s> follows an answer directly, and the next turn follows </s>.
    "vicuna_v1": Template(VICUNA, ("USER: ", " "), "ASSISTANT: ", "</s>", specials=("<s>", "</s>")),
}


def read_turns(conversations: Sequence[dict], images: int) -> list[Turn]:
    """A LLaVA record's `conversations` -> turns; raises ValueError for anything malformed."""
    if not isinstance(conversations, (list, tuple)) or not conversations:
        raise ValueError(f"conversations: {conversations!r:.40}; expected turns from human and gpt")
    turns = [read_turn(message, i) for i, message in enumerate(conversations)]
    placeholders = sum(turn.images for turn in turns)
    if placeholders != images:
        raise ValueError(f"{placeholders} {PLACEHOLDER} for {images} images; write one for each")
    return turns


def read_turn(message: dict, i: int) -> Turn:
    """Turn number i of a LLaVA record.

    As in the released code, a turn's only `<image>` moves to the front, followed by a newline.
    """
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise ValueError(f"turn {i} is {message!r:.80}; expected `from` and a text `value`")
    # LLaVA's files say human and gpt, in turn; chat templates say user and assistant.
    speaker, role = ("gpt", "assistant") if i % 2 else ("human", "user")
    if message.get("from") != speaker:
        raise ValueError(f"turn {i} is from {message.get('from')!r}; expected {speaker!r}")
    text = message["value"].strip()
    images = text.count(PLACEHOLDER) if role == "user" else 0  # in an answer it is plain text
    if images == 1:
        words = text.replace(PLACEHOLDER, "").strip()
        text = f"{PLACEHOLDER}\n{words}".strip()
    return Turn(role, text, images)


class Prompt:
    """Ids and labels under construction.

    Text is collected up to the next special token or image and then tokenised in one go, because
    a token may reach across the border between the template's text and a person's.
    """

    def __init__(self, tokenizer: Any, specials: Sequence[str]):
        self.tokenizer = tokenizer
        self.specials = specials
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.text = ""  # collected, not yet tokenised
        self.mask: list[bool] = []  # is it supervised? one entry per character of the text

    def add_text(self, text: str, supervised: bool = False) -> None:
        """Text in which no special token counts as one: what people and models wrote."""
        self.text += text
        self.mask += [supervised] * len(text)

    def add_markup(self, text: str, supervised: bool = False) -> None:
        """Text of the template, with its special tokens."""
        special = "|".join(map(re.escape, self.specials)) or "(?!)"  # (?!) matches nothing
        for part in re.split(f"({special})", text):
            if part in self.specials:
                self.add_token(self.tokenizer.convert_tokens_to_ids(part), supervised)
            else:
                self.add_text(part, supervised)

    def add_token(self, token: int, supervised: bool = False) -> None:
        """A special token, or IMAGE."""
        self.tokenise()
        self.ids.append(token)
        self.labels.append(token if supervised else IGNORE)

    def tokenise(self) -> None:
        """Turn the collected text into ids and labels."""
        text, mask = self.text, self.mask
        self.text, self.mask = "", []
        if not text:
            return
        tokens = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            # A token without characters of its own counts as the next character does.
            supervised = any(mask[start : max(end, start + 1)])
            self.ids.append(token)
            self.labels.append(token if supervised else IGNORE)


def encode(
    tokenizer: Any,
    turns: Sequence[Turn],
    template: str,
    label_mask: str = "answers",
    answer: bool = False,
) -> tuple[list[int], list[int]]:
    """Turns -> ids and labels of equal length; each image is one IMAGE id.

    With `answer`, the ids end where an answer begins, for generation. Raises ValueError when the
    tokenizer lacks a special token of the template.
    """
    form = TEMPLATES[template]
    # A tokenizer that lacks a special token would spell it in characters, and answers never end.
    missing = [token for token in form.specials if token not in tokenizer.all_special_tokens]
    if missing:
        raise ValueError(f"template {template} needs {missing}; choose the template of this LLM")
    header = form.assistant.rstrip(" ")
    space = form.assistant[len(header) :]  # begins the answer's first token, so it is supervised
    prompt = Prompt(tokenizer, form.specials)
    prompt.add_markup(form.start)
    for turn in turns:
        # An answer and the end of its turn are supervised; its header and what follows are not.
        if turn.role == "assistant":
            prompt.add_markup(header)
            prompt.add_text(space + turn.text, supervised=True)
            prompt.add_markup(form.end, supervised=True)
            prompt.add_markup(form.after)
            continue
        # A question has one IMAGE id for each image, in the place of its placeholder.
        text = PLACEHOLDER * turn.images if form.images_only else turn.text
        first, *others = text.split(PLACEHOLDER, turn.images)
        prompt.add_markup(form.user[0])
        prompt.add_text(first)
        for words in others:
            prompt.add_token(IMAGE)
            prompt.add_text(words)
        prompt.add_markup(form.user[1])
    if answer:  # the model continues from here
        prompt.add_markup(header)
    prompt.tokenise()
    labels = released_labels(prompt, form) if label_mask == "released" else prompt.labels
    return prompt.ids, labels


def released_labels(prompt: Prompt, template: Template) -> list[int]:
    """The labels of the released code for ChatML, kept to show what they cost.

    It supervises the header of each answer too, and every im_start, im_end and newline, those of
    user turns included.
    """
    labels = list(prompt.labels)
    if "<|im_start|>" not in template.specials:
        return labels
    # The released code compares ids, not places in the text: a newline that a user typed counts.
    newline = prompt.tokenizer("\n", add_special_tokens=False)["input_ids"]
    header = prompt.tokenizer(template.assistant, add_special_tokens=False)["input_ids"]
    always = {*prompt.tokenizer.convert_tokens_to_ids(template.specials), *newline}
    for i, token in enumerate(prompt.ids):
        if token in always:
            labels[i] = token
        if prompt.ids[i : i + len(header)] == header:
            labels[i : i + len(header)] = header
    return labels


def stop_ids(tokenizer: Any, template: str) -> list[int]:
    """The id that ends an answer, as a list."""
    return tokenizer(TEMPLATES[template].end, add_special_tokens=False)["input_ids"][-1:]
