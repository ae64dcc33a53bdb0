"""Contenders take turns: one thread, CPU time, in another order each round; equal results first."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One line of the table: what was measured, how much, and the target, if it has one."""

    what: str
    found: float
    unit: str = "x"  # times as fast; or " ms", "%"
    target: float | None = None
    most: bool = False  # whether the target is an upper bound
    note: str = ""

    def cells(self) -> list[str]:
        """What, found, target, whether it is met, note."""
        told, sign = f"{self.found:.3g}{self.unit}", "at most" if self.most else "at least"
        if self.target is None:
            return [self.what, told, "", "", self.note]
        met = self.found <= self.target if self.most else self.found >= self.target
        target = f"{sign} {self.target:g}{self.unit}"
        return [self.what, told, target, "yes" if met else "NO", self.note]

    def __str__(self) -> str:
        what, found, target, met, note = self.cells()
        return f"{what}: {found}" + (f" ({target}: {met})" if target else "") + f"  {note}"


def race(
    contenders: Mapping[str, Callable[[], Any]],
    same: Callable[[Any, Any], bool] = lambda a, b: a == b,
    rounds: int = 5,
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


def told(seconds: Mapping[str, list[float]]) -> str:
    """'peer 47.5, ours 26.3 CPU s, 3 rounds': medians."""
    each = ", ".join(f"{name} {median(times):.3g}" for name, times in seconds.items())
    return f"{each} CPU s, {len(next(iter(seconds.values())))} rounds"
