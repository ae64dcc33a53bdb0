"""Ablations: the rows of a file (rows.py), each trained and scored with several seeds.

    python -m nanollava ablate recipes/ablations/grids.yaml --seeds 5

1. `plan_jobs`: a row and a seed make a recipe, and each stage of it is a job with a run folder of
   its own, named by a hash of all that its weights depend on. Rows that begin with the same stages
   share these jobs, and rows that differ only in `infer` share all of them.
2. `run_jobs`: processes train the jobs, each after the one that it starts from, and score the rows
   that end with it.
3. `ablate`: each row and seed becomes a line of results/FILE.jsonl, with a key that hashes all that
   its scores depend on. A line that is already there is not measured again.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from nanollava.ablations.rows import Row, read_rows
from nanollava.ablations.verdicts import read_claims
from nanollava.anyres import Visual, parse_budget
from nanollava.encoder import ENCODERS
from nanollava.evaluate import add_line, evaluate, read_lines
from nanollava.extras.environment import commit
from nanollava.extras.plan import plan
from nanollava.files import PACKAGE, write_atomically
from nanollava.recipe import Recipe, Task, hashed, read_recipe, run_keys, used_sources

TUNING = 100  # seeds from here on choose settings; their results are not evidence
RUNS = Path("runs/ablate")  # below the current folder, like all outputs
KEPT = ("metric", "score", "n", "chance", "tokens", "cpu_seconds", "each")  # of a task's result


@dataclass(frozen=True)
class Measurement:
    """A line of results that is still to be measured: one row with one seed."""

    row: str
    seed: int
    tasks: dict[str, Task]
    infer: dict[str, str]  # visual keys that are changed after training
    key: str  # a hash of all that the scores depend on


@dataclass
class Job:
    """One stage to train in a run folder of its own, and the rows to score on its weights."""

    recipe: Recipe  # with the stages so far; its `run` is the folder
    start: str = ""  # the run folder that has the stages before; "" for the first stage
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """The stage that it trains."""
        return [*self.recipe.stages][-1]


def ablate(file: Path, seeds: int, first: int, only: list[str], workers: int, full: bool) -> None:
    """Train and score the rows of an ablation with each seed; resumes if interrupted."""
    if first < TUNING < first + seeds:
        raise ValueError(
            f"seeds {first} to {first + seeds - 1} are mixed: those from {TUNING} on are for "
            "tuning and those below are evidence. Run them apart"
        )
    read_claims(file)  # report a mistake in a claim before anything is trained
    folder = RUNS if full or first >= TUNING else file.parent / "results"
    out = folder / f"{file.stem}{'.full' if full else ''}.jsonl"
    done = {(line["row"], line["seed"], line["key"]) for line in read_lines(out)}
    scale = "full" if full else "nano"
    jobs = plan_jobs(file, scale, range(first, first + seeds), only, done)
    folder.mkdir(parents=True, exist_ok=True)
    # What all lines of this sweep have in common.
    origin = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    ended = run_jobs(jobs, 0 if full else workers)
    costs = {}  # run folder -> CPU seconds of each stage that led to it
    bar = tqdm(ended, file.stem, len(jobs), smoothing=0, file=sys.stdout)
    for job, results in bar:
        run = Path(job.recipe.run)
        cost = json.loads((run / "cost.json").read_text())
        costs[job.recipe.run] = costs.get(job.start, {}) | {job.stage: cost["cpu_seconds"]}
        shared = origin | {"run": run.name, "cpu_seconds": costs[job.recipe.run]}
        for wanted, result in zip(job.measurements, results, strict=True):
            line = {"row": wanted.row, "seed": wanted.seed, "key": wanted.key}
            add_line(out, line | shared | result)
            scores = [f"{name} {task['score']:.3f}" for name, task in result["tasks"].items()]
            bar.write(f"{wanted.row}, seed {wanted.seed}: {', '.join(scores)}")
    print(f"{len(read_lines(out))} results in {os.path.relpath(out)}")


# ---- 1. rows and seeds -> jobs


def plan_jobs(file: Path, scale: str, seeds: range, only: list[str], done: set) -> dict[str, Job]:
    """Run folder -> job, each after the one that it starts from.

    `done`: (row, seed, key) of the lines that need not be measured again.
    """
    rows = chosen_rows(file, scale, only)
    jobs = {}
    for seed in seeds:
        for name, row in rows.items():
            recipe = read_recipe(row.base, row.keys, seed=seed)
            wanted = measurement(name, row, recipe)
            if (name, seed, wanted.key) in done:
                continue
            # Each part starts from the one before. Rows with an equal part share its job.
            start = ""
            for part in split_stages(recipe, repository(row.base)):
                job = jobs.setdefault(part.run, Job(part, start))
                start = part.run
            job.measurements.append(wanted)
    return jobs


def chosen_rows(file: Path, scale: str, only: list[str]) -> dict[str, Row]:
    """The rows of a file, or those named in `only`, that can be run at this scale."""
    rows = read_rows(file, scale)
    if not rows:
        raise ValueError(f"{file} has no rows for a {scale} base")
    unknown = sorted({*only} - {*rows})
    if unknown:
        raise ValueError(f"{file} has no row {unknown}; it has {list(rows)}")
    return {
        name: row
        for name, row in rows.items()
        if name in (only or rows) and not (row.missing and scale == "full")
    }


def measurement(name: str, row: Row, recipe: Recipe) -> Measurement:
    """What is to be measured of a row, by the seed of its recipe."""
    tasks = {name: task for name, task in recipe.tasks.items() if task}
    task_keys = {name: hashed(task) for name, task in tasks.items()}
    key = digest(recipe, repository(row.base), row.infer, task_keys)
    return Measurement(name, recipe.seed, tasks, row.infer, key)


def split_stages(recipe: Recipe, root: Path) -> list[Recipe]:
    """A recipe of stages 1 and 2 -> one that ends after stage 1, and the whole."""
    stages = {name: stage for name, stage in recipe.stages.items() if stage}
    if not stages:
        raise ValueError("the row has no stages, so that nothing would be trained")
    parts = []
    begun = {}
    for name, stage in stages.items():
        begun = {**begun, name: stage}
        part = replace(recipe, stages=begun, fresh=False)
        # Without tiles, rows that differ in tiling alone can share this part. The whole recipe
        # keeps its own keys: its run is also what the rows are scored on.
        if begun != stages and not any(x.anyres for x in begun.values()):
            part = replace(part, visual=untiled(recipe.visual, ENCODERS[recipe.encoder].side ** 2))
        parts.append(replace(part, run=str(RUNS / run_name(part, root))))
    return parts


def untiled(visual: Visual, T: int) -> Visual:
    """The visual keys of stages without tiles, where most keys do not matter: rows that differ in
    those alone get equal keys, and share the run.
    """
    if parse_budget(visual.max_visual_tokens, T, T) < T:
        return visual  # the budget shrinks even the base view, so that every key matters
    plain = Visual(max_grid="base", max_visual_tokens="1T")
    if visual.pool_stride == 1:
        return plain
    pooled = ("pool_stride", "pooling", "pool_after_projector")
    return replace(plain, **{key: getattr(visual, key) for key in pooled})


def run_name(recipe: Recipe, root: Path) -> str:
    """A hash of the recipe, the order and the content of its sources, and its local weights."""
    from nanollava.data import shard_folder

    mixes = [list(stage.mix) for stage in recipe.stages.values()]
    shards = [shard_folder(recipe, name).name for name in sorted(used_sources(recipe))]
    files = [Path(recipe.encoder_weights), *sorted(Path(recipe.llm).glob("*.safetensors"))]
    weights = [hashlib.sha256(x.read_bytes()).hexdigest() for x in files if x.is_file()]
    # Which documents share a microbatch matters only where they see each other.
    packs = [stage.microbatch_tokens for stage in recipe.stages.values()]
    return digest(recipe, root, mixes, shards, weights, [] if recipe.isolate_documents else packs)


def digest(recipe: Recipe, root: Path, *others: Any) -> str:
    """A short hash of a recipe's keys and of `others`, the same wherever the repository lies."""
    # Local paths in a recipe are absolute, and where the repository lies differs by machine.
    text = json.dumps([run_keys(recipe), *others], sort_keys=True)
    # A project's base may lie in nanollava's own checkout.
    text = text.replace(str(root), "").replace(str(PACKAGE.parent), "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def repository(base: Path) -> Path:
    """The folder of a recipe's project, whose place on the disk is not part of a hash."""
    for folder in base.parents:
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return base.parent


# ---- 2. jobs -> measured rows


def run_jobs(jobs: dict[str, Job], workers: int) -> Iterator[tuple[Job, list[dict]]]:
    """Yield each job and its rows' results when it ends; `workers` at once, 0: here, in order."""
    if not workers:
        for job in jobs.values():
            yield job, run_job(job)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores
    waiting = dict(jobs)
    running = {}  # future -> run folder
    with worker_pool(workers) as processes:
        while waiting or running:
            unfinished = {*waiting, *running.values()}
            # Start the jobs whose first stages are trained, as far as workers are free.
            ready = [run for run, job in waiting.items() if job.start not in unfinished]
            for run in ready[: workers - len(running)]:
                running[processes.submit(run_job, waiting.pop(run))] = run
            # Hand over what has ended. An error ends the sweep here: no other job is started.
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield jobs[running.pop(future)], future.result()


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes; each ends after five jobs, since it keeps half a GB of every one."""
    return ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=5)


def run_job(job: Job) -> list[dict]:
    """Train a job and score its rows; what is printed goes to log.txt in the run folder.

    Waits where another sweep is at work on the same run. Raises ValueError that names the rows.
    """
    run = Path(job.recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    log = run / "log.txt"
    with FileLock(f"{run}.lock"), log.open("a") as out:
        try:
            with redirect_stdout(out), redirect_stderr(out):
                train_job(job)
                return score_job(job) if job.measurements else []
        except Exception as error:
            rows = ", ".join(f"{x.row}, seed {x.seed}" for x in job.measurements)
            reason = f"{type(error).__name__}: {error} (see {log})"
            raise ValueError(f"{rows or 'a stage that rows share'}: {reason}") from error


def train_job(job: Job) -> None:
    """Train the last stage of a job's recipe; the run that it starts from has the others."""
    from nanollava.data import prepare
    from nanollava.train import train

    run = Path(job.recipe.run)
    cost_file = run / "cost.json"
    if cost_file.exists():  # this run is complete
        return
    *earlier, _ = job.recipe.stages
    # The trainer loads a stage that is already in the run folder instead of training it.
    for stage in earlier:
        if not (run / stage).exists():
            (run / stage).symlink_to(os.path.relpath(Path(job.start, stage), run))
    prepare(job.recipe)  # many runs share the shards: not part of this one's cost
    resumed = (run / "recipe.yaml").exists()
    start = time.process_time()
    train(job.recipe)
    seconds = round(time.process_time() - start, 1)
    # A resumed run took longer than what was measured here, so that its cost is unknown.
    with write_atomically(cost_file) as half:
        half.write_text(json.dumps({"cpu_seconds": None if resumed else seconds}))


def score_job(job: Job) -> list[dict]:
    """For each row of a job: losses and FLOPs of the last stage, which they share, and scores."""
    from nanollava.runs import read_losses

    run = Path(job.recipe.run)
    steps = [x for x in read_losses(run) if x["stage"] == job.stage and x["source"] == "all"]
    losses = [round(float(step["loss"]), 3) for step in steps]
    # Counted on this stage's own pages, since the stages before may be shared.
    alone = replace(job.recipe, stages={job.stage: job.recipe.stages[job.stage]})
    flops = round(plan(alone)[job.stage]["flops"])
    return [
        {"losses": losses, "tasks": score_row(run, wanted), "flops": flops}
        for wanted in job.measurements
    ]


def score_row(run: Path, wanted: Measurement) -> dict[str, dict]:
    """Task -> its score and what else is kept of its result."""
    from nanollava.generate import load

    if not wanted.tasks:
        return {}
    assistant = load(run)
    # `evaluate` takes tasks and visual keys from the model's recipe: give it those of the row.
    trained = assistant.model.recipe
    assistant.model.recipe = replace(trained, tasks=wanted.tasks, settings={"row": wanted.infer})
    results = evaluate(assistant, run)
    return {result["task"]: {key: result[key] for key in KEPT} for result in results}
