"""What a stage's losses should be like: the range of reference runs, and no sudden jump."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SMOOTHING = 10  # steps whose mean loss is shown and compared: single batches differ too much
# A loss jumps if it exceeds both bounds over the steps before it: four standard deviations above
# their mean, and 1.2 times their mean.
JUMP_WINDOW = 20  # steps
JUMP_DEVIATIONS = 4
JUMP_RATIO = 1.2


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
