"""The blog's recipes: each reads, says what the blog printed, and stands in the ledger."""

import re

import pytest
from launching import ROOT

from nanollava.ablations import ledger
from nanollava.ablations.rows import read_rows
from nanollava.recipe import read_recipe

RECIPES = ROOT / "recipes"
FILES = [
    *sorted(RECIPES.glob("blog/*.yaml")),
    *(RECIPES / f"{name}.yaml" for name in ("qwen05b", "qwen05b_release", "clip_l_336_vicuna7b")),
]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_recipe_opens_with_its_command_and_what_the_blog_scored(file):
    recipe, head = read_recipe(file), file.read_text().split("\nbase:")[0]
    assert f"recipes/{file.relative_to(RECIPES)}" in head and "Ours: not run" in head
    assert head.startswith('if __name__ == "__main__": __import__("nanollava").main(__file__); r')
    assert recipe.run == f"runs/{file.stem}"
    table = next(
        (t for t, rows in ledger.LEDGER["recipes"].items() for r in rows if RECIPES / r == file),
        "T4",
    )
    rows = ledger.LEDGER["recipes"].get(table, ["../recipes/qwen05b.yaml"])
    place = next((i for i, r in enumerate(rows) if RECIPES / r == file), 0)
    content = ledger.TABLES[table]
    names = [*content["factors"], *content["metrics"]]
    printed = dict(zip(names, content["rows"][place], strict=True))
    for words, key in (("AI2D", "ai2d"), ("ChartQA", "chartqa"), ("DocVQA", "docvqa")):
        assert float(re.search(rf"{words}\s+(?:# )?([\d.]+\d)", head)[1]) == printed[key], words
    if table != "T4":
        assert float(re.search(r"average ([\d.]+\d)", head)[1]) == printed["avg"]
        learning = str(printed.get("lr_llm", "2e-5"))
        assert recipe.stages["stage2"].lr == float(learning)
        assert recipe.stages["stage2"].batch_size == int(printed.get("batch_size", 128))


def test_every_row_of_the_blog_stands_in_the_ledger_as_it_is_generated():
    rows = ledger.rows()
    for table, content in ledger.TABLES.items():
        assert {(table, i) for i in range(len(content["rows"]))} <= rows.keys(), table
    assert (RECIPES / "LEDGER.md").read_text() == ledger.ledger(), (
        "python -m nanollava.ablations.ledger"
    )


def test_rows_set_what_the_blogs_tables_say():
    """Grid, budget and place of pooling, read from the tables' own columns."""
    for file in sorted((RECIPES / "ablations").glob("*.yaml")):
        for name, row in read_rows(file, "full").items():
            content = ledger.TABLES.get(row.table, {"factors": []})
            recipe = read_recipe(row.base, row.keys)
            printed = (
                dict(zip(content["factors"], content["rows"][row.blog], strict=False))
                if content["factors"]
                else {}
            )
            visual = recipe.visual
            if "max_grids" in printed:
                grid = printed["max_grids"].replace("2x2", "5grids")
                assert visual.max_grid == grid, (file.name, name)
            if "max_tokens" in printed and "183" not in printed["max_tokens"]:
                assert visual.max_visual_tokens == printed["max_tokens"].replace("*729", "T"), name
            place = printed.get("pooling_wrt_projector")
            assert place is None or visual.pool_after_projector == (place == "after"), name
            if "batch_size" in printed:
                assert recipe.stages["stage2"].batch_size == printed["batch_size"], name
            if "llm" in printed:
                assert printed["llm"].split()[-1] in recipe.llm, name
