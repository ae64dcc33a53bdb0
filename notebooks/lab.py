"""What the notebooks do: score nano tasks at some settings, train a short stage 2."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from nanollava.ablations import rows as rows_of
from nanollava.evaluate import evaluate_task
from nanollava.extras.plan import plan
from nanollava.generate import Assistant
from nanollava.recipe import read_recipe, with_visual, write_recipe

read_rows, TABLES = rows_of.read_rows, rows_of.TABLES

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "demo" / "nano"
QUICK = "NANOLLAVA_QUICK" in os.environ  # as the tests run: fewer questions and steps, same cells
RUNS = Path(os.environ.get("NANOLLAVA_RUNS", "../runs/notebooks"))  # from the notebooks' folder


def measure(
    llava: Assistant, tasks: Sequence[str], settings: dict[str, dict], n: int = 300, split="test"
) -> list[dict]:
    """Score a model on nano tasks ("nano-doc") at visual settings, n questions each; returns a row
    for each pair, with its 95% interval over questions and what chance gives.
    """
    known, rows = read_recipe(ROOT / "recipes/nano.yaml").tasks, []
    for name, keys in tqdm(settings.items(), "settings"):
        visual = with_visual(llava.model.recipe, keys).visual
        for task in tasks:
            asked = replace(known[task], samples=20 if QUICK else n, split=split)
            rows.append({"setting": name, **evaluate_task(llava, task, asked, visual)})
    return rows


def tune(name: str, steps: int, *overrides: str) -> str:
    """Stage 2 once more, `steps` from the shipped model, with some keys changed; returns the run.

    A run of these keys that is there already is not repeated. Raises CalledProcessError where it
    fails; its output is shown. (A process of its own: a notebook's kernel cannot fork workers.)
    """
    run, steps = RUNS / name, 4 if QUICK else steps
    recipe = read_recipe(ROOT / "recipes/nano.yaml", list(overrides))
    stage = replace(
        recipe.stages["stage2"], sources={"instructions": 1}, duration=f"{steps}ba", warmup=0.25
    )
    samples = replace(recipe.sources["instructions"], samples=steps * stage.batch_size)
    (run / "start").mkdir(parents=True, exist_ok=True)
    shutil.copy(SHIPPED / "model.safetensors", run / "start")  # a stage that is done is loaded
    changed = replace(
        recipe,
        run=str(run.resolve()),
        data=str(ROOT / "data" / "nano"),
        tasks={},
        settings={},
        sources={"instructions": samples},
        stages={"start": stage, "stage2": stage},
    )
    write_recipe(changed, run / "asked.yaml")
    command = [sys.executable, "-m", "nanollava", "train", str(run / "asked.yaml")]
    subprocess.run(command, check=True)
    return str(run)


def say(*words: str) -> int:
    """Run `python -m nanollava WORDS`, which here also knows tiny.py's encoder, without a network;
    print what it says but for progress bars and this machine's folders; returns its exit code.
    """
    done = subprocess.run(
        [sys.executable, "tiny.py", *words],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
    )
    lines = [line.rstrip("\r").split("\r")[-1] for line in done.stdout.decode().split("\n")]
    told = [line for line in lines if line.strip() and "it/s]" not in line]
    print("\n".join(told).replace(f"{ROOT}/", "").replace(str(ROOT), "."))
    return done.returncode


def clock(text: str) -> float:
    """The blog's times in hours: "6H30M", "11H14M", "7h30min"."""
    hours, _, minutes = text.lower().partition("h")
    return int(hours) + int(minutes.rstrip("min") or 0) / 60


def hours(name: str, *overrides: str) -> list[dict]:
    """Stage 2 of each row of `recipes/ablations/NAME.yaml`, planned at full scale and not run: its
    hours over those of the first row, packed and as if padded, and the blog's hours over its first.
    """
    rows = []
    found = list(read_rows(ROOT / f"recipes/ablations/{name}.yaml", "full").items())
    for title, row in tqdm(found[: 2 if QUICK else None], name):
        stage = plan(read_recipe(row.base, [*row.keys, *overrides]))["stage2"]
        rows.append(
            {
                "row": title,
                "packed": stage["hours"],
                "padded": stage["hours"] * (1 + stage["padding"]),
                "blog": clock(rows_of.printed(row)["training_time"]),
            }
        )
    return [
        {"row": r["row"], **{k: r[k] / rows[0][k] for k in ("packed", "padded", "blog")}}
        for r in rows
    ]
