"""The band of losses that a recipe's `reference` key names, from several runs of that recipe.

python -m nanollava.extras.reference recipes/nano/losses.csv runs/nano_0 runs/nano_1 runs/nano_2
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from nanollava.extras.losses import SMOOTHING
from nanollava.files import write_atomically
from nanollava.runs import read_losses


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
