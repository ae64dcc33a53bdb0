"""A run folder: recipe.yaml, environment.json, losses.csv, results.jsonl, and the weights.

The same recipe again continues what it finds there; another recipe is refused.
"""

import csv
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from math import isfinite
from pathlib import Path
from pickle import UnpicklingError
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.serialization import safe_globals
from torch.torch_version import TorchVersion
from tqdm import tqdm

from nanollava.extras.environment import environment
from nanollava.files import write_atomically
from nanollava.recipe import Recipe, Stage, differences, read_recipe, write_recipe

BEFORE = 20  # steps that a jump is seen against
# A jump is both: so many deviations above their mean, and so many times it.
DEVIATIONS, TIMES = 4, 1.2
COLUMNS = ("stage", "step", "source", "loss", "tokens", "lr", "seconds")


def check_run(recipe: Recipe) -> None:
    """Raises ValueError, with the differing keys, for a folder with a run of another recipe."""
    if recipe.reference and not Path(recipe.reference).is_file():
        raise FileNotFoundError(f"reference: {recipe.reference} is not a file")
    file = Path(recipe.run) / "recipe.yaml"
    begun = file.exists() and (file.parent / "losses.csv").exists()
    changed = differences(read_recipe(file), recipe) if begun else []
    if changed and not recipe.fresh:
        told = "\n  ".join([f"{recipe.run} holds a run of another recipe:", *changed])
        raise ValueError(f"{told}\nGive another folder (run=...), or fresh=true to delete it")


def open_run(recipe: Recipe, processes: int) -> None:
    """Make the folder; write the resolved recipe and what else a result depends on."""
    run = Path(recipe.run)
    if recipe.fresh and run.exists():
        if any(run.iterdir()) and not (run / "recipe.yaml").exists():
            raise ValueError(f"fresh=true would delete {run}, no run folder: remove it first")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(replace(recipe, fresh=False), run / "recipe.yaml")
    file = run / "environment.json"  # one entry for each start
    starts = json.loads(file.read_text()) if file.exists() else []
    if starts and starts[-1]["processes"] != processes:
        print(f"{run} goes on in the same order, now with {processes} processes")
    starts.append(environment(recipe, processes))
    with write_atomically(file) as half:
        half.write_text(json.dumps(starts, indent=1))


def read_losses(run: str | Path) -> list[dict[str, str]]:
    """The whole rows of losses.csv: one per step and source, and one per step for "all"."""
    file = Path(run) / "losses.csv"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def keep_losses(run: str | Path, stage: str, step: int) -> None:
    """Forget what a stage logged after `step`: a resumed run does those steps again."""
    rows = [r for r in read_losses(run) if r["stage"] != stage or int(r["step"]) <= step]
    with write_atomically(Path(run) / "losses.csv") as half, half.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def add_losses(run: str | Path, rows: Iterable[tuple]) -> None:
    """Append rows of COLUMNS."""
    with (Path(run) / "losses.csv").open("a", newline="") as file:
        csv.writer(file).writerows(rows)


def log_notes(run: Path, stage: str, notes: Sequence[str]) -> None:
    """What is odd about a batch, such as samples that were cut: all in notes.txt, the first on
    screen.
    """
    if notes:
        with (run / "notes.txt").open("a") as file:
            file.writelines(f"{stage}: {note}\n" for note in notes)
        tqdm.write(f"{stage}: {notes[0]:.300} (1 of {len(notes)} in this batch; {run}/notes.txt)")


def steps_of(stage: Stage, batches: int) -> int:
    """Optimizer steps of a stage whose loader has `batches` in an epoch."""
    if not batches:
        raise ValueError(f"the sources hold fewer samples than batch_size {stage.batch_size}")
    times, unit = int(stage.duration[:-2]), stage.duration[-2:]
    return times * batches if unit == "ep" else times


def checkpointing(name: str, run: Path, due: Callable) -> dict:
    """Composer's settings: one checkpoint a stage, found again by the stage's name.

    Composer's own autoresume deletes a signal file once per node, which fails where nodes share
    the run folder, as they must here.
    """
    latest = run / "checkpoints" / f"{name}-latest-rank0.pt"
    return {
        "run_name": name,
        "save_folder": str(run / "checkpoints"),
        "save_filename": name + "-ba{batch}-rank{rank}.pt",
        "save_latest_filename": name + "-latest-rank{rank}.pt",
        "save_interval": due,
        "save_num_checkpoints_to_keep": 1,
        "save_overwrite": True,
        "load_path": str(latest) if latest.exists() else None,
    }


@contextmanager
def weights_only(run: Path) -> Iterator[None]:
    """A checkpoint of Composer's that is loaded meanwhile is data: it can run nothing."""
    array = np.zeros(0, np.uint32)  # the state of numpy's generator is one
    arrays = (np.ndarray, np.dtype, type(array.dtype), array.__reduce__()[0])
    forced = patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")  # whatever Composer asks for
    try:
        with forced, safe_globals([timedelta, TorchVersion, *arrays]):
            yield
    except UnpicklingError as error:
        raise ValueError(f"{run}/checkpoints: no run wrote these: delete that folder") from error


def gradient_scale() -> float:
    """The mean of ones over all processes as FSDP2 asks for it: gloo gives the sum (torch 2.7)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ones = torch.ones(dist.get_world_size(), device=device)
    mean = ones[:1].clone()
    dist.reduce_scatter_tensor(mean, ones, op=dist.ReduceOp.AVG)
    return float(mean)


def finish(run: Path, last: Path) -> None:
    """The last stage's files into the run folder, the weights last: then the run is whole."""
    for file in sorted(last.iterdir(), key=lambda f: f.suffix == ".safetensors"):
        with write_atomically(run / file.name) as half:
            shutil.copy(file, half)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


class LossBand:
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


def print_stage(name: str, stage: Stage, counts: dict[str, int], steps: int) -> None:
    """Print what a stage trains and what it freezes."""
    train = ", ".join(f"{part} {n:,}" for part, n in counts.items() if n)
    vision = f", vision {stage.vision_lr:g}" if counts["encoder"] else ""
    frozen = ", ".join(part for part, n in counts.items() if not n) or "nothing"
    mix = ", ".join(f"{source} x {times:g}" for source, times in stage.mix.items())
    print(
        f"\n{name}: trains {train} parameters (lr {stage.lr:g}{vision}); "
        f"frozen: {frozen}\n  {steps:,} steps of {stage.batch_size} samples: {mix}"
    )
