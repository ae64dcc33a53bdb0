"""The band of losses that a recipe's `reference` key names, from several runs of that recipe.

python -m nanollava.extras.reference recipes/nano/losses.csv runs/nano_0 runs/nano_1 runs/nano_2
"""

import csv
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from nanollava.files import write_atomically
from nanollava.runs import read_losses


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
    with write_atomically(Path(out)) as half, half.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("stage", "step", "low", "high"),
                *(
                    (*place, f"{min(means) * 0.95:.2f}", f"{max(means) * 1.05:.2f}")
                    for place, means in told.items()
                ),
            ]
        )


if __name__ == "__main__":
    write_reference(sys.argv[2:], sys.argv[1])
