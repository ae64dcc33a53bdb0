"""What a stage trains, the course of its loss beside reference runs, and where that jumps.

    python recipes/tools/course.py recipes/nano/losses.csv runs/nano_0 runs/nano_1 runs/nano_2

writes the band that a recipe's `reference` key names, from several runs of that recipe.
"""

import csv
import sys
from collections import deque
from collections.abc import Iterable
from math import isfinite
from pathlib import Path

import numpy as np

from nanollava.files import whole
from nanollava.recipe import Stage
from nanollava.runs import read_losses

BEFORE = 20  # steps that a jump is seen against
# A jump is both: so many deviations above their mean, and so many times it.
DEVIATIONS, TIMES = 4, 1.2


class Course:
    """A stage's losses as they come.

    The band lies between the lowest and the highest of reference runs, all of them means of the
    last ten steps: single batches differ too much. It is told only where the reference has as many
    steps, since another schedule has other losses.
    """

    def __init__(self, reference: str, stage: str, steps: int):
        lines = Path(reference).read_text().splitlines() if reference else []
        rows = [row for row in csv.DictReader(lines) if row["stage"] == stage]
        self.last: deque[float] = deque(maxlen=10)
        self.before: deque[float] = deque(maxlen=BEFORE)
        rows = rows if len(rows) == steps else []
        self.band = {int(r["step"]): f" (expected {r['low']}-{r['high']})" for r in rows}

    def tell(self, step: int, loss: float) -> str:
        """A postfix for a progress bar: "loss 0.312 (expected 0.28-0.33)"."""
        self.last.append(loss)
        return f"loss {sum(self.last) / len(self.last):.3f}" + self.band.get(step, "")

    def odd(self, loss: float, means: dict[str, float]) -> str:
        """What is odd about a step's loss, with its mean by source; "" if nothing is."""
        each = ", ".join(f"{source} {mean:.3g}" for source, mean in means.items())
        if not isfinite(loss):
            return f"the loss is {loss} ({each})"
        before = np.array(self.before)
        self.before.append(loss)
        if len(before) < BEFORE:
            return ""
        mean, apart = before.mean(), before.std()
        if loss < mean + DEVIATIONS * apart or loss < TIMES * mean:
            return ""
        return f"the loss jumps to {loss:.3g} from {mean:.3g} +- {apart:.2g} ({each})"


def announce(name: str, stage: Stage, counts: dict[str, int], steps: int) -> None:
    """Print what a stage trains and what it freezes."""
    train = ", ".join(f"{part} {n:,}" for part, n in counts.items() if n)
    vision = f", vision {stage.vision_lr:g}" if counts["encoder"] else ""
    frozen = ", ".join(part for part, n in counts.items() if not n) or "nothing"
    mix = ", ".join(f"{source} x {times:g}" for source, times in stage.mix.items())
    print(
        f"\n{name}: trains {train} parameters (lr {stage.lr:g}{vision}); "
        f"frozen: {frozen}\n  {steps:,} steps of {stage.batch_size} samples: {mix}"
    )


def write_reference(runs: Iterable[str | Path], out: str | Path) -> None:
    """The lowest and the highest mean of ten steps at each step, 5% added on both sides."""
    told: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        last: dict[str, deque] = {}
        if not (rows := [row for row in read_losses(run) if row["source"] == "all"]):
            raise ValueError(f"{run} has no losses: train it first")
        for row in rows:
            window = last.setdefault(row["stage"], deque(maxlen=10))
            window.append(float(row["loss"]))
            told.setdefault((row["stage"], int(row["step"])), []).append(sum(window) / len(window))
    with whole(Path(out)) as half, half.open("w", newline="") as file:
        csv.writer(file).writerows([("stage", "step", "low", "high"), *(
            (*place, f"{min(means) * 0.95:.2f}", f"{max(means) * 1.05:.2f}")
            for place, means in told.items()
        )])  # fmt: skip


if __name__ == "__main__":
    write_reference(sys.argv[2:], sys.argv[1])
