"""Evaluation: scores a model on the recipe's tasks, at each of the recipe's visual settings.

Each (task, setting) is one line of results.jsonl, with a 95% bootstrap interval over questions. A
line that is already there for the same weights and the same questions is not computed again, so an
interrupted evaluation resumes. With several processes, each answers its share of the questions.
The nano tasks are named nano-something, because their scores are not those of a benchmark.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from scipy.stats import bootstrap
from tqdm import tqdm

from nanollava.anyres import Visual, open_image
from nanollava.files import add_line, read_lines, weights_digest
from nanollava.metrics import METRICS
from nanollava.prompts import Turn, read_turns
from nanollava.recipe import Source, Task, with_visual
from nanollava.sequence import Document, Writer
from nanollava.sources import images_of, records

BATCH = 8192  # positions of a batch of prompts, with their answers
AHEAD = 256  # questions whose views are in memory at once
# One character per score from 0 to 1, in 64 steps, as older result lines have them.
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/"


class Answer(NamedTuple):
    """What a model says; the default stands for a question that could not be asked."""

    text: str = ""
    tokens: int = 0  # visual tokens that the model saw
    cut: bool = False  # the answer reached max_new_tokens


def questions(task: Task, seed: int) -> list[tuple[list[Turn], list[bytes], str]]:
    """(turns up to the question, image files, reference answer) of each record of a task."""
    found = []
    for record in records(Source(task.path, task.split, task.samples), seed):
        images = images_of(record)
        # The last turn answers the question. A nano record also has the value alone as `answer`.
        *turns, last = read_turns(record["conversations"], len(images))
        found.append((turns, images, str(record.get("answer", last.text))))
    if not found:
        raise ValueError(f"{task.path} has no questions in split {task.split!r}; choose another")
    return found


def answer_all(
    assistant: Any,
    writer: Writer,
    asked: Sequence[tuple],
    max_new_tokens: int,
    title: str,
    keep: Callable[[tuple, Answer], None] = lambda *_: None,
) -> list[Answer]:
    """Answer all questions (turns, images, ...), with a progress bar.

    A question that is too long, or whose image cannot be read, is reported; its answer is empty and
    so counts as wrong. `keep` is called with each question and its answer, as soon as it is there.
    """
    answers = [Answer()] * len(asked)  # wrong, unless they are answered below
    bar = tqdm(total=len(asked), desc=title, disable=None, leave=False)
    for start in range(0, len(asked), AHEAD):
        documents: list[Document] = []
        for i, (turns, images, *_) in enumerate(asked[start : start + AHEAD], start):
            try:
                pictures = [open_image(data) for data in images]
                documents.append(writer(turns, pictures, name=str(i), answer=True))
            except ValueError as error:
                print(f"{title}, question {i}: {error}; counted as wrong")
        # Questions about the same images become neighbours, so that their shared prefix is computed
        # once. Within the same images the longest prompt comes first: it decides the batch size.
        documents.sort(key=lambda document: (*document.prefix, len(document.ids)), reverse=True)
        while documents:
            size = max(1, BATCH // (len(documents[0].ids) + max_new_tokens))
            batch, documents = documents[:size], documents[size:]
            # The cache of this batch's prefix is kept only if the next batch begins with it.
            next_prefix = documents[0].prefix if documents else None
            replies = assistant.answer(batch, max_new_tokens, next_prefix)
            for document, (text, cut) in zip(batch, replies, strict=True):
                i = int(document.name)  # its place among the questions
                answers[i] = Answer(text, sum(layout.tokens for layout in document.layouts), cut)
                keep(asked[i], answers[i])
            bar.update(len(batch))
    bar.close()
    return answers


def interval(scores: np.ndarray, total: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """95% percentile bootstrap over questions of `total(scores)`."""
    if len(scores) < 2 or (scores == scores[0]).all():
        return total(scores), total(scores)  # without a spread there is nothing to resample

    def resample(drawn: np.ndarray) -> float:
        return total(scores[drawn])

    # Question numbers are drawn, not scores: for F1 the two scores of a question stay together.
    numbers = np.arange(len(scores))
    found = bootstrap((numbers,), resample, n_resamples=1000, method="percentile", random_state=0)
    low, high = found.confidence_interval
    return float(low), float(high)


def chance(references: Sequence[str], metric: str) -> float:
    """The score of someone who knows all answers, but not which belongs to which question: the mean
    over 100 shuffles.
    """
    score, total = METRICS[metric]
    # Sorted first: the same answers have the same chance in any order of the questions.
    rng, references = np.random.default_rng(0), sorted(references)
    shuffles = [rng.permutation(references).tolist() for _ in range(100)]
    scores = [np.array([*map(score, guesses, references)], dtype=float) for guesses in shuffles]
    return float(np.mean([total(shuffled) for shuffled in scores]))


def question_scores(result: dict) -> np.ndarray:
    """The scores of a result's questions: (n,), or (n, 2) for F1: the model said yes, yes is true.

    Older lines hold one character per score, which stands for one of 64 steps from 0 to 1.
    """
    scores = result["each"]  # one per question, in the order of the questions
    if isinstance(scores, str):
        scores = [DIGITS.index(character) / 63 for character in scores]
    values = np.array(scores, dtype=float)
    return values if len(values) == result["n"] else values.reshape(-1, 2)


def ranks() -> tuple[int, int]:
    """The number of this process, and how many there are. A launcher's processes meet here."""
    # torchrun and composer set WORLD_SIZE; one process alone needs no process group.
    if os.environ.get("WORLD_SIZE", "1") != "1" and not dist.is_initialized():
        dist.init_process_group()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def evaluate_task(assistant: Any, name: str, task: Task, visual: Visual) -> dict:
    """One task at one setting -> its result, on every process."""
    rank, world = ranks()
    asked = questions(task, assistant.model.recipe.seed)
    # Wall time depends on what else runs on the machine; the ablations compare CPU time.
    start, cpu_start = time.perf_counter(), time.process_time()
    writer = assistant.model.writer(visual)
    title = f"{name}, grid {visual.max_grid}"
    answers = answer_all(assistant, writer, asked[rank::world], task.max_new_tokens, title)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if world > 1:  # process r has answered questions r, r + world, r + 2 * world, ...
        shares = [answers] * world
        dist.all_gather_object(shares, answers)
        answers = [shares[i % world][i // world] for i in range(len(asked))]
    score, total = METRICS[task.metric]
    references = [reference for _, _, reference in asked]
    pairs = zip(answers, references, strict=True)
    # (n,) or, for F1, (n, 2)
    scores = np.array([score(answer.text, reference) for answer, reference in pairs], dtype=float)
    low, high = interval(scores, total)
    return {
        "task": name,
        "metric": task.metric,
        "score": round(float(total(scores)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": len(asked),
        "chance": round(chance(references, task.metric), 4),
        "tokens": round(float(np.mean([answer.tokens for answer in answers])), 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "each": np.round(scores, 4).tolist(),
    }


def evaluate(assistant: Any, run: Path, only: Sequence[str] = (), limit: int = 0) -> list[dict]:
    """All tasks of the recipe at all of its settings -> results; the first process appends new ones
    to the run's results.jsonl. `only` names some of the tasks; `limit` is a number of questions.
    """
    recipe = assistant.model.recipe
    file = run / "results.jsonl"
    if not recipe.tasks:
        raise ValueError(f"the recipe of {run} has no tasks; give it some under `tasks`")
    if unknown := sorted(set(only) - set(recipe.tasks)):
        raise ValueError(f"unknown tasks {unknown}; choose from {list(recipe.tasks)}")
    tasks = {k: t for k, t in recipe.tasks.items() if t and (not only or k in only)}
    weights = weights_digest(run)
    known, results = read_lines(file), []  # every process reads before the first one writes
    for setting, changes in (recipe.settings or {"recipe": {}}).items():
        visual = with_visual(recipe, changes).visual
        for name, task in tasks.items():
            task = replace(task, samples=limit or task.samples)
            # All that a score depends on. A changed key means another line, not another value.
            key = {"task": name, "setting": setting, "weights": weights}
            key |= {"keys": asdict(task), "visual": asdict(visual), "seed": recipe.seed}
            result = next((line for line in known if is_result_of(line, key)), None)
            if result is None:
                result = key | evaluate_task(assistant, name, task, visual)
                if ranks()[0] == 0:
                    add_line(file, result)
            results.append(result)
    return results


def is_result_of(line: dict, key: dict) -> bool:
    """Does a line of results.jsonl hold the result of this key?

    The line may be older than a key of Task or Visual: one that it lacks counts as its default.
    """
    keys = asdict(Task("", "")) | line.get("keys", {})
    visual = asdict(Visual()) | line.get("visual", {})
    return key.items() <= (line | {"keys": keys, "visual": visual}).items()
