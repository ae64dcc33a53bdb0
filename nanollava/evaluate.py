"""Evaluation: a model over the recipe's tasks at each of its settings, resumable.

Each (task, setting) is one line of results.jsonl with a 95% bootstrap interval over questions;
what is there for the same weights is not done again. With several processes each answers its
share. A nano task is named nano-something: it is no benchmark.
"""

import hashlib
import json
import os
import string
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from scipy.stats import bootstrap
from tqdm import tqdm

from nanollava.anyres import Visual, open_image
from nanollava.metrics import METRICS
from nanollava.prompts import Turn, read_turns
from nanollava.recipe import Recipe, Source, Task, with_visual
from nanollava.sequence import Document, Writer
from nanollava.sources import images_of, records

BATCH = 8192  # positions of a batch of prompts
DIGITS = string.digits + string.ascii_letters + "+/"
AHEAD = 256  # questions whose views are in memory at once


def questions(task: Task, seed: int) -> list[tuple[list[Turn], list[bytes], str]]:
    """(turns up to the question, image bytes, reference answer) of each record of a task."""
    out = []
    for record in records(Source(task.path, task.split, task.samples), seed):
        images = images_of(record)
        *turns, last = read_turns(record["conversations"], len(images))
        out.append((turns, images, str(record.get("answer", last.text))))
    if not out:
        raise ValueError(f"{task.path} has no questions in its split {task.split}")
    return out


class Answer(NamedTuple):
    """What a model says; by default that of a question that it cannot be asked."""

    text: str = ""
    tokens: int = 0  # visual tokens that it saw
    cut: bool = False  # it took all the room that it had


def answer_all(
    assistant: Any,
    writer: Writer,
    items: Sequence[tuple],
    room: int,
    title: str,
    keep: Callable[[tuple, Answer], None] = lambda *_: None,
) -> list[Answer]:
    """Answers to items (turns, images, ...) of at most `room` tokens, with a progress bar.

    A question that is too long or whose image cannot be read is named, and its answer is empty:
    it counts as wrong. `keep` gets each item and its answer as it comes.
    """
    answers = [Answer()] * len(items)
    bar = tqdm(total=len(items), desc=title, disable=None, leave=False)
    for start in range(0, len(items), AHEAD):
        documents: list[tuple[int, Document]] = []
        for i, (turns, images, *_) in enumerate(items[start : start + AHEAD], start):
            try:
                pictures = [open_image(data) for data in images]
                documents.append((i, writer(turns, pictures, name=str(i), answer=True)))
            except ValueError as error:
                print(f"{title}, question {i}: {error}; counted as wrong")
        documents.sort(key=lambda pair: (*pair[1].prefix, len(pair[1].ids)), reverse=True)
        while documents:
            n = max(1, BATCH // (len(documents[0][1].ids) + room))
            batch, documents = documents[:n], documents[n:]
            then = documents[0][1].prefix if documents else None
            found = assistant.answer([d for _, d in batch], room, then)
            for (i, document), (text, cut) in zip(batch, found, strict=True):
                answers[i] = Answer(text, sum(lay.tokens for lay in document.layouts), cut)
                keep(items[i], answers[i])
            bar.update(len(batch))
    bar.close()
    return answers


def digits(rows: np.ndarray) -> str:
    """Scores in 0..1 as one character each, in 64 steps: what a comparison of questions needs."""
    return "".join(DIGITS[i] for i in np.rint(63 * rows).astype(int).ravel())


def interval(rows: np.ndarray, total: Any) -> tuple[float, float]:
    """95% percentile bootstrap over questions of `total`(rows)."""
    if len(rows) < 2 or (rows == rows[0]).all():
        return (total(rows),) * 2
    found = bootstrap(
        (np.arange(len(rows)),),
        lambda i: total(rows[i]),
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        random_state=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def chance(references: Sequence[str], metric: str) -> float:
    """What a guesser gets who knows all the answers, but not which belongs to which question."""
    score, total = METRICS[metric]
    draw, rounds, references = np.random.default_rng(0), [], sorted(references)
    for _ in range(100):
        guesses = draw.permutation(references).tolist()
        rounds.append(total(np.array([*map(score, guesses, references)], dtype=float)))
    return float(np.mean(rounds))


def ranks() -> tuple[int, int]:
    """The number of this process and how many there are; a launcher's processes meet here."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        dist.init_process_group()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def evaluate_task(assistant: Any, name: str, task: Task, visual: Visual) -> dict[str, Any] | None:
    """One task at one setting -> its result row (None on all processes but the first)."""
    recipe: Recipe = assistant.model.recipe
    rank, world = ranks()
    items, start, used = questions(task, recipe.seed), time.perf_counter(), time.process_time()
    mine, title = items[rank::world], f"{name}, grid {visual.max_grid}"
    writer = assistant.model.writer(visual)
    answers = answer_all(assistant, writer, mine, task.max_new_tokens, title)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    pairs = [(a.text, item[2], a.tokens) for a, item in zip(answers, mine, strict=True)]
    if world > 1:
        shares: list = [None] * world
        dist.all_gather_object(shares, pairs)
        pairs = [shares[i % world][i // world] for i in range(len(items))]  # as they were asked
    if rank:
        return None
    score, total = METRICS[task.metric]
    rows = np.array([score(p, r) for p, r, _ in pairs], dtype=float)
    low, high = interval(rows, total)
    return {
        "task": name,
        "metric": task.metric,
        "score": round(float(total(rows)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": len(pairs),
        "chance": round(chance([r for _, r, _ in pairs], task.metric), 4),
        "tokens": round(float(np.mean([n for *_, n in pairs])), 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used, 2),
        "each": digits(rows),
    }


def evaluate(assistant: Any, run: str | Path, only: Sequence[str] = (), limit: int = 0) -> list:
    """All tasks of the recipe at all of its settings; returns and appends the result rows."""
    recipe, run = assistant.model.recipe, Path(run)
    if not recipe.tasks:
        raise ValueError(f"the recipe of {run} has no tasks")
    tasks = {k: t for k, t in recipe.tasks.items() if t and (not only or k in only)}
    if unknown := set(only) - set(recipe.tasks):
        raise ValueError(f"unknown tasks {sorted(unknown)}; this recipe has {list(recipe.tasks)}")
    digest, done, rows = weights_digest(run), read_lines(run / "results.jsonl"), []
    for setting, changes in (recipe.settings or {"recipe": {}}).items():
        visual = with_visual(recipe, changes).visual
        for name, task in tasks.items():
            task = replace(task, samples=limit or task.samples)
            asked = {"keys": asdict(task), "visual": asdict(visual), "seed": recipe.seed}
            key = {"task": name, "setting": setting, "weights": digest, **asked}
            row = next((r for r in done if key.items() <= r.items()), None)
            if row is None:
                row = evaluate_task(assistant, name, task, visual)
                if row is None:
                    continue
                row = {**key, **row}
                add_line(run / "results.jsonl", row)
            rows.append(row)
    return rows


def weights_digest(folder: Path) -> str:
    """Tells the weights of a folder apart, in one file or in several."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            hashlib.file_digest(weights, lambda: found)
    return found.hexdigest()[:12]


def read_lines(file: Path) -> list[dict]:
    """The rows of a .jsonl file; what is no whole line, after a kill, is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def add_line(file: Path, row: dict) -> None:
    """Append a row, after half a line on a line of its own."""
    with file.open("ab+") as out:
        out.seek(-min(1, out.tell()), os.SEEK_END)
        torn = out.read() not in (b"", b"\n")
        out.write(("\n" * torn + json.dumps(row) + "\n").encode())
