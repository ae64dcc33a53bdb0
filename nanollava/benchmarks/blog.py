"""The columns of the blog's tables, what their judges cost, and our scores next to the blog's.

A column is a task of lmms-eval, one of that task's metrics and a unit. MME's column, for example,
is 100 x (perception + cognition) / 2800. Nothing in this file needs lmms-eval; `lmms.py`, which
runs the tasks, does.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanollava.ablations.rows import TABLES

STATES = ("judged", "refused", "unreadable", "failed")  # how a question to a judge can end


@dataclass(frozen=True)
class Judging:
    """What a judged task costs."""

    questions: int  # 0: one for each of your images
    tokens: int  # that the judge reads per question


@dataclass(frozen=True)
class Column:
    """A column of the blog's tables."""

    name: str
    task: str  # of lmms-eval, or of recipes/eval
    metric: str  # as the task calls it; several are joined by + and added
    unit: float = 100  # the blog prints the metric times this
    note: str = ""  # printed with a score
    judge: dict[str, int] | None = None  # of a judged task: the fields of Judging


COLUMNS = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text())
BLOG = {name: Column(name, **fields) for name, fields in COLUMNS.items()}
TASKS = {column.task: column for column in BLOG.values()}
JUDGED = {task: Judging(**column.judge) for task, column in TASKS.items() if column.judge}
VERDICT = 150  # tokens that the judge writes per question, about
HEADINGS = {"task": "left", "column": "left", "ours": "right", "the blog": "right"}


def find_tasks(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of tasks or columns, or `blog` for all columns -> tasks, each once.

    Raises ValueError for a name that is not `known`, with the names closest to it.
    """
    tasks = []
    for name in names:
        if name == "blog":
            tasks += TASKS
        else:
            tasks.append(BLOG[name].task if name in BLOG else name)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*known, *BLOG], 3, 0.5)
        problem = f"unknown tasks {unknown}; close to the first: {close}"
        raise ValueError(f"{problem}. Choose from `lmms-eval tasks list`, or write `blog` for all")
    return [*dict.fromkeys(tasks)]


def images_folder(task: str) -> Path:
    """Where you put the images of an Image-DC task: the blog's were never released."""
    return Path(f"data/{task.replace('_own', '')}")


def tell_price(task: str, limit: int) -> None:
    """Print what judging a task costs at most; judgements that are kept already cost nothing.

    The price is in tokens. With JUDGE_PRICE=IN,OUT, the dollars for a million tokens that the judge
    reads and writes, it is also in dollars.
    """
    if task not in JUDGED or os.environ.get("RANK", "0") != "0":
        return
    questions = JUDGED[task].questions or len([*images_folder(task).glob("*")])
    questions = min(questions, limit or questions)
    tokens_in, tokens_out = questions * JUDGED[task].tokens, questions * VERDICT
    price = f"about {tokens_in / 1e3:,.0f}k tokens in and {tokens_out / 1e3:,.0f}k out"
    dollars = os.environ.get("JUDGE_PRICE", "")
    if re.fullmatch(r"[\d.]+,[\d.]+", dollars):
        price_in, price_out = map(float, dollars.split(","))
        price += f", ${(tokens_in * price_in + tokens_out * price_out) / 1e6:.2f}"
    elif dollars:
        raise ValueError(f"JUDGE_PRICE is {dollars!r}; expected IN,OUT. Write, for example, 2.5,10")
    if questions:
        print(f"{task}: the judge is asked at most {questions} questions, {price}")


def value_of(column: Column, values: dict[str, Any]) -> float | None:
    """A task's values in the blog's unit; None if its metric is missing."""
    parts = [values.get(metric) for metric in column.metric.split("+")]
    return None if None in parts else column.unit * sum(parts)


def row_of(beside: str) -> tuple[dict[str, Any], str]:
    """'T4:0' -> what the blog prints in that row, by column, and a title for it."""
    name, _, place = beside.partition(":")
    if name not in TABLES or not place.isdigit() or int(place) >= len(TABLES[name]["rows"]):
        problem = f"--beside {beside!r} is not a row of the blog's tables {', '.join(TABLES)}"
        raise ValueError(f"{problem}. Write TABLE:ROW, like T4:0; rows count from 0")
    table = TABLES[name]
    columns = [*table["factors"], *table["metrics"]]
    row = dict(zip(columns, table["rows"][int(place)], strict=True))
    return row, ", ".join([name, *(f"{row[factor]}" for factor in table["factors"])])


def show(results: dict[str, dict], reasons: dict[str, str], beside: str, limit: int) -> None:
    """Print our scores next to a row of the blog's, then the notes.

    `results`: task -> its values; `reasons`: task -> why it has none.
    """
    row, title = row_of(beside)
    table, notes = Table(title=f"next to the blog's {title}", box=SIMPLE), []
    for heading, side in HEADINGS.items():
        table.add_column(heading, justify=side, no_wrap=True)
    for task in [*results, *reasons]:
        ours, note = "-", reasons.get(task)
        if task in results:
            ours, note = describe(task, results[task], beside, limit)
        column = TASKS[task].name if task in TASKS else ""
        # T2 calls scienceqa_img plain scienceqa.
        blog = row.get(column, row.get(column.removesuffix("_img"), "-"))
        table.add_row(task, column, ours, f"{blog}")
        if note:
            notes.append(f"{task}: {note}")
    Console().print(table)
    print("\n".join(notes))


def describe(task: str, values: dict[str, Any], beside: str, limit: int) -> tuple[str, str]:
    """A task's cell in the printed table, and what a reader must know about it."""
    column = TASKS.get(task)
    notes = [f"the first {values['n']:g}"] if limit else []
    # Two tables print MME in another unit, as blog.json's notes say.
    if task == "mme" and beside.startswith(("T2:", "T3:")):
        column = replace(column, metric="mme_perception_score", unit=100 / 2000)
        notes.append("perception / 2000, as this table prints it")
    if column and column.note:
        notes.append(column.note)
    counts = [f"{values[state]:g} {state}" for state in STATES if values.get(state)]
    if counts:
        notes.append(f"{', '.join(counts)} by {', '.join(values['judges']) or 'no judge'}")
    unreadable = values["unreadable images"]
    if unreadable:
        notes.append(f"{len(unreadable)} unreadable, counted as wrong: {', '.join(unreadable[:3])}")
    value = value_of(column, values) if column else None
    if value is not None:
        return f"{value:.1f}", "; ".join(notes)
    # The blog has no column for this task: print all of its metrics.
    others = [f"{k} {x:.4g}" for k, x in values.items() if isinstance(x, float) and k not in STATES]
    return ", ".join(others), "; ".join(notes)
