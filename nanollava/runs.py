"""A run folder: recipe.yaml, environment.json, losses.csv, notes.txt, results.jsonl, the weights.

The same recipe again resumes the run that it finds there. Another recipe is rejected.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
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
from nanollava.extras.losses import read_losses
from nanollava.files import write_atomically
from nanollava.recipe import Recipe, Stage, differences, read_recipe, write_recipe

COLUMNS = ("stage", "step", "source", "loss", "tokens", "lr", "seconds")


def check_run(recipe: Recipe) -> None:
    """Raise ValueError, with the differing keys, if the folder holds a run of another recipe."""
    if recipe.reference and not Path(recipe.reference).is_file():
        raise FileNotFoundError(f"reference: {recipe.reference} is not a file. Correct its path")
    run = Path(recipe.run)
    started = (run / "recipe.yaml").exists() and (run / "losses.csv").exists()
    changes = differences(read_recipe(run / "recipe.yaml"), recipe) if started else []
    if changes and not recipe.fresh:
        lines = "\n  ".join([f"{run} holds a run of another recipe:", *changes])
        raise ValueError(f"{lines}\nChoose another folder (run=...), or delete it with fresh=true")


def open_run(recipe: Recipe, processes: int) -> None:
    """Make the folder; write the resolved recipe and what else a result depends on."""
    run = Path(recipe.run)
    if recipe.fresh and run.exists():
        if any(run.iterdir()) and not (run / "recipe.yaml").exists():
            raise ValueError(
                f"refusing to delete {run}: it is not a run folder. Choose another folder (run=...)"
            )
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(replace(recipe, fresh=False), run / "recipe.yaml")
    # environment.json has one entry for each start, because a run can resume on another machine.
    file = run / "environment.json"
    starts = json.loads(file.read_text()) if file.exists() else []
    if starts and starts[-1]["processes"] != processes:
        print(f"{run} resumes with {processes} processes, and its samples keep their order")
    starts.append(environment(recipe, processes))
    with write_atomically(file) as half:
        half.write_text(json.dumps(starts, indent=1))


def rewind_losses(run: Path, stage: str, step: int) -> None:
    """Drop what a stage logged after `step`, because a resumed run repeats those steps."""
    rows = [row for row in read_losses(run) if row["stage"] != stage or int(row["step"]) <= step]
    with write_atomically(run / "losses.csv") as half, half.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def add_losses(run: Path, stage: str, step: int, losses: list, lr: float, seconds: float) -> None:
    """Append a step to losses.csv; `losses` are (source, mean loss, supervised tokens)."""
    with (run / "losses.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        for source, loss, tokens in losses:
            texts = f"{loss:.6f}", tokens, f"{lr:.3g}", f"{seconds:.2f}"
            writer.writerow((stage, step, source, *texts))


def log_notes(run: Path, stage: str, notes: Sequence[str]) -> None:
    """Append what is unusual about a batch, such as cut samples, to notes.txt; print the first."""
    if notes:
        with (run / "notes.txt").open("a") as file:
            file.writelines(f"{stage}: {note}\n" for note in notes)
        tqdm.write(f"{stage}: {notes[0]:.300} (1 of {len(notes)} in this batch; {run}/notes.txt)")


def steps_of(stage: Stage, batches: int) -> int:
    """Optimizer steps of a stage whose loader has `batches` in an epoch."""
    if not batches:
        raise ValueError(f"batch_size {stage.batch_size} exceeds the number of samples. Lower it")
    amount = int(stage.duration[:-2])
    return amount * batches if stage.duration.endswith("ep") else amount


def checkpointing(name: str, run: Path, due: Callable[..., bool]) -> dict:
    """Composer's settings: keep one checkpoint per stage, and find it again by the stage's name.

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
    """Load Composer's checkpoints as data: a pickle that would call a function is rejected."""
    state = np.zeros(0, np.uint32)  # a checkpoint holds the state of numpy's generator, an array
    array_types = (np.ndarray, np.dtype, type(state.dtype), state.__reduce__()[0])
    # Composer asks torch.load for weights_only=False. The environment variable has the last word.
    forced = patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
    try:
        with forced, safe_globals([timedelta, TorchVersion, *array_types]):
            yield
    except UnpicklingError as error:
        raise ValueError(f"{run}/checkpoints has objects no run writes. Delete it") from error


def gradient_scale() -> float:
    """How many times too large FSDP2's gradients arrive: it asks for the mean over all processes,
    for which gloo returns the sum (torch 2.7).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ones = torch.ones(dist.get_world_size(), device=device)
    mean = ones[:1].clone()
    dist.reduce_scatter_tensor(mean, ones, op=dist.ReduceOp.AVG)
    return float(mean)


def finish(run: Path, last_stage: Path) -> None:
    """Copy the last stage's files into the run folder, the weights last: they mark it complete."""
    for file in sorted(last_stage.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        with write_atomically(run / file.name) as half:
            shutil.copy(file, half)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def print_stage(name: str, stage: Stage, counts: dict[str, int], steps: int) -> None:
    """Print what a stage trains, and on what; `counts` has 0 parameters for a frozen part."""
    lrs = f"lr {stage.lr:g}, vision_lr {stage.vision_lr:g}"
    print(f"\n{name}: {steps:,} steps of {stage.batch_size} samples, {lrs}")
    for part, count in counts.items():
        print(f"  {part}: {count:,} parameters train" if count else f"  {part}: frozen")
    for source, times in stage.mix.items():
        print(f"  source {source} x {times:g}")
