"""What is printed after an evaluation: the table of scores and, after a training, what to type."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanollava.evaluate import questions
from nanollava.metrics import METRICS
from nanollava.prompts import PLACEHOLDER


def save_sample(assistant: Any, run: str | Path) -> str:
    """Write an image of the first task, one that is answered right if there is one soon, into the
    run folder; returns the command that asks about it.
    """
    recipe, file = assistant.model.recipe, Path(run) / "sample.png"
    task = next(task for task in recipe.tasks.values() if task)
    score, total = METRICS[task.metric]
    told = f"python -m nanollava chat {run} IMAGE QUESTION"
    few = replace(task, samples=min(20, task.samples or 20))
    for turns, images, reference in questions(few, recipe.seed):
        if images:
            question = turns[-1].text.replace(PLACEHOLDER, "").strip()
            answer = assistant.chat(images[0], question, max_new_tokens=task.max_new_tokens)
            file.write_bytes(images[0])
            told = f'python -m nanollava chat {run} {file} "{question}"  # true: {reference}'
            if total(np.array([score(answer, reference)], dtype=float)) == 1:
                break
    return told


def show_scores(rows: Sequence[dict]) -> None:
    """Print scores by task and setting, each with its 95% interval."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        mine = cells.setdefault(row["task"], {"metric": row["metric"]})
        score, low, high, mine["chance"] = (
            f"{100 * row[key]:.1f}" for key in ("score", "low", "high", "chance")
        )
        mine[row["setting"]] = f"{score} [{low}, {high}]"
    columns = list(dict.fromkeys(key for mine in cells.values() for key in mine))
    table = Table(title="score in %, with its 95% interval over questions", box=SIMPLE)
    table.add_column("task", no_wrap=True)
    for key in columns:
        table.add_column(key, justify="left" if key == "metric" else "right")
    for name, mine in cells.items():
        table.add_row(name, *(mine.get(key, "") for key in columns))
    Console().print(table)
