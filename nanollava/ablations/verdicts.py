"""Verdicts: what the measured rows of an ablation say about the blog's sentences.

    claims:
      more grids help InfoVQA:
        says: "increasing #grids can enhance performance on tasks that ..."
        section: "2"
        metric: nano-info       # a task, several (their mean), loss; train, infer: log of seconds;
                                # flops: log of those of the last stage
        contrast: {"6x6, (4+1)T": 1, "2x2, (4+1)T": -1}  # rows and weights
        margin: 0.02            # the smallest difference that matters
        holds: above            # if the contrast is above 0; or at most, within, beyond the margin
        late: ""                # what was known when it was written, if anything was

A claim's contrast is the weighted sum of its rows' values, taken within each seed. The evidence is
a paired t interval over seeds; a percentile bootstrap over so few seeds would be too narrow. Next
to it stands a bootstrap over the questions: what other questions might have said about the same
models. Over the claims of a table, p values are adjusted by Holm's method.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log, nan
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from nanollava.ablations.rows import Claim, read_ablation
from nanollava.evaluate import question_scores as scores
from nanollava.metrics import METRICS

SAME, OPPOSITE, OPEN, WAITS = WORDS = (
    "same direction",
    "opposite",
    "not resolved",
    "waits for seeds",
)
HOLDS = ("above", "at_most", "within", "beyond")
TESTED = {"above", "beyond"}  # tested against 0, with Holm's p; the others go by their interval
LEAST = 3  # seeds that a verdict needs
RESAMPLES = 500  # of the questions


@dataclass(frozen=True)
class Verdict:
    """What was measured about a claim."""

    claim: Claim
    seeds: tuple[int, ...]
    mean: float
    low: float  # 95% interval of a paired t over seeds
    high: float
    p: float  # two-sided; after `judge`, Holm's
    questions: tuple[float, float]  # 95% interval of a bootstrap over questions
    word: str


def read_claims(file: Path) -> list[Claim]:
    """The claims of an ablation file; raises ValueError for one that cannot be measured."""
    ablation = read_ablation(file)
    claims = []
    for name, claim in ablation.claims.items():
        metric = [claim.metric] if isinstance(claim.metric, str) else claim.metric
        claim = replace(claim, name=name, metric=tuple(metric))
        where = f"{file}: claim {name!r}"
        unknown = sorted({*claim.contrast} - {*ablation.rows})
        if unknown:
            raise ValueError(f"{where}: no rows {unknown}; the file has {[*ablation.rows]}")
        # Otherwise the contrast would not be 0 where all rows are equal.
        if abs(sum(claim.contrast.values())) > 1e-9:
            raise ValueError(f"{where}: the weights {claim.contrast} do not sum to 0")
        if not claim.margin > 0:
            raise ValueError(f"{where}: margin {claim.margin}; expected a number above 0")
        if claim.holds not in HOLDS:
            raise ValueError(f"{where}: holds {claim.holds!r}; expected one of {HOLDS}")
        claims.append(claim)
    return claims


def latest(lines: Sequence[dict]) -> dict[tuple[str, int], dict]:
    """(row, seed) -> its last result line."""
    return {(line["row"], line["seed"]): line for line in lines}


def seconds(line: dict) -> float | None:
    """CPU seconds of the last stage: rows may share the stages before it. None if resumed."""
    return [*line["cpu_seconds"].values()][-1]


def asking(line: dict) -> float:
    """CPU seconds of the questions of all tasks."""
    return sum(task["cpu_seconds"] for task in line["tasks"].values())


def value(line: dict, metric: str) -> float:
    """A result line's score in a task, its mean loss, or its log of seconds or FLOPs."""
    if metric == "loss":
        last_tenth = max(1, len(line["losses"]) // 10)
        return float(np.mean(line["losses"][-last_tenth:]))
    if metric == "flops":
        return log(line["flops"]) if "flops" in line else nan
    if metric == "train":
        return log(seconds(line)) if seconds(line) else nan
    if metric == "infer":
        return log(asking(line))
    return line["tasks"][metric]["score"]


def interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, 95% t interval (low, high) and two-sided p against 0 of one value per seed."""
    x = np.asarray(values, float)
    if len(x) < 2:  # one seed has no spread: it could be anything
        mean = float(x.mean()) if len(x) else nan
        return mean, -inf, inf, 1.0
    if np.ptp(x) == 0:  # equal values are a tie: no spread, hence no evidence
        tie = float(x[0])
        return tie, tie, tie, 1.0
    test = ttest_1samp(x, 0)
    low, high = test.confidence_interval()
    return float(x.mean()), float(low), float(high), float(test.pvalue)


def resample(task: dict, drawn: np.ndarray) -> np.ndarray:
    """A task's score on each set of questions `drawn` (RESAMPLES, n) -> (RESAMPLES,)."""
    samples = scores(task)[drawn]  # (RESAMPLES, n) or (RESAMPLES, n, 2)
    _, total = METRICS[task["metric"]]
    return samples.mean(1) if total is np.mean else np.array([total(x) for x in samples])


def questions(lines: dict, claim: Claim, seeds: Sequence[int]) -> tuple[float, float]:
    """95% percentile bootstrap over questions of a contrast's mean over seeds and metrics."""
    if claim.unit != "points" or not seeds:
        return nan, nan
    # Each seed and metric has its own questions, so that each gets its own draws.
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for seed in seeds:
        for metric in claim.metric:
            tasks = [lines[row, seed]["tasks"][metric] for row in claim.contrast]
            n = tasks[0]["n"]
            drawn = rng.integers(n, size=(RESAMPLES, n))  # the same questions for all rows
            for task, weight in zip(tasks, claim.contrast.values(), strict=True):
                totals = weight * resample(task, drawn)
                means += totals / len(seeds) / len(claim.metric)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def contrast_of(claim: Claim, lines: dict, seed: int) -> float:
    """A claim's contrast in one seed: over its rows and the mean of its metrics."""
    total = 0.0
    for row, weight in claim.contrast.items():
        for metric in claim.metric:
            total += weight * value(lines[row, seed], metric)
    return total / len(claim.metric)


def measure(claim: Claim, lines: Sequence[dict]) -> Verdict:
    """A claim against the result lines of its file; its word comes from `judge`."""
    known = latest(lines)
    differences = {}
    # Only a seed that has all rows of the contrast can be compared within itself.
    for seed in sorted({seed for _, seed in known}):
        if all((row, seed) in known for row in claim.contrast):
            contrast = contrast_of(claim, known, seed)
            if np.isfinite(contrast):  # the seconds of a stage that was resumed are not
                differences[seed] = contrast
    seeds = tuple(differences)
    mean, low, high, p = interval([*differences.values()])
    return Verdict(claim, seeds, mean, low, high, p, questions(known, claim, seeds), WAITS)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the i-th smallest of m, from i = 0, times m - i, but never below
    the one before it.
    """
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for i, k in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - i) * ps[k]))
        adjusted[k] = largest
    return adjusted


def word(v: Verdict) -> str:
    """Same direction, opposite or not resolved; p is already adjusted for the number of claims.

    `above` holds where the difference is not 0 by chance and is large enough to matter, `beyond`
    does so on either side. `at_most` and `within` hold where the whole interval lies below the
    margin, or between both margins: failing to find a difference is not evidence of its absence.
    """
    if len(v.seeds) < LEAST:
        return WAITS
    margin = v.claim.margin
    # For `above` and `beyond` a test against 0, for the others where the interval lies.
    shown = v.p < 0.05 and abs(v.mean) >= margin
    inside = -margin < v.low and v.high < margin
    outside = v.low > margin or v.high < -margin
    same, opposite = {
        "above": (shown and v.mean > 0, shown and v.mean < 0),
        "beyond": (shown, inside),
        "at_most": (v.high < margin, v.low > margin),
        "within": (inside, outside),
    }[v.claim.holds]
    if same:
        return SAME
    return OPPOSITE if opposite else OPEN


def judge(measured: Sequence[Verdict]) -> list[Verdict]:
    """All claims of a table: Holm's p over those that are tested against 0, and their words."""
    # `at_most` and `within` are decided by their intervals, so Holm's correction leaves them out.
    adjusted = iter(holm([v.p for v in measured if v.claim.holds in TESTED]))
    judged = []
    for v in measured:
        if v.claim.holds in TESTED:
            v = replace(v, p=next(adjusted))
        judged.append(replace(v, word=word(v)))
    return judged
