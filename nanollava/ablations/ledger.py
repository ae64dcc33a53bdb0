"""The faithfulness ledger: every row of the blog's tables, the recipe that repeats it, and what
differs from the blog or from its released code, read off the recipe's resolved keys.

    python -m nanollava.ablations.ledger        # writes recipes/LEDGER.md
"""

from pathlib import Path

from nanollava.ablations import rows as rows_of
from nanollava.files import repository_file
from nanollava.recipe import Recipe, read_recipe, used_sources

RECIPES = repository_file("ablations").parent
TABLES = rows_of.TABLES
QWEN = ("0.5b", "1.8b", "4b", "7b", "14b", "32b", "72b", "110b")
FILES = {  # rows that are recipes of their own
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
SHOWN = ("avg", "docvqa", "chartqa", "ai2d", "image_dc_cn", "ocrbench")
NOTES = {
    "a": (
        "stage 2 has 779,289 public samples of 790K: 15K are users' and were never released",
        lambda r: "llava_next_779k" in r.stages["stage2"].sources,
    ),
    "b": (
        "stage 1's learning rate 1e-3 and batch 256 are the released scripts'; the blog has none",
        lambda r: r.stages["stage1"].lr == 1e-3,
    ),
    "c": (
        "each view's share of tau is rounded down to a square, so that the sum stays below tau",
        lambda r: r.visual.budget == "per_view",
    ),
    "d": (
        "the connector has the blog's ReLU; the released code has GELU",
        lambda r: r.connector == "relu",
    ),
    "e": (
        "the vision encoder trains, as the blog says; the authors' Section-2 scripts froze it",
        lambda r: r.encoder == "so400m_384" and r.llm.startswith("Qwen"),
    ),
    "f": (
        "the encoder is not stated; CLIP-L-336 is taken, the base of Sections 1.2 and 3",
        lambda r: r.encoder == "clip_l_336" and r.llm.startswith("Qwen"),
    ),
    "g": (
        "EVA-02-E: the checkpoint of 4.7B parameters (4B samples seen); the blog mixes two",
        lambda r: r.encoder == "eva02_e_224",
    ),
    "h": (
        "t/4 of 27 x 27 is 14 x 14 = 196, as the released code rounds; the blog prints 183",
        lambda r: r.visual.max_visual_tokens.endswith("t"),
    ),
    "i": (
        "lifting enlarges before the grid is chosen; the blog gives no code",
        lambda r: r.visual.lift > 0,
    ),
    "j": (
        "pooling before the projector: our reading; the released code has it after only",
        lambda r: not r.visual.pool_after_projector,
    ),
    "k": (
        "raw captions from the public web sets; the team's own files were not released",
        lambda r: any(n.endswith("_raw") for n in used_sources(r)),
    ),
    "l": (
        "SynthDOG as its authors published it: 0.5M English, 0.5M Chinese for the blog's 1M",
        lambda r: "syndog_en" in used_sources(r),
    ),
    "m": (
        "longer than Vicuna's 4,096 positions; the blog does not say how",
        lambda r: r.llm.startswith("lmsys") and r.max_length > 4096,
    ),
    "n": (
        "a learned newline ends each row of tokens: the released code's, not in the blog",
        lambda r: r.visual.arrange == "raster",
    ),
    "o": (
        "captions and pages that come without a question get ours (sources.yaml)",
        lambda r: any(r.sources[n].prompt for n in used_sources(r)),
    ),
}


REMARKS = {  # on a table as a whole; an ablation's file may add its `note`
    "T1": "The averages printed for 72B and 110B are not those of their rows (75.1 and 76.8).",
    "T2": "MME is perception / 2000 here, (perception + cognition) / 2800 in T1, T11 and T12.",
    "T3": "MME is perception / 2000 here, (perception + cognition) / 2800 in T1, T11 and T12.",
    "T5": "The 0.5B rows differ from the same rows of T4 (Video-DC 62.4 and 64.1).",
    "T12": "The averages leave InfoVQA out.",
}


def command(file: str, keys: list[str]) -> str:
    """What to type; quoted where a shell would read a sign in it."""
    quoted = [f"'{k}'" if set(k) & set("(){}* ") else k for k in keys]
    return " ".join([f"composer recipes/{file}", *quoted])


def rows() -> dict[tuple[str, int], tuple[str, str, str]]:
    """(table, row) of the blog -> its name, the command, what is not the blog's."""
    found, folders = {}, {}
    for table, files in FILES.items():
        for i, file in enumerate(files):
            found[table, i] = (
                Path(file).stem,
                command(file, []),
                told(read_recipe(RECIPES / file)),
            )
    for file in sorted((RECIPES / "ablations").glob("*.yaml")):
        for name, row in rows_of.read_rows(file, "full").items():
            keys, place = list(row.keys), f"{row.table}_{row.blog}"
            recipe = read_recipe(row.base, keys)
            if row.blog is None:
                continue
            # rows of equal training share a folder
            keys.append(f"run=runs/{folders.setdefault((row.base, *keys), place)}")
            if row.infer:
                asked = "max_grid: {max_grid}, max_visual_tokens: {max_visual_tokens}"
                keys.append(f"settings.{place}={{{asked.format(**row.infer)}}}")
            typed, letters = command(str(row.base.relative_to(RECIPES)), keys), told(recipe)
            if row.missing:
                typed, letters = f"data {row.missing}", ""
            found[row.table, row.blog] = (name, typed, letters)
    return found


def told(recipe: Recipe) -> str:
    """The letters of the notes that hold for a recipe."""
    return " ".join(letter for letter, (_, holds) in NOTES.items() if holds(recipe))


def ledger() -> str:
    """The page."""
    found, remarks = rows(), dict(REMARKS)
    for file in (RECIPES / "ablations").glob("*.yaml"):
        tree = rows_of.read_ablation(file)
        if tree.note:
            remarks[tree.blog] = tree.note
    lines = [
        "# The faithfulness ledger",
        "",
        "Every row of the blog's tables: what it printed, the command that trains it, and where it "
        "differs from the blog or from its released code, read off the resolved recipe by "
        "`python -m nanollava.ablations.ledger`. **Ours: not run**, in every row: this was built "
        "without a GPU or a download; `evaluate RUN --tasks blog --beside T1:0` scores one. Rows "
        "that need several GPUs want `composer -n N`; nano results are in the notebooks and in "
        "RESULTS.md.",
        "",
    ]
    lines += [f"- {letter}: {note}." for letter, (note, _) in NOTES.items()]
    for table, content in TABLES.items():
        head = ["| row | published | command | differs |", "|---|---|---|---|"]
        lines += ["", f"## {table}: {content['title']}", ""]
        lines += [remark, ""] if (remark := remarks.get(table)) else []
        lines += head
        for i, row in enumerate(content["rows"]):
            name, typed, letters = found[table, i]
            printed = dict(zip([*content["factors"], *content["metrics"]], row, strict=True))
            scores = [f"{k} {printed[k]}" for k in SHOWN if k in printed][:3]
            code = typed if typed.startswith("data") else f"`{typed}`"
            lines.append(f"| {name} | {', '.join(scores)} | {code} | {letters} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (RECIPES / "LEDGER.md").write_text(ledger())
