"""Ablations: rows of changed keys on a base (rows.py) -> runs -> results, one line each.

    python -m nanollava ablate recipes/ablations/grids.yaml --seeds 5

Rows that begin alike share what they have in common: every stage has a run folder of its own, named
by a hash of all that it depends on.
"""

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from nanollava.ablations import rows as rows_of
from nanollava.ablations import verdicts
from nanollava.anyres import Visual, parse_budget
from nanollava.encoder import ENCODERS
from nanollava.evaluate import add_line, evaluate, read_lines
from nanollava.extras.environment import commit
from nanollava.extras.plan import plan
from nanollava.files import write_atomically
from nanollava.recipe import Recipe, read_recipe, run_keys, used_sources

TUNING = 100  # seeds from here on choose settings; their results are no evidence
ROOT = Path(__file__).parents[2]


def untiled(visual: Visual, T: int) -> Visual:
    """The visual keys that are left to matter where no image is tiled."""
    if parse_budget(visual.max_visual_tokens, T, T) < T:
        return visual
    keys = ("pool_stride", "pooling", "pool_after_projector") if visual.pool_stride > 1 else ()
    kept = {key: getattr(visual, key) for key in keys}
    return Visual(max_grid="base", max_visual_tokens="1T", **kept)


def ladder(recipe: Recipe, cache: Path) -> list[Recipe]:
    """The runs that end in the recipe's own, each one stage longer than the one before.

    For stages 1 and 2: a run of stage 1 alone, which other rows may share, then the whole.
    """
    rungs, stages = [], {}
    todo = {name: stage for name, stage in recipe.stages.items() if stage}
    for name, stage in todo.items():
        stages = {**stages, name: stage}
        shared = len(stages) < len(todo) and not any(s.anyres for s in stages.values())
        visual = untiled(recipe.visual, ENCODERS[recipe.encoder].side ** 2)
        part = replace(recipe, stages=stages, visual=visual if shared else recipe.visual)
        rungs.append(replace(part, run=str(cache / digest(content(part))), fresh=False))
    if not rungs:
        raise ValueError("a row without a stage trains nothing")
    return rungs


def content(recipe: Recipe) -> list:
    """All that a run depends on: its keys, the order of its sources, their content, its weights."""
    from nanollava.data import shard_folder

    sources = [[*stage.mix] for stage in recipe.stages.values()]
    shards = [shard_folder(recipe, name).name for name in sorted(used_sources(recipe))]
    local = [Path(recipe.encoder_weights), *sorted(Path(recipe.llm).glob("*.safetensors"))]
    weights = [hashlib.sha256(f.read_bytes()).hexdigest() for f in local if f.is_file()]
    packs = [stage.microbatch_tokens for stage in recipe.stages.values()]
    return [run_keys(recipe), sources, shards, weights, [] if recipe.isolate_documents else packs]


