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

A claim's contrast is taken within each seed. Evidence is the paired t over seeds: a percentile
bootstrap over as few is too narrow. A bootstrap over the questions stands beside it: what other
questions might have said about these same models. Over the claims of a table, p is Holm's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log, nan
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from nanollava.ablations import rows as rows_of
from nanollava.evaluate import DIGITS
from nanollava.metrics import METRICS

SAME, OPPOSITE, OPEN, WAITS = WORDS = (
    "same direction",
    "opposite",
    "not resolved",
    "waits for seeds",
)
HOLDS = ("above", "at_most", "within", "beyond")
TESTED = {"above", "beyond"}  # against 0, with Holm's p; the others by their interval
UNSCORED = {  # metrics that are no scores in 0..1, and what their differences are told in
    "loss": "nats",
    "train": "log of s",
    "infer": "log of s",
    "flops": "log of FLOPs",
}
LEAST = 3  # seeds of a verdict


@dataclass(frozen=True)
class Claim:
    """One sentence of the blog, and the rows that could show it."""

    name: str
    says: str
    section: str
    metric: tuple[str, ...]
    contrast: dict[str, float]
    margin: float
    holds: str = "above"
    late: str = ""

    @property
    def source(self) -> str:
        """A sentence of the blog in quotation marks, or a table's numbers; and where."""
        says = self.says if re.match(r"T\d|ours:", self.says) else f'"{self.says}"'
        return f"{says} ({self.section})".replace("|", "/")

    @property
    def title(self) -> str:
        """Its name, and what was known when it was written, if anything was."""
        return self.name + (f" (written {self.late})" if self.late else "")

    @property
    def unit(self) -> str:
        """What its differences are told in."""
        return next((UNSCORED[name] for name in self.metric if name in UNSCORED), "points")

    @property
    def factor(self) -> int:
        """From a difference to its unit."""
        return 100 if self.unit == "points" else 1


@dataclass(frozen=True)
class Verdict:
    """What was measured about a claim."""

    claim: Claim
    seeds: tuple[int, ...]
    mean: float
    low: float  # 95% of a paired t over seeds
    high: float
    p: float  # two-sided; Holm's after `judge`
    questions: tuple[float, float]  # 95% of a bootstrap over questions
    word: str


def read_claims(file: Path) -> list[Claim]:
    """The claims of an ablation's file; ValueError for what cannot be measured."""
    tree, found = rows_of.read_ablation(file), []
    for name, keys in tree.claims.items():
        metric = (keys.metric,) if isinstance(keys.metric, str) else tuple(keys.metric)
        claim = Claim(name, **vars(keys) | {"metric": metric})
        if unknown := {*claim.contrast} - {*tree.rows}:
            raise ValueError(f"{file}: claim {name!r}: no rows {sorted(unknown)}")
        if abs(sum(claim.contrast.values())) > 1e-9:
            raise ValueError(f"{file}: claim {name!r}: the weights of its contrast sum to 0")
        if not claim.margin > 0:
            raise ValueError(f"{file}: claim {name!r}: margin {claim.margin}; expected above 0")
        if claim.holds not in HOLDS:
            raise ValueError(f"{file}: claim {name!r}: holds {claim.holds!r}; expected {HOLDS}")
        found.append(claim)
    return found


def latest(lines: Sequence[dict]) -> dict[tuple[str, int], dict]:
    """(row, seed) -> its last measurement."""
    return {(line["row"], line["seed"]): line for line in lines}


def seconds(line: dict) -> float | None:
    """A measurement's CPU seconds of the last stage: the others may be shared."""
    return [*line["cpu_seconds"].values()][-1]


def asking(line: dict) -> float:
    """A measurement's CPU seconds of all tasks' questions."""
    return sum(task["cpu_seconds"] for task in line["tasks"].values())


