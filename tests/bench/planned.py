"""PERFORMANCE C9: the time of a step by its FLOPs, and by its tokens, with the nano model.

    python tests/bench/planned.py

Whole steps (forward, backward, clipping, AdamW) of stages 1.5 and 2 of `recipes/nano.yaml`: what
stage 2's speed makes of stage 1.5's FLOPs, against its time. Then packs of 8 to 64 documents of
one length: how far the times lie from a line through them.
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


def seconds(model: VLM, some: list[Document]) -> float:
    """CPU seconds of a training step on one pack, the median."""
    optimizer = torch.optim.AdamW(model.groups(1e-4, 1e-4, 1e-4, 0.0), fused=True)
    times, all_in_one = [], sum(len(d.ids) for d in some)
    for _ in range(STEPS + 2):
        begin = time.process_time()
        peer.train_step(model, optimizer, some, all_in_one)
        times.append(time.process_time() - begin)
    return median(times[2:])


def speed(model: VLM, name: str) -> float:
    """Useful FLOPs a second of a stage's steps."""
    stage, keys = model.recipe.stages[name], model.recipe.visual
    some = peer.stage_documents(model, name, 16)
    forward = forward_flops(rates(model), some, model.spec.side**2, keys.pool_after_projector)
    model.set_trainable(stage.train)
    return step_flops(forward, TRAIN[stage.train]) / seconds(model, some)


def main() -> list[Row]:
    """The rows of C9 that need a clock."""
    torch.set_num_threads(1)
    model = VLM(read_recipe(ROOT / "recipes/nano.yaml", precision="fp32")).train()
    found = {name: speed(model, name) for name in ("stage1_5", "stage2")}
    off = 100 * abs(found["stage2"] / found["stage1_5"] - 1)
    one, counts = (
        max(peer.stage_documents(model, "stage2", 16), key=lambda d: len(d.ids)),
        (8, 16, 32, 64),
    )
    times = [seconds(model, [one] * n) for n in counts]
    line = np.polyval(np.polyfit(counts, times, 1), counts)
    return [
        Row(
            "C9 stage 1.5's time, planned at stage 2's speed, is off by",
            off,
            "%",
            15,
            True,
            ", ".join(f"{name} {each / 1e9:.1f} GFLOP/s" for name, each in found.items()),
        ),
        Row(
            "C9 8 to 64 documents of one length: off a line by",
            100 * max(abs(line / times - 1)),
            "%",
            5,
            True,
            f"{1e6 * times[-1] / counts[-1] / len(one.ids):.1f} us a position",
        ),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
