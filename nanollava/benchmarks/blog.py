"""The blog's benchmarks by lmms-eval, in the blog's units, beside a row of its tables.

    python -m nanollava evaluate runs/mine --tasks blog
    python -m nanollava evaluate runs/mine --tasks docvqa_val,pope --limit 100
    composer -n 8 -m nanollava evaluate runs/mine --tasks blog

What was scored is a line of benchmarks.jsonl in the run's folder, and every answer is kept: the
same command goes on where it was stopped. What cannot be scored is named with its reason.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanollava.ablations.rows import TABLES

TOKENS = 4  # characters of English, about
PICTURE = 765  # tokens of one, at OpenAI's high detail


@dataclass(frozen=True)
class Column:
    """A column of the blog's tables."""

    task: str  # of lmms-eval, or of recipes/eval
    metric: str | tuple[str, ...]  # as the task calls it; several are added
    unit: float = 100  # times this: what the blog prints
    note: str = ""
    judged: tuple[int, int, int] = ()  # questions, characters asked besides the answer, pictures


BLOG = {
    "ai2d": Column("ai2d", "exact_match"),
    "chartqa": Column("chartqa", "relaxed_overall"),
    "docvqa": Column("docvqa_val", "anls"),
    "infovqa": Column("infovqa_val", "anls"),
    "mathvista": Column(
        "mathvista_testmini_direct",
        "accuracy",
        note="without GPT-4's extraction: what is no bare answer is wrong",
    ),
    "mme": Column("mme", ("mme_perception_score", "mme_cognition_score"), 100 / 2800),
    "mmmu": Column("mmmu_val_2024", "mmmu_acc"),
    "scienceqa_img": Column("scienceqa_img", "exact_match"),
    "okvqa": Column("ok_vqa_val2014", "exact_match"),
    "pope": Column("pope", "pope_f1_score"),
    "vizwiz": Column("vizwiz_vqa_val", "exact_match"),
    "synthdog": Column("synthdog_en", "tree_edit_distance", 1, "a sum over 500 pages"),
    "ocrbench": Column("ocrbench", "ocrbench_accuracy"),
    "cmmmu": Column("cmmmu_val", "cmmmu_acc"),
    "llava_w": Column("llava_w_2024", "judge_score", 1, judged=(60, 3500, 0)),
    "video_dc": Column("video_dc_2024", "judge_score", 20, judged=(499, 2500, 0)),
    "image_dc_en": Column(
        "image_dc_own_en", "judge_score", 1, "your images: the blog's are not released", (0, 700, 1)
    ),
    "image_dc_cn": Column("image_dc_own_cn", "judge_score", 1, "your images", (0, 700, 1)),
}
COLUMNS = {column.task: name for name, column in BLOG.items()}


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names or columns of the blog -> tasks; ValueError with the nearest for one that is none."""
    tasks = []
    for name in names:
        tasks += (
            [c.task for c in BLOG.values()]
            if name == "blog"
            else [BLOG[name].task if name in BLOG else name]
        )
    if unknown := [name for name in tasks if name not in known]:
        near = [n for u in unknown for n in difflib.get_close_matches(u, [*known, *BLOG], 3, 0.5)]
        raise ValueError(
            f"unknown tasks {unknown}; near: {near or 'none'}. `blog` is all of the "
            "blog's; lmms-eval tasks list shows all"
        )
    return [*dict.fromkeys(tasks)]


def price(column: Column, questions: int) -> str:
    """What judging costs: tokens, and dollars where JUDGE_PRICE=IN,OUT of a million is given."""
    _, asked, pictures = column.judged
    read = questions * ((asked + 3000) // TOKENS + PICTURE * pictures)  # answers of 3,000 letters
    said = questions * 150
    told = (
        f"{questions} questions, about {read / 1e3:,.0f}k tokens read and {said / 1e3:,.0f}k said"
    )
    if prices := os.environ.get("JUDGE_PRICE"):
        if not re.fullmatch(r"[\d.]+,[\d.]+", prices):
            raise ValueError(f"JUDGE_PRICE={prices}: expected dollars for a million, read,said")
        each = [float(x) for x in prices.split(",")]
        told += f", ${(read * each[0] + said * each[1]) / 1e6:.2f}"
    return told


def own_images(task: str) -> Path:
    """The folder of an Image-DC of one's own."""
    return Path(f"data/{task.replace('_own', '')}")


