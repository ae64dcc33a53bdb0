"""The faithfulness ledger: every row of the blog's tables, the recipe that repeats it, and what
differs from the blog or from its released code, read off the recipe's resolved keys.

    python -m nanollava.ablations.ledger        # writes recipes/LEDGER.md

Everything from the list of notes on is generated; the introduction above it is written by hand.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanollava.ablations.rows import TABLES, blog_row, read_ablation, read_rows
from nanollava.files import repository_file
from nanollava.recipe import Recipe, read_recipe, used_sources


@dataclass(frozen=True)
class Note:
    """A difference from the blog or its released code, and whether a recipe has it."""

    text: str
    holds: Callable[[Recipe], bool]


RECIPES = repository_file("ablations").parent
PAGE = RECIPES / "LEDGER.md"
ABLATIONS = sorted((RECIPES / "ablations").glob("*.yaml"))
QWEN = ("0.5b", "1.8b", "4b", "7b", "14b", "32b", "72b", "110b")
FILES = {  # tables whose rows are recipes of their own
    "T1": [f"blog/qwen_{size}.yaml" for size in QWEN],
    "T3": [
        "blog/clip_l_224_vicuna7b.yaml",
        "clip_l_336_vicuna7b.yaml",
        "blog/eva02_e_224_vicuna7b.yaml",
        "blog/eva_8b_224_vicuna7b.yaml",
        "blog/eva_8b_448_vicuna7b.yaml",
        "blog/so400m_384_vicuna7b.yaml",
    ],
}
SHOWN = ("avg", "docvqa", "chartqa", "ai2d", "image_dc_cn", "ocrbench")  # the first three of them
NOTES = {
    "a": Note(
        "stage 2 has 779,289 public samples of 790K: 15K are users' and were never released",
        lambda r: "llava_next_779k" in r.stages["stage2"].sources,
    ),
    "b": Note(
        "stage 1's learning rate 1e-3 and batch 256 are the released scripts'; the blog has none",
        lambda r: r.stages["stage1"].lr == 1e-3,
    ),
    "c": Note(
        "each view's share of tau is rounded down to a square, so that the sum stays below tau",
        lambda r: r.visual.budget == "per_view",
    ),
    "d": Note(
        "the connector has the blog's ReLU; the released code has GELU",
        lambda r: r.connector == "relu",
    ),
    "e": Note(
        "the vision encoder trains, as the blog says; the authors' Section-2 scripts froze it",
        lambda r: r.encoder == "so400m_384" and r.llm.startswith("Qwen"),
    ),
    "f": Note(
        "the encoder is not stated; CLIP-L-336 is taken, the base of Sections 1.2 and 3",
        lambda r: r.encoder == "clip_l_336" and r.llm.startswith("Qwen"),
    ),
    "g": Note(
        "EVA-02-E: the checkpoint of 4.7B parameters (4B samples seen); the blog mixes two",
        lambda r: r.encoder == "eva02_e_224",
    ),
    "h": Note(
        "t/4 of 27 x 27 is 14 x 14 = 196, as the released code rounds; the blog prints 183",
        lambda r: r.visual.max_visual_tokens.endswith("t"),
    ),
    "i": Note(
        "lifting enlarges before the grid is chosen; the blog gives no code",
        lambda r: r.visual.lift > 0,
    ),
    "j": Note(
        "pooling before the projector: our reading; the released code has it after only",
        lambda r: not r.visual.pool_after_projector,
    ),
    "k": Note(
        "raw captions from the public web sets; the team's own files were not released",
        lambda r: any(name.endswith("_raw") for name in used_sources(r)),
    ),
    "l": Note(
        "SynthDOG as its authors published it: 0.5M English, 0.5M Chinese for the blog's 1M",
        lambda r: "syndog_en" in used_sources(r),
    ),
    "m": Note(
        "longer than Vicuna's 4,096 positions; the blog does not say how",
        lambda r: r.llm.startswith("lmsys") and r.max_length > 4096,
    ),
    "n": Note(
        "a learned newline ends each row of tokens: the released code's, not in the blog",
        lambda r: r.visual.arrange == "raster",
    ),
    "o": Note(
        "captions and pages that come without a question get ours (sources.yaml)",
        lambda r: any(r.sources[name].prompt for name in used_sources(r)),
    ),
}
REMARKS = {  # on a table as a whole; an ablation's file may add its `note`
    "T1": "The averages printed for 72B and 110B are not those of their rows (75.1 and 76.8).",
    "T2": "MME is perception / 2000 here, (perception + cognition) / 2800 in T1, T11 and T12.",
    "T3": "MME is perception / 2000 here, (perception + cognition) / 2800 in T1, T11 and T12.",
    "T5": "The 0.5B rows differ from the same rows of T4 (Video-DC 62.4 and 64.1).",
    "T12": "The averages leave InfoVQA out.",
}


def line(table: str, index: int, name: str, command: str, letters: str) -> str:
    """The ledger's line for a row of the blog."""
    printed = blog_row(table, index)
    scores = [f"{key} {printed[key]}" for key in SHOWN if key in printed]
    return f"| {name} | {', '.join(scores[:3])} | {command} | {letters} |"


def train(file: Path, *keys: str) -> str:
    """The command that trains a recipe file with changed keys."""
    return f"`{shlex.join(['composer', f'recipes/{file.relative_to(RECIPES)}', *keys])}`"


def letters(recipe: Recipe) -> str:
    """The letters of the notes that hold for a recipe."""
    return " ".join(letter for letter, note in NOTES.items() if note.holds(recipe))


def rows() -> dict[tuple[str, int], str]:
    """(table, index) of each row of the blog -> its line."""
    lines = {}
    for table, files in FILES.items():
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
    remarks = dict(REMARKS)
    for ablation in map(read_ablation, ABLATIONS):
        if ablation.note:
            remarks[ablation.blog] = ablation.note
    introduction = PAGE.read_text().partition("\n- a: ")[0]
    lines = [introduction, *(f"- {letter}: {note.text}." for letter, note in NOTES.items())]
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
