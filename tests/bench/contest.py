"""Contenders take turns: one thread, CPU time, in another order each round; equal results first."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One line of the table: what was measured, how much, and the target that it has."""

    what: str
    found: float
    unit: str  # "x" (times as fast) or e.g. " ms"
    target: float
    most: bool = False  # whether the target is an upper bound
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.found <= self.target if self.most else self.found >= self.target

    def __str__(self) -> str:
        sign, verdict = ("<=" if self.most else ">="), "met" if self.met else "MISSED"
        note = f"; {self.note}" if self.note else ""
        return f"{self.what}: {self.found:.2f}{self.unit} ({sign} {self.target:g}: {verdict}){note}"


def race(
    contenders: Mapping[str, Callable[[], Any]], same: Callable[[Any, Any], bool], rounds: int = 5
) -> dict[str, list[float]]:
    """CPU seconds of each contender in each round; `same` compares all results with the first's.

    The first turn of each warms up and is compared, not timed. AssertionError for other results.
    """
    torch.set_num_threads(1)
    first, *others = [(name, run()) for name, run in contenders.items()]
    for name, result in others:
        assert same(first[1], result), f"{name} and {first[0]} have other results"
    draw, seconds = random.Random(0), {name: [] for name in contenders}
    for _ in range(rounds):
        for name in draw.sample([*contenders], len(contenders)):
            begin = time.process_time()
            contenders[name]()
            seconds[name].append(time.process_time() - begin)
    return seconds


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> float:
    """How many times as long `of` took as `to`: the median over rounds."""
    return median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))
