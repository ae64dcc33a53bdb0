"""Metrics of the nano suite: pure functions (prediction, reference) -> score from 0 to 1.

Each follows the definition of the benchmark that its task stands for (lmms-eval's, May 2024):
ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), F1 of "yes" (POPE), an exact letter (AI2D,
ScienceQA), an edit score (SynthDOG) and, for captions, the share of the facts that are named.
"""

import re
from collections.abc import Callable

import numpy as np
from rapidfuzz.distance import Levenshtein


def anls(prediction: str, reference: str) -> float:
    """1 - edit distance / length of the longer text; below one half it is 0.

    Case and repeated spaces do not count in the distance; the lengths are those as written.
    anls("abcd", "abce") is 0.75, anls("abcde", "abxyz") is 0.
    """
    distance = Levenshtein.distance(normalise(prediction), normalise(reference))
    # At least 1, so that two empty texts are equal: 1 - 0 / 1.
    score = 1 - distance / max(len(prediction), len(reference), 1)
    return score if score >= 0.5 else 0.0  # less than half right is another answer


def normalise(text: str) -> str:
    """Lower case, words separated by single spaces."""
    return " ".join(text.lower().split())


def relaxed(prediction: str, reference: str) -> float:
    """ChartQA: a number may be off by 5% of the reference; other text must be equal but for case.

    relaxed("105", "100") and relaxed("50%", "0.5") are 1. A reference of 0 has no relative error,
    so it is compared as text.
    """
    guess, truth = number(prediction), number(reference)
    if guess is None or not truth:
        return float(prediction.lower() == reference.lower())
    return float(abs(guess - truth) / abs(truth) <= 0.05)


def number(text: str) -> float | None:
    """The value of a text: 12.5 of "12.5", 0.5 of "50%", None of anything else."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def edit(prediction: str, reference: str) -> float:
    """SynthDOG's tree edit score in closed form: max(0, 1 - (1 + edits) / (length + 1)).

    The tree's root costs one edit, so edit("abc", "abc") is 0.75.
    """
    reference = reference.strip()
    edits = Levenshtein.distance(prediction.lower().strip(), reference)
    return max(0.0, 1 - (1 + edits) / (len(reference) + 1))


def facts(prediction: str, reference: str) -> float:
    """The share of the reference's facts, one per line, that the prediction contains as words.

    facts("a page: TAX 305", "tax 305\\nfee 12") is 0.5.
    """
    lines = [line.strip().lower() for line in reference.splitlines() if line.strip()]
    # No letter or digit on either side: "tax 30" is not named by "tax 305".
    named = [re.search(rf"(?<!\w){re.escape(line)}(?!\w)", prediction.lower()) for line in lines]
    return sum(map(bool, named)) / max(len(lines), 1)


def exact(prediction: str, reference: str) -> float:
    """AI2D, ScienceQA: equal but for case and the spaces around."""
    return float(prediction.strip().lower() == reference.strip().lower())


def said_yes(prediction: str, reference: str) -> tuple[float, float]:
    """(the prediction is yes, the reference is yes), for `f1`; any other text counts as no."""
    return exact(prediction, "yes"), exact(reference, "yes")


def f1(pairs: np.ndarray) -> float:
    """POPE's F1 of "yes" from the (n, 2) pairs of `said_yes`: 2 hits / (said + true)."""
    # precision = hits / said and recall = hits / true; their harmonic mean is this.
    hits = (pairs[:, 0] * pairs[:, 1]).sum()
    return 2 * hits / pairs.sum() if hits else 0.0


def last_word(score: Callable[[str, str], float]) -> Callable[[str, str], float]:
    """A metric of the last word: nano answers restate the key ("tax 305"), the value is scored."""
    # An empty prediction has no last word, and the empty text is scored.
    return lambda prediction, reference: score("".join(prediction.split()[-1:]), reference)


# name: (score of one answer, how the scores of a task become one number). F1 is not a mean: its
# score of an answer is a pair.
METRICS = {
    "anls": (anls, np.mean),
    "relaxed": (relaxed, np.mean),
    "exact": (exact, np.mean),
    "edit": (edit, np.mean),
    "facts": (facts, np.mean),
    "f1_yes": (said_yes, f1),
    "nano_anls": (last_word(anls), np.mean),
    "nano_relaxed": (last_word(relaxed), np.mean),
    "nano_exact": (last_word(exact), np.mean),
    "nano_f1_yes": (last_word(said_yes), f1),
}