def tell_price(task: str, limit: int) -> None:
    """Tell what a judged task costs at most: kept judgements cost nothing."""
    if not (column := judge_column(task)) or os.environ.get("RANK", "0") != "0":
        return
    if n := column.judged[0] or len([*own_images(task).glob("*")]):
        print(f"{task}: a judge is asked at most {price(column, min(n, limit or n))}")


def column_of(task: str) -> Column | None:
    """The blog's column that a task is scored for."""
    return BLOG.get(COLUMNS.get(task, ""))


def judge_column(task: str) -> Column | None:
    """The column of a judged task."""
    column = column_of(task)
    return column if column and column.judged else None


def judge_of(task: str) -> dict[str, str]:
    """What a judged task's score depends on besides; ValueError where it cannot be had."""
    if not (column := judge_column(task)):
        return {}
    from nanollava.benchmarks import judge

    own = sorted((f.name, f.stat().st_size) for f in own_images(task).glob("*"))
    if not column.judged[0] and not own:
        raise ValueError(f"put your images into {own_images(task)}")
    url = os.environ.get("OPENAI_API_URL", "")
    return {"judge": judge.judge_id(), "endpoint": url, "images": f"{own}"}


def value_of(column: Column, values: dict) -> float | None:
    """A task's values in the blog's unit."""
    names = (column.metric,) if isinstance(column.metric, str) else column.metric
    found = [values.get(name) for name in names]
    return None if None in found else column.unit * sum(found)


def row_of(beside: str) -> tuple[dict[str, Any], str]:
    """'T4:0' -> that row of the blog's by column, and what it is."""
    name, _, place = beside.partition(":")
    if name not in TABLES or not place.isdigit() or int(place) >= len(TABLES[name]["rows"]):
        raise ValueError(f"--beside {beside!r}: expected TABLE:ROW, like T4:0, rows from 0 on")
    table = TABLES[name]
    row = zip([*table["factors"], *table["metrics"]], table["rows"][int(place)], strict=True)
    return (found := dict(row)), ", ".join([name, *(f"{found[key]}" for key in table["factors"])])


def show(rows: dict[str, dict], reasons: dict[str, str], beside: str, limit: int) -> None:
    """Print ours beside a row of the blog's."""
    row, told = row_of(beside)
    table, notes = Table(title=f"beside the blog: {told}", box=SIMPLE), []
    for head, side in (
        ("task", "left"),
        ("column", "left"),
        ("ours", "right"),
        ("the blog", "right"),
    ):
        table.add_column(head, justify=side, no_wrap=True)
    for task in [*rows, *reasons]:
        column = COLUMNS.get(task, "")
        done = task in rows
        mine, note = (
            ours(task, rows[task], limit, beside.partition(":")[0])
            if done
            else ("-", reasons[task])
        )
        blog = row.get(column, row.get(column.removesuffix("_img"), "-"))  # T2 calls it scienceqa
        table.add_row(task, column, mine, f"{blog}")
        notes += [f"{task}: {note}"] if note else []
    Console().print(table)
    print("\n".join(notes))


def ours(task: str, values: dict, limit: int, table: str) -> tuple[str, str]:
    """Our cell, and what is to be said about it."""
    from nanollava.benchmarks import judge

    known, states = column_of(task), judge.STATES
    notes = [f"the first {values['n']:g}"] if limit else []
    if task == "mme" and table in ("T2", "T3"):  # as blog.json's notes say
        known = replace(known, metric="mme_perception_score", unit=100 / 2000)
        notes.append("perception / 2000, as this table prints it")
    value = value_of(known, values) if known else None
    notes += [known.note] if known and known.note else []
    if counts := [f"{values[state]:g} {state}" for state in states if values.get(state)]:
        notes.append(f"{', '.join(counts)} by {', '.join(values['judges']) or 'no judge'}")
    if wrong := values["unreadable images"]:
        notes.append(f"{len(wrong)} unreadable, counted as wrong: {', '.join(wrong[:3])}")
    others = [f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float) and k not in states]
    return (f"{value:.1f}" if value is not None else ", ".join(others)), "; ".join(notes)
