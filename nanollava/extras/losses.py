"""The losses of a run, and what they should be like: inside a band, without a sudden jump.

    python -m nanollava.extras.losses recipes/nano/losses.csv runs/nano_0 runs/nano_1 runs/nano_2

writes the band that a recipe's `reference` key names, from several runs of that recipe.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanollava.files import write_atomically

SMOOTHING = 10  # steps whose mean loss is shown and compared: single batches differ too much
# A loss jumps if it exceeds both bounds over the steps before it: four standard deviations above
# their mean, and 1.2 times their mean.
JUMP_WINDOW = 20  # steps
JUMP_DEVIATIONS = 4
JUMP_RATIO = 1.2


def read_losses(run: str | Path) -> list[dict[str, str]]:
    """The rows of losses.csv: one per step and source, and one per step for "all".

    A killed process or a full disk can leave half a line at the end, which is left out.
    """
    file = Path(run) / "losses.csv"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def expected_losses(reference: str, stage: str, steps: int) -> dict[int, str]:
    """{step: " (expected 0.28-0.33)"}, the range of several reference runs at each step.

    It is empty if they had another number of steps: another schedule has other losses.
    """
    lines = Path(reference).read_text().splitlines() if reference else []
    rows = [row for row in csv.DictReader(lines) if row["stage"] == stage]
    if len(rows) != steps:
        return {}
    return {int(row["step"]): f" (expected {row['low']}-{row['high']})" for row in rows}


def find_jump(loss: float, before: Sequence[float]) -> str:
    """A warning if a loss is far above those of the steps before it, or not a number; else ""."""
    if not np.isfinite(loss):
        return f"the loss is {loss}"
    if len(before) < JUMP_WINDOW:
        return ""
    mean, deviation = np.mean(before), np.std(before)
    if loss < mean + JUMP_DEVIATIONS * deviation or loss < JUMP_RATIO * mean:
        return ""
    return f"the loss jumps to {loss:.3g} from {mean:.3g} +- {deviation:.2g}"


def write_reference(runs: Iterable[str | Path], out: str | Path) -> None:
    """Write the lowest and the highest mean of SMOOTHING steps at each step, 5% added on both
    sides.
    """
    means = defaultdict(list)  # (stage, step): one mean per run
    for run in runs:
        rows = [row for row in read_losses(run) if row["source"] == "all"]
        if not rows:
            raise ValueError(f"{run} has no losses. Train it first")
        losses = defaultdict(list)  # stage: one loss per step
        for row in rows:
            stage = row["stage"]
            step = int(row["step"])
            losses[stage].append(float(row["loss"]))
            last = losses[stage][-SMOOTHING:]
            means[stage, step].append(sum(last) / len(last))
    with write_atomically(Path(out)) as half, half.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("stage", "step", "low", "high"))
        for (stage, step), values in means.items():
            low = min(values) * 0.95
            high = max(values) * 1.05
            writer.writerow((stage, step, f"{low:.2f}", f"{high:.2f}"))


if __name__ == "__main__":
    write_reference(sys.argv[2:], sys.argv[1])
