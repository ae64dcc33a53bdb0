"""The nano tokenizer: digits, characters, whole words of the nano world; nothing is unknown.

    python recipes/nano/vocabulary.py        # writes recipes/nano/tokenizer/

A word takes its trailing space along ("tax " is one token), so that a value follows its key
directly, on a page and in an answer: "tax 305" is `tax_ 3 0 5`. A digit is always a token of its
own, as in Qwen and Llama. A word that the list lacks falls apart into its bytes, so any text comes
back exactly. The three parts of the ChatML template that never change are one ordinary token
each, which keeps a turn's overhead at 8 tokens. `PAIRS` are 100 tokens for two digits that share
one patch: no text is ever cut into them, only stage 0's patch rasters use them as inputs.
"""

import re
from pathlib import Path

import pages
import world
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = ("system\nYou are a helpful assistant.", "user\n", "assistant\n")
PAIRS = [f"{n:02d}" for n in range(100)]
FOLDER = Path(__file__).with_name("tokenizer")
# A word or a sign with the space behind it; a digit or any other white space alone.
PIECES = r"[A-Za-z]+ ?|\p{N}|[^\sA-Za-z\p{N}] ?|\s"


def texts() -> str:
    """All that the world can say."""
    asked = (text for forms in world.ASK.values() for text in forms)
    more = ["yes no eats with and an moves", *world.HELLO, *pages.WAYS]
    names = [*world.NAMES.values(), *pages.OBJECTS, *pages.PLACES, *pages.KEYS, *pages.TITLES]
    return " ".join([*asked, *names, *world.FOODS, *pages.HAN, *more])


def words() -> list[str]:
    """Every word that the world can say, lower case, sorted."""
    return sorted(set(re.findall("[a-z]+", texts().lower())))


def mapped(text: str) -> str:
    """A token as a byte-level vocabulary spells it."""
    return ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def build() -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it."""
    cases = [case(w) for w in words() for case in (str, str.capitalize, str.upper)]
    signs = [*",.?:;!'\"()-=", *sorted({c for c in texts() if not c.isascii()})]
    spaced = [f"{token} " for token in dict.fromkeys([*cases, *signs, *"ABCD"])]
    whole = [mapped(token) for token in [*cases, *signs, *spaced]]
    pieces = [*sorted(ByteLevel.alphabet()), *whole, *PAIRS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in TEMPLATE])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    build().save_pretrained(FOLDER)
