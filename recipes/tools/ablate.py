"""Ablations: rows of changed keys on a base -> runs -> results, one line each as it comes.

    python -m nanollava ablate recipes/ablations/grids.yaml --seeds 5

    base: {nano: ../nano_sweep.yaml, full: ../qwen05b.yaml}
    roles: {nano: {recap: detailed}, full: {recap: recap_coco118k}}
    rows:
      NAME: {keys: [KEY=VALUE, ...], nano: [...], full: [...], infer: {max_grid: 4x4}}

A row's `keys` hold on both bases, those under `nano` or `full` on one; at the top of the file they
are for all rows, and a row with `nano: null` is not for that base. `$recap` is what the base calls
that role, `KEY*=0.5` half of the base's value. `infer` changes visual keys after training only.
Rows that begin alike share what they have in common: every stage has a run folder of its own, named
by a hash of all that it depends on.
"""

import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from string import Template
from typing import Annotated, Any

import typer
import yaml
from omegaconf import OmegaConf
from tqdm import tqdm

from nanollava.anyres import Visual, parse_budget
from nanollava.encoder import ENCODERS
from nanollava.recipe import Recipe, absolute_paths, read_recipe, run_keys
from nanollava.sources import call

TUNING = 100  # seeds from here on choose settings; their results are no evidence
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One row of a table on one base."""

    keys: list[str]  # as typed after the base's file name
    base: Path
    infer: dict[str, str] = field(
        default_factory=dict
    )  # visual keys that are changed after training
    blog: int | None = None  # its place in the blog's table
    table: str = ""
    missing: str = ""  # why it cannot be run at full scale


def read_rows(file: Path, scale: str = "nano") -> dict[str, Row]:
    """The rows of an ablation's file on its `nano` or its `full` base."""
    tree = yaml.safe_load(file.read_text())
    if scale not in tree["base"]:
        return {}
    base = (file.parent / tree["base"][scale]).resolve()
    roles, common = tree.get("roles", {}).get(scale, {}), tree.get(scale, [])
    start, found = None, {}
    for name, row in tree["rows"].items():
        if row.get(scale, []) is None:
            continue  # a row of the other base alone
        keys = [*common, *row.get(scale, []), *row.get("keys", [])]
        try:
            keys = [local(Template(key).substitute(roles), base.parent) for key in keys]
        except KeyError as error:
            raise ValueError(f"{file}: row {name}: roles.{scale} has no {error}") from error
        if any("*=" in key for key in keys):
            start = start or read_recipe(base, common)
            keys = [at_ratio(key, start) for key in keys]
        about = {k: row[k] for k in ("infer", "blog", "table", "missing") if k in row}
        found[name] = Row(keys, base, **{"table": tree.get("blog", ""), **about})
    return found


def local(key: str, folder: Path) -> str:
    """A key whose value, if it is a local path, is one of the base's folder."""
    name, sign, value = key.partition("=")
    return name + sign + absolute_paths(value, folder)


def at_ratio(key: str, base: Recipe) -> str:
    """`stages.stage2.lr*=0.5` -> `stages.stage2.lr=1e-05` for a base with 2e-5."""
    name, sign, ratio = key.partition("*=")
    if not sign:
        return key
    value = OmegaConf.select(OmegaConf.structured(base), name)
    number = value * float(ratio)
    return f"{name}={round(number) if isinstance(value, int) else f'{number:g}'}"


def untiled(visual: Visual, T: int) -> Visual:
    """The visual keys that are left to matter where no image is tiled."""
    if parse_budget(visual.max_visual_tokens, T, T) < T:
        return visual
    keys = ("pool_stride", "pooling", "pool_after_projector") if visual.pool_stride > 1 else ()
    kept = {key: getattr(visual, key) for key in keys}
    return Visual(max_grid="base", max_visual_tokens="1T", **kept)


def ladder(recipe: Recipe, cache: Path) -> list[Recipe]:
    """The runs that end in the recipe's own, each one stage longer than the one before."""
    rungs, stages = [], {}
    for name, stage in recipe.stages.items():
        if not stage:
            continue
        stages = {**stages, name: stage}
        plain = not any(stage.anyres for stage in stages.values())
        visual = untiled(recipe.visual, ENCODERS[recipe.encoder].side ** 2)
        part = replace(recipe, stages=stages, visual=visual if plain else recipe.visual)
        text = json.dumps(run_keys(part), sort_keys=True).replace(str(ROOT), "")
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        rungs.append(replace(part, run=str(cache / digest), fresh=False))
    return rungs