def digest(found: Any) -> str:
    """A short hash, the same wherever the repository lies."""
    text = json.dumps(found, sort_keys=True).replace(str(ROOT), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    begun, start = (run / "recipe.yaml").exists(), time.process_time()
    train(recipe)
    seconds = None if begun else round(time.process_time() - start, 1)  # else not all of it
    with write_atomically(run / "cost.json") as half:
        half.write_text(json.dumps({"cpu_seconds": seconds}))


@dataclass(frozen=True)
class Asked:
    """A row's measurement: which row, by which seed, on which tasks at which visual keys."""

    row: str
    seed: int
    tasks: dict[str, Any]
    infer: dict[str, str]
    key: str  # a hash of all that it depends on


def measure(recipe: Recipe, asked: Asked) -> dict[str, Any]:
    """Score a trained recipe; its losses, its cost and its tasks' scores."""
    from nanollava.generate import load
    from nanollava.runs import read_losses

    run, last = Path(recipe.run), [*recipe.stages][-1]
    losses = [r for r in read_losses(run) if r["stage"] == last and r["source"] == "all"]
    assistant, scores = load(run), {}
    known = assistant.model.recipe
    assistant.model.recipe = replace(known, tasks=asked.tasks, settings={"row": asked.infer})
    if any(asked.tasks.values()):
        keep = ("metric", "score", "n", "chance", "tokens", "cpu_seconds", "each")
        scores = {r["task"]: {k: r[k] for k in keep} for r in evaluate(assistant, run)}
    return {"losses": [round(float(r["loss"]), 3) for r in losses], "tasks": scores}


def planned_flops(recipe: Recipe) -> dict[str, int]:
    """Those of the last stage: the same for every row that is read off the run."""
    last = [*recipe.stages][-1]
    alone = replace(recipe, stages={last: recipe.stages[last]})
    return {"flops": round(plan(alone)[last]["flops"])}


def work(recipe: Recipe, before: str, asked: list[Asked]) -> list[dict]:
    """One run, and what it scores; told to a log file. Another sweep's turn is waited for."""
    Path(recipe.run).mkdir(parents=True, exist_ok=True)
    log = Path(recipe.run, "log.txt")
    with FileLock(f"{recipe.run}.lock"), log.open("a") as out:
        try:
            with redirect_stdout(out), redirect_stderr(out):
                make(recipe, before)
                cost = planned_flops(recipe) if asked else {}
                return [measure(recipe, one) | cost for one in asked]
        except Exception as error:
            rows = ", ".join(f"{one.row}, seed {one.seed}" for one in asked) or "what rows share"
            raise ValueError(f"{rows}: {type(error).__name__}: {error} (see {log})") from error


@dataclass
class Task:
    """A run that is to be made, after which other, and the rows that are read off it."""

    recipe: Recipe
    before: str
    asked: list[Asked] = field(default_factory=list)


def plan_tasks(file: Path, scale: str, seeds: range, only: list[str], done: set) -> dict[str, Task]:
    """Run folder -> task, in an order in which each comes after what it begins with."""
    rows, tasks = rows_of.read_rows(file, scale), {}
    if not rows:
        raise ValueError(f"{file} has no rows for a {scale} base")
    if unknown := {*only} - {*rows}:
        raise ValueError(f"{file} has no row {sorted(unknown)}; it has {list(rows)}")
    for seed in seeds:
        for name, row in rows.items():
            if (only and name not in only) or (row.missing and scale == "full"):
                continue
            recipe, before = read_recipe(row.base, row.keys, seed=seed), ""
            kept = {k: t for k, t in recipe.tasks.items() if t}
            key = digest([run_keys(recipe), row.infer, {k: asdict(t) for k, t in kept.items()}])
            if (name, seed, key) in done:
                continue
            for rung in ladder(recipe, ROOT / "runs/ablate"):
                task = tasks.setdefault(rung.run, Task(rung, before))
                before = rung.run
            task.asked.append(Asked(name, seed, kept, row.infer, key))
    return tasks


def pool(workers: int) -> ProcessPoolExecutor:
    """Each process makes five runs: it keeps half a GB of every one."""
    return ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=5)


def run_tasks(tasks: dict[str, Task], workers: int) -> Iterator[tuple[Task, list[dict]]]:
    """Yield (task, its measurements) as they are done, `workers` at a time; 0: here, in order."""
    args = {run: (t.recipe, t.before, t.asked) for run, t in tasks.items()}
    if not workers:
        for run, task in tasks.items():
            yield task, work(*args[run])
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the cores
    waiting, running = dict(tasks), {}
    with pool(workers) as processes:
        while waiting or running:
            open_ = {*waiting, *running.values()}
            ready = [run for run, task in waiting.items() if task.before not in open_]
            for run in ready[: workers - len(running)]:
                running[processes.submit(work, *args[run])] = run
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


def costs(tasks: dict[str, Task], task: Task) -> dict[str, float | None]:
    """CPU seconds of each stage, where it was trained in one go."""
    found = costs(tasks, tasks[task.before]) if task.before else {}
    cost = json.loads(Path(task.recipe.run, "cost.json").read_text())
    return found | {[*task.recipe.stages][-1]: cost["cpu_seconds"]}


def ablate(file: Path, seeds: int, first: int, only: list[str], workers: int, full: bool) -> None:
    """Train and score the rows of an ablation; goes on where it was stopped."""
    if first < TUNING < first + seeds:
        raise ValueError(f"seeds {first} to {first + seeds - 1}: from {TUNING} on is for tuning")
    scale, chosen = "full" if full else "nano", range(first, first + seeds)
    folder = ROOT / "runs/ablate" if full or first >= TUNING else file.parent / "results"
    out = folder / f"{file.stem}{'.full' if full else ''}.jsonl"
    verdicts.read_claims(file)  # what is wrong with them is told now
    done = {(line["row"], line["seed"], line["key"]) for line in read_lines(out)}
    tasks = plan_tasks(file, scale, chosen, only, done)
    at, today = commit(), datetime.date.today()
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(tasks), desc=file.stem, smoothing=0, file=sys.stdout)
    for task, measured in run_tasks(tasks, 0 if full else workers):
        bar.update()
        for asked, found in zip(task.asked, measured, strict=True):
            line = {"row": asked.row, "seed": asked.seed, "key": asked.key, "commit": at}
            line |= {"date": f"{today}", "run": Path(task.recipe.run).name}
            add_line(out, line | {"cpu_seconds": costs(tasks, task), **found})
            told = ", ".join(f"{k} {v['score']:.3f}" for k, v in found["tasks"].items())
            bar.write(f"{asked.row}, seed {asked.seed}: {told}", file=sys.stdout)
    bar.close()
    print(f"{len(read_lines(out))} results in {os.path.relpath(out)}")
