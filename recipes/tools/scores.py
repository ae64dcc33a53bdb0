"""Scores as a table: what `evaluate` prints."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def show(rows: Sequence[dict]) -> None:
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
