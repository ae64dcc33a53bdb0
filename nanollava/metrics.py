"""Metrics of the nano suite: pure functions (prediction, reference) -> score in 0..1.

Each carries the definition of the benchmark that its task stands for (lmms-eval's, May 2024):
ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), F1 of "yes" (POPE), an exact letter (AI2D,
ScienceQA), an edit score (SynthDOG) and, for captions, the share of facts that are named.
"""

import re
from collections.abc import Callable

import numpy as np
from rapidfuzz.distance import Levenshtein


def anls(prediction: str, reference: str) -> float:
    """1 - edit distance / longer length, and 0 below one half; case and spaces do not count."""
    p, r = (" ".join(x.lower().split()) for x in (prediction, reference))
    longer = max(len(prediction), len(reference))
    score = 1 - Levenshtein.distance(p, r) / longer if longer else 1.0
    return score if score >= 0.5 else 0.0


def relaxed(prediction: str, reference: str) -> float:
    """Numbers within 5% of a reference that is not 0, anything else equal but for case."""
    try:
        p, r = (
            float(x.rstrip("%")) / 100 if x.endswith("%") else float(x)
            for x in (prediction, reference)
        )
    except ValueError:
        r = 0.0
    return float(abs(p - r) / abs(r) <= 0.05 if r else prediction.lower() == reference.lower())


def edit(prediction: str, reference: str) -> float:
    """The closed form of SynthDOG's tree edit score: max(0, 1 - (1 + edits) / (length + 1))."""
    edits = Levenshtein.distance(prediction.lower().strip(), reference.strip())
    return max(0.0, 1 - (1 + edits) / (len(reference.strip()) + 1))


def facts(prediction: str, reference: str) -> float:
    """The share of the reference's facts (one a line) that the prediction contains."""
    lines = [line.strip().lower() for line in reference.splitlines() if line.strip()]
    said = prediction.lower()
    found = [re.search(rf"(?<!\w){re.escape(line)}(?!\w)", said) for line in lines]
    return sum(map(bool, found)) / len(lines) if lines else 0.0


def exact(prediction: str, reference: str) -> float:
    """Equal but for case and surrounding spaces."""
    return float(prediction.strip().lower() == reference.strip().lower())


def said_yes(prediction: str, reference: str) -> tuple[float, float]:
    """(the prediction is yes, the reference is yes); neither yes nor no counts as no."""
    return exact(prediction, "yes"), exact(reference, "yes")


def last_word(score: Callable[[str, str], float]) -> Callable[[str, str], float]:
    """Nano answers restate the key ("tax 305"); only the value, the last word, is scored."""
    return lambda prediction, reference: score((prediction.split() or [""])[-1], reference)


def f1(rows: np.ndarray) -> float:
    """POPE's F1 of "yes" from rows of `said_yes`: 2 hits / (said + true)."""
    hits = (rows[:, 0] * rows[:, 1]).sum()
    return 2 * hits / rows.sum() if hits else 0.0


METRICS = {  # name: (score of one answer, how a task's scores are summed up)
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
