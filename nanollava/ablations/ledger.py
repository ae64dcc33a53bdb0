"""The faithfulness ledger: every row of the blog's tables, the recipe that repeats it, and what
differs from the blog or from its released code, read off the recipe's resolved keys.

    python -m nanollava.ablations.ledger        # writes recipes/LEDGER.md

Everything from the list of notes on is generated; the introduction above it is written by hand.
"""

import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from nanollava.ablations.rows import TABLES, blog_row, read_ablation, read_rows
from nanollava.files import repository_file
from nanollava.recipe import Recipe, read_recipe, run_keys

RECIPES = repository_file("ablations").parent
PAGE = RECIPES / "LEDGER.md"
ABLATIONS = sorted((RECIPES / "ablations").glob("*.yaml"))
LEDGER = yaml.safe_load(Path(__file__).with_name("ledger.yaml").read_text())


def line(table: str, index: int, name: str, command: str, letters: str) -> str:
    """The ledger's line for a row of the blog."""
    printed = blog_row(table, index)
    scores = [f"{key} {printed[key]}" for key in LEDGER["shown"] if key in printed]
    return f"| {name} | {', '.join(scores[:3])} | {command} | {letters} |"


def train(file: Path, *keys: str) -> str:
    """The command that trains a recipe file with changed keys."""
    return f"`{shlex.join(['composer', f'recipes/{file.relative_to(RECIPES)}', *keys])}`"


def letters(recipe: Recipe) -> str:
    """The letters of the notes that hold for a recipe."""
    keys = {name: str(value) for name, value in run_keys(recipe).items()}
    return " ".join(
        letter
        for letter, note in LEDGER["notes"].items()
        if all(has(keys, name, value) for name, value in note["keys"].items())
    )


def has(keys: dict[str, str], name: str, pattern: str) -> bool:
    """Whether a key of this name, or of one that fits it, has a value that fits the pattern."""
    values = [value for key, value in keys.items() if fnmatchcase(key, name)]
    if pattern.startswith("!"):
        return not any(fnmatchcase(value, pattern[1:]) for value in values)
    return any(fnmatchcase(value, pattern) for value in values)


def rows() -> dict[tuple[str, int], str]:
    """(table, index) of each row of the blog -> its line."""
    lines = {}
    for table, files in LEDGER["recipes"].items():
        for i, name in enumerate(files):
            file = RECIPES / name
            notes = letters(read_recipe(file))
            lines[table, i] = line(table, i, file.stem, train(file), notes)
    folders = {}  # what a training depends on -> its run folder
    for file in ABLATIONS:
        for name, row in read_rows(file, "full").items():
            if row.blog is None:
                continue
            place = f"{row.table}_{row.blog}"
            # Rows that differ only at inference share one training, and its run folder.
            keys = [*row.keys, f"run=runs/{folders.setdefault((row.base, *row.keys), place)}"]
            if row.infer:
                changes = ", ".join(f"{key}: {value}" for key, value in row.infer.items())
                keys.append(f"settings.{place}={{{changes}}}")
            command = train(row.base, *keys)
            notes = letters(read_recipe(row.base, row.keys))
            if row.missing:  # then there is nothing to type
                command = f"data {row.missing}"
                notes = ""
            lines[row.table, row.blog] = line(row.table, row.blog, name, command, notes)
    return lines


def ledger() -> str:
    """The page: its introduction as it is, then notes and tables."""
    remarks = dict(LEDGER["remarks"])
    for ablation in map(read_ablation, ABLATIONS):
        if ablation.note:
            remarks[ablation.blog] = ablation.note
    introduction = PAGE.read_text().partition("\n- a: ")[0]
    lines = [
        introduction,
        *(f"- {letter}: {note['text']}." for letter, note in LEDGER["notes"].items()),
    ]
    found = rows()
    for table, content in TABLES.items():
        lines += ["", f"## {table}: {content['title']}", ""]
        if table in remarks:
            lines += [remarks[table], ""]
        lines += ["| row | published | command | differs |", "|---|---|---|---|"]
        lines += [found[table, i] for i in range(len(content["rows"]))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(ledger())
