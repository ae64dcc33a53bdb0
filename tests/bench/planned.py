"""PERFORMANCE C9: the time of a step by its FLOPs, and by its tokens, with the nano model.

    python tests/bench/planned.py

Whole steps (forward, backward, clipping, AdamW) of stages 1.5 and 2 of `recipes/nano.yaml`: the
time of stage 1.5 as planned from its FLOPs at stage 2's speed, against its measured time. Then
packs of 8 to 64 documents of one length: how far their times are from a straight line.
"""

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import peer  # noqa: E402
from contest import Row  # noqa: E402

from nanollava.cost import forward_flops, rates, step_flops  # noqa: E402
from nanollava.model import TRAIN, VLM  # noqa: E402
from nanollava.recipe import read_recipe  # noqa: E402
from nanollava.sequence import Document  # noqa: E402

STEPS = 7


def seconds(model: VLM, documents: list[Document]) -> float:
    """CPU seconds of a training step on one pack, the median."""
    optimizer = torch.optim.AdamW(model.groups(1e-4, 1e-4, 1e-4, 0.0), fused=True)
    positions = sum(len(d.ids) for d in documents)  # a microbatch that holds all of them
    times = []
    for _ in range(STEPS + 2):
        begin = time.process_time()
        peer.train_step(model, optimizer, documents, positions)
        times.append(time.process_time() - begin)
    return median(times[2:])  # the first two warm up


def speed(model: VLM, name: str) -> float:
    """Useful FLOPs per second of a stage's steps."""
    train = model.recipe.stages[name].train
    after = model.recipe.visual.pool_after_projector
    documents = peer.stage_documents(model, name, 16)
    forward = forward_flops(rates(model), documents, model.spec.side**2, after)
    model.set_trainable(train)
    return step_flops(forward, TRAIN[train]) / seconds(model, documents)


def main() -> list[Row]:
    """The rows of C9 that need a clock."""
    torch.set_num_threads(1)
    model = VLM(read_recipe(ROOT / "recipes/nano.yaml", precision="fp32")).train()
    speeds = {name: speed(model, name) for name in ("stage1_5", "stage2")}
    error = 100 * abs(speeds["stage2"] / speeds["stage1_5"] - 1)
    documents = peer.stage_documents(model, "stage2", 16)
    longest = max(documents, key=lambda d: len(d.ids))
    counts = (8, 16, 32, 64)
    times = [seconds(model, [longest] * n) for n in counts]
    line = np.polyval(np.polyfit(counts, times, 1), counts)
    return [
        Row(
            "C9 stage 1.5's time, planned at stage 2's speed, is off by",
            error,
            "%",
            15,
            True,
            ", ".join(f"{name} {flops / 1e9:.1f} GFLOP/s" for name, flops in speeds.items()),
        ),
        Row(
            "C9 8 to 64 documents of one length: off a line by",
            100 * max(abs(line / times - 1)),
            "%",
            5,
            True,
            f"{1e6 * times[-1] / counts[-1] / len(longest.ids):.1f} us a position",
        ),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