def value(line: dict, metric: str) -> float:
    """A measurement's score in a task, its last tenth of losses, its log of seconds or FLOPs."""
    if metric == "loss":
        return float(np.mean(line["losses"][-max(1, len(line["losses"]) // 10) :]))
    if metric == "flops":
        return log(line["flops"]) if "flops" in line else nan
    if metric == "train":
        return log(seconds(line)) if seconds(line) else nan
    if metric == "infer":
        return log(asking(line))
    return line["tasks"][metric]["score"]


def interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, 95% t interval and two-sided p against 0 of one value a seed."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else nan, -np.inf, np.inf, 1.0)
    if np.ptp(x) == 0:
        return (float(x[0]), float(x[0]), float(x[0]), 1.0)  # a spread of 0 is a tie, no evidence
    test = ttest_1samp(x, 0)
    low, high = test.confidence_interval()
    return float(x.mean()), float(low), float(high), float(test.pvalue)


def scores(task: dict) -> np.ndarray:
    """The scores of a task's questions, [n] or, for F1, [n, 2]: said and true."""
    rows = np.array([DIGITS.index(char) for char in task["each"]]) / 63
    return rows if len(rows) == task["n"] else rows.reshape(-1, 2)


def questions(lines: dict, claim: Claim, seeds: Sequence[int]) -> tuple[float, float]:
    """95% percentile bootstrap over questions of the contrast's mean over these seeds."""
    if claim.unit != "points" or not seeds:
        return nan, nan
    rng, totals = np.random.default_rng(0), np.zeros(500)
    for seed in seeds:
        for name in claim.metric:
            tasks = {row: lines[row, seed]["tasks"][name] for row in claim.contrast}
            rows = {row: scores(task) for row, task in tasks.items()}
            total = METRICS[next(iter(tasks.values()))["metric"]][1]
            n = len(next(iter(rows.values())))
            some = rng.integers(n, size=(len(totals), n))  # the same questions for all rows
            for row, w in claim.contrast.items():
                drawn = rows[row][some]
                each = drawn.mean(1) if total is np.mean else np.array([*map(total, drawn)])
                totals += w * each / len(seeds) / len(claim.metric)
    low, high = np.percentile(totals, (2.5, 97.5))
    return float(low), float(high)


def measure(claim: Claim, lines: Sequence[dict]) -> Verdict:
    """A claim against the results of its file; its word comes from `judge`."""
    known = latest(lines)
    seeds = [
        s
        for s in sorted({seed for _, seed in known})
        if all((row, s) in known for row in claim.contrast)
    ]
    each = [
        sum(w * value(known[row, s], m) for row, w in claim.contrast.items() for m in claim.metric)
        / len(claim.metric)
        for s in seeds
    ]
    pairs = [(s, x) for s, x in zip(seeds, each, strict=True) if np.isfinite(x)]
    seeds, each = [s for s, _ in pairs], [x for _, x in pairs]
    return Verdict(claim, tuple(seeds), *interval(each), questions(known, claim, seeds), WAITS)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the i-th smallest of m times m - i, never below one before it."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for i, k in enumerate(np.argsort(ps)):
        worst = max(worst, min(1.0, (len(ps) - i) * ps[k]))
        adjusted[k] = worst
    return adjusted


def word(v: Verdict) -> str:
    """Same direction, opposite or not resolved; its p is adjusted for the number of claims.

    Fewer than LEAST seeds wait. `above` holds where the difference is not 0 by chance and
    as large as matters, `beyond` does on either side. `at_most` and `within` hold where the whole
    interval is below the margin, or inside both: a difference that was not found is no evidence.
    """
    margin, found = v.claim.margin, v.p < 0.05 and abs(v.mean) >= v.claim.margin
    inside = -margin < v.low and v.high < margin
    same, opposite = {
        "above": (found and v.mean > 0, found and v.mean < 0),
        "beyond": (found, inside),
        "at_most": (v.high < margin, v.low > margin),
        "within": (inside, v.low > margin or v.high < -margin),
    }[v.claim.holds]
    return WAITS if len(v.seeds) < LEAST else SAME if same else OPPOSITE if opposite else OPEN


def judge(measured: Sequence[Verdict]) -> list[Verdict]:
    """All claims at once: Holm's p over those that are tests against 0, and each one's word."""
    adjusted = iter(holm([v.p for v in measured if v.claim.holds in TESTED]))
    found = [replace(v, p=next(adjusted)) if v.claim.holds in TESTED else v for v in measured]
    return [replace(v, word=word(v)) for v in found]
