"""Score a run and print what there is to see: a table and, after training, what to type next."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanollava.evaluate import evaluate, questions, ranks
from nanollava.generate import Assistant, load
from nanollava.metrics import METRICS
from nanollava.prompts import PLACEHOLDER
from nanollava.recipe import Recipe


def score(run: Path, tasks: list[str], limit: int, trained: Recipe | None = None) -> None:
    """Evaluate a run. The first process prints the table and, after training, the next command.

    `trained`: the recipe of the training that has just ended. Its tasks may have been changed
    since the run folder was written.
    """
    assistant = load(run)
    if trained is not None:
        recipe = replace(assistant.model.recipe, tasks=trained.tasks, settings=trained.settings)
        assistant.model.recipe = recipe
    results = evaluate(assistant, run, tasks, limit)
    if ranks()[0] == 0:
        show_scores(results)
        if trained is not None:
            print(f"\nNext: {save_sample(assistant, run)}")


def save_sample(assistant: Assistant, run: str | Path) -> str:
    """Write an image of the first task into the run folder; returns the command that asks about it.

    It is the first question of 20 that the model answers right, or else the last of them.
    """
    recipe = assistant.model.recipe
    task = next(task for task in recipe.tasks.values() if task)
    score, total = METRICS[task.metric]
    file = Path(run) / "sample.png"
    command = f"python -m nanollava chat {run} IMAGE QUESTION"
    # A right answer makes the better example, but a weak model may not give one soon.
    few = replace(task, samples=min(20, task.samples or 20))
    for turns, images, reference in questions(few, recipe.seed):
        if not images:
            continue
        question = turns[-1].text.replace(PLACEHOLDER, "").strip()
        answer = assistant.chat(images[0], question, max_new_tokens=task.max_new_tokens)
        file.write_bytes(images[0])
        command = f'python -m nanollava chat {run} {file} "{question}"  # true: {reference}'
        # METRICS score many answers at once: here they are one.
        if total(np.array([score(answer, reference)], dtype=float)) == 1:
            break
    return command


def show_scores(results: Sequence[dict]) -> None:
    """Print the scores of each task at each setting, with their 95% intervals."""
    rows: dict[str, dict[str, str]] = {}  # task: {column: text}
    for result in results:
        percent = {key: f"{100 * result[key]:.1f}" for key in ("score", "low", "high", "chance")}
        row = rows.setdefault(result["task"], {"metric": result["metric"]})
        row["chance"] = percent["chance"]
        row[result["setting"]] = "{score} [{low}, {high}]".format(**percent)
    # In the order of their first appearance: metric, chance, then the settings.
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    table = Table(title="score in %, with its 95% interval over questions", box=SIMPLE)
    table.add_column("task", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "metric" else "right")
    for task, row in rows.items():
        table.add_row(task, *(row.get(column, "") for column in columns))
    Console().print(table)