def make(recipe: Recipe, before: str) -> None:
    """Train the last stage of a recipe from the run `before`, which has the others."""
    from nanollava.data import prepare
    from nanollava.train import train

    run, *_, last = Path(recipe.run), *recipe.stages
    if (run / "cost.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    for stage in recipe.stages:
        if stage != last and not (run / stage).exists():
            (run / stage).symlink_to(os.path.relpath(Path(before) / stage, run))
    prepare(recipe)  # shared by many runs: no part of any one's cost
    start = time.process_time()
    train(recipe)
    starts = len(json.loads((run / "environment.json").read_text()))
    seconds = round(time.process_time() - start, 1) if starts == 1 else None  # else not all of it
    (run / "cost.json").write_text(json.dumps({"cpu_seconds": seconds}))


def measure(recipe: Recipe, infer: dict[str, str]) -> dict[str, Any]:
    """Score a trained recipe; its losses, its cost and its tasks' scores."""
    from nanollava.evaluate import evaluate
    from nanollava.generate import load
    from nanollava.runs import read_losses

    run, last = Path(recipe.run), [*recipe.stages][-1]
    losses = [r for r in read_losses(run) if r["stage"] == last and r["source"] == "all"]
    assistant, tasks = load(run), {}
    asked = replace(assistant.model.recipe, tasks=recipe.tasks, settings={"row": infer})
    assistant.model.recipe = asked
    if any(recipe.tasks.values()):
        keep = ("metric", "score", "n", "chance", "tokens", "cpu_seconds", "each")
        tasks = {r["task"]: {k: r[k] for k in keep} for r in evaluate(assistant, run)}
    return {"losses": [round(float(r["loss"]), 3) for r in losses], "tasks": tasks}


def work(recipe: Recipe, before: str, infers: list[dict[str, str]], log: str) -> list[dict]:
    """One run, and what it scores at each of `infers`; told to a log file."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out, redirect_stdout(out), redirect_stderr(out):
        make(recipe, before)
        return [measure(recipe, infer) for infer in infers]


@dataclass
class Task:
    """A run that is to be made, after which other, and the rows that are read off it."""

    recipe: Recipe
    before: str
    rows: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)  # name, seed, infer


def plan_tasks(file: Path, scale: str, seeds: range, only: list[str], done: set) -> dict[str, Task]:
    """Run folder -> task, in an order in which each comes after what it begins with."""
    rows, tasks = read_rows(file, scale), {}
    if unknown := {*only} - {*rows}:
        raise ValueError(f"{file} has no row {sorted(unknown)}; it has {list(rows)}")
    for seed in seeds:
        for name, row in rows.items():
            if (only and name not in only) or (row.missing and scale == "full"):
                continue
            recipe, before = read_recipe(row.base, row.keys, seed=seed), ""
            rungs = ladder(recipe, ROOT / "runs/ablate")
            if (name, seed, Path(rungs[-1].run).name) in done:
                continue
            for rung in rungs:
                task = tasks.setdefault(rung.run, Task(rung, before))
                before = rung.run
            task.rows.append((name, seed, row.infer))
    return tasks


def run_tasks(tasks: dict[str, Task], workers: int):
    """Yield (task, its measurements) as they are done, `workers` at a time; 0: here, in order."""
    args = {run: (t.recipe, t.before, [infer for *_, infer in t.rows], f"{run}/log.txt")
            for run, t in tasks.items()}  # fmt: skip
    if not workers:
        for run, task in tasks.items():
            yield task, work(*args[run])
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the cores
    waiting, running = dict(tasks), {}
    # A process keeps half a GB of each run that it made: five are enough for one.
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=5) as pool:
        while waiting or running:
            open_ = {*waiting, *running.values()}
            ready = [run for run, task in waiting.items() if task.before not in open_]
            for run in ready[: workers - len(running)]:
                running[pool.submit(call, f"{__file__}:work", *args[run])] = run
                del waiting[run]
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield tasks[running.pop(future)], result(future, waiting)


def result(future: Future, waiting: dict) -> list[dict]:
    """What a task returned; if it failed, no other is begun."""
    try:
        return future.result()
    except BaseException:
        waiting.clear()
        raise


def costs(task: Task) -> dict[str, float | None]:
    """CPU seconds of each stage, where it was trained in one go."""
    found = {}
    for rung in ladder(task.recipe, Path(task.recipe.run).parent):
        file = Path(rung.run) / "cost.json"
        found[[*rung.stages][-1]] = json.loads(file.read_text())["cpu_seconds"]
    return found


def read_lines(file: Path) -> list[dict]:
    """The results that were measured so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def commit() -> str:
    """The commit that results are made at, marked if what they depend on is changed."""
    git, paths = ["git", "-C", str(ROOT)], ("nanollava", "recipes", ":!recipes/ablations/results")
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *paths, ":!recipes/*.md"])
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")


def main(
    file: Annotated[Path, typer.Argument(help="Rows, e.g. recipes/ablations/grids.yaml")],
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 5,
    first: Annotated[int, typer.Option(min=0, help=f"the first; from {TUNING} on for tuning")] = 0,
    row: Annotated[list[str] | None, typer.Option("--only", help="rows, all if none")] = None,
    workers: Annotated[int, typer.Option(min=0, help="runs side by side")] = os.cpu_count() or 1,
    full: Annotated[bool, typer.Option("--full", help="on the real base, one run at once")] = False,
) -> None:  # fmt: skip
    """Train and score the rows of an ablation; goes on where it was stopped."""
    scale, chosen = "full" if full else "nano", range(first, first + seeds)
    folder = ROOT / "runs/ablate" if full or first >= TUNING else file.parent / "results"
    out = folder / f"{file.stem}{'.full' if full else ''}.jsonl"
    done = {(line["row"], line["seed"], line["run"]) for line in read_lines(out)}
    tasks = plan_tasks(file, scale, chosen, row or [], done)
    at, today = commit(), datetime.date.today()
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(tasks), desc=file.stem, smoothing=0, file=sys.stdout)
    for task, measured in run_tasks(tasks, 0 if full else workers):
        bar.update()
        for (name, seed, _), found in zip(task.rows, measured, strict=True):
            line = {"row": name, "seed": seed, "run": Path(task.recipe.run).name}
            line |= {"commit": at, "date": f"{today}", "cpu_seconds": costs(task), **found}
            with out.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            told = ", ".join(f"{k} {v['score']:.3f}" for k, v in found["tasks"].items())
            bar.write(f"{name}, seed {seed}: {told}", file=sys.stdout)
    bar.close()
    print(f"{len(read_lines(out))} results in {os.path.relpath(out)}")
