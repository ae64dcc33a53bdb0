"""PERFORMANCE C8: what Composer adds to a bare training loop, per step and per microbatch.

    python tests/bench/trainer.py

The same documents (40 tiles a batch) in one pack and in four, one thread, CPU time, medians of
rounds in which the contenders take turns. The weights after all steps must agree.
"""

import sys
import tempfile
import time
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from statistics import median

import torch
from composer import Callback
from PIL import Image
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from contest import Row  # noqa: E402
from launching import write_recipe  # noqa: E402

from nanollava.model import VLM  # noqa: E402
from nanollava.prompts import Turn  # noqa: E402
from nanollava.recipe import read_recipe  # noqa: E402
from nanollava.runs import steps_of  # noqa: E402
from nanollava.sequence import pack, split  # noqa: E402
from nanollava.train import Stopping, make_trainer  # noqa: E402

STEPS, ROUNDS = 20, 5


class Clock(Callback):
    """CPU seconds between the ends of steps."""

    def __init__(self):
        self.ticks = []

    def batch_end(self, state, logger) -> None:
        self.ticks.append(time.process_time())


def bare(model: VLM, documents: list, stage) -> list[float]:
    """The same step without a trainer; returns the CPU time at each step's end."""
    model.set_trainable(stage.train)
    groups = model.groups(stage.lr, stage.vision_lr, stage.lr, stage.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    ticks, total = [], sum(d.learned for d in documents)
    for step in range(STEPS):
        for group in optimizer.param_groups:  # Composer's cosine lags a step behind
            group["lr"] = stage.lr * (1 + cos(pi * max(step - 1, 0) / STEPS)) / 2
        for part in split(documents, stage.microbatch_tokens):
            row = pack(part, model.spec.tile)
            losses = model(row)
            (losses.mean() * row.learned / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ticks.append(time.process_time())
    return ticks


def main() -> list[Row]:
    """The rows of C8."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def measure(folder: Path) -> list[Row]:
    """Both loops over the same packs, in turn."""
    recipe = read_recipe(write_recipe(folder), [f"run={folder}/run"])
    model = VLM(recipe)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    image = Image.new("RGB", (144, 144), (90, 120, 30))
    turns = [Turn("user", "<image>\nwhat is the tax?", 1), Turn("assistant", "tax 305")]
    documents = [model.writer()(turns, [image], name=str(i), source="mixed") for i in range(4)]
    views = sum(len(d.views) for d in documents)
    positions = sum(len(d.ids) for d in documents)
    found: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(ROUNDS):
        for packs in found:
            stage = replace(
                recipe.stages["stage2"],
                duration=f"{STEPS}ba",
                batch_size=4,
                lr=1e-4,
                vision_lr=1e-4,
                save_interval=10**9,
                warmup=0.0,
                sources={"mixed": 1.0},
                microbatch_tokens=positions if packs == 1 else positions // 4,
            )
            model.load_state_dict(start)
            plain = bare(model, documents, stage)
            wanted = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(start)
            one = replace(recipe, stages={"stage2": stage})
            loader = DataLoader(documents * STEPS, batch_size=4, collate_fn=list)
            trainer = make_trainer(one, "stage2", model, loader, Stopping(stage.save_interval))
            clock = Clock()
            trainer.state.callbacks.append(clock)
            (folder / "run").mkdir(exist_ok=True)
            trainer.fit()
            trainer.close()
            apart = max((v - wanted[k]).abs().max() for k, v in model.state_dict().items())
            assert apart < 1e-6, f"weights differ by {apart}"
            assert steps_of(stage, len(loader)) == len(plain) == len(clock.ticks)
            gaps = [[b - a for a, b in zip(t, t[1:])] for t in (clock.ticks, plain)]
            found[packs].append(1000 * (median(gaps[0]) - median(gaps[1])))
    note = f"{views} views, {positions} positions a batch"
    return [
        Row(
            f"C8 Composer beside a bare loop, a step of {packs} packs",
            median(extra),
            " ms",
            3 + 1.5 * packs,
            True,
            note,
        )
        for packs, extra in found.items()
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
