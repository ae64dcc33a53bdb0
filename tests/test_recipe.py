"""Recipes: YAML and Python at once, deltas, overrides; what cannot work is refused by name."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

import nanollava
from nanollava.anyres import Visual
from nanollava.recipe import (
    FIRST_EDITION,
    Assumed,
    Recipe,
    Source,
    Stage,
    Task,
    differences,
    hashed,
    read_recipe,
    run_keys,
    with_visual,
    write_recipe,
)

ROOT = Path(__file__).parents[1]
LAUNCH = """if __name__ == "__main__": __import__("nanollava").main(__file__); r'''\n"""
BODY = """
run: runs/a
sources:
  pages: {path: "./my.py:pages", samples: 10, prompt: read it}
  photos: {path: "json:./photos.json"}
stages:
  stage1: {sources: {pages: 1}, lr: 1e-3, train: projector}
  stage2: {sources: {pages: 0.5, photos: 2}}
tasks:
  doc: {path: "../tasks.py:doc", metric: anls}
settings:
  small: {max_grid: base}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(LAUNCH + BODY + "# '''\n")
    return path


def write(folder, text, name="x.yaml"):
    (folder / name).write_text(text)
    return folder / name


# ---- a program and a YAML file


def test_a_recipe_is_a_program_and_a_yaml_file(file, monkeypatch):
    """The launcher runs `python FILE`; the same file is read as YAML; importing runs nothing."""
    called = []
    monkeypatch.setattr(nanollava, "main", called.append)
    runpy.run_path(str(file), run_name="__main__")
    assert called == [str(file)]
    runpy.run_path(str(file), run_name="other")
    assert len(called) == 1
    tree = yaml.safe_load(file.read_text())
    assert set(tree) - set(yaml.safe_load(BODY)) == {'if __name__ == "__main__"'}
    assert read_recipe(file).run == "runs/a"


def test_every_shipped_recipe_is_both(monkeypatch):
    called = []
    monkeypatch.setattr(nanollava, "main", called.append)
    files = [
        f
        for f in sorted((ROOT / "recipes").rglob("*.yaml"))
        if f.read_text().startswith("if __name__")
    ]
    assert ROOT / "recipes" / "nano.yaml" in files
    for path in files:
        runpy.run_path(str(path), run_name="__main__")
        assert read_recipe(path).run != "runs/unnamed", path
    assert called == [str(f) for f in files]


def test_launched_from_another_folder_a_mistake_is_one_line(file, tmp_path):
    """python FILE key=value: the override arrives, and the error names it; no traceback."""
    (tmp_path / "elsewhere").mkdir()
    out = subprocess.run(
        [sys.executable, "../a.yaml", "stages.stage2.lrr=3"],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert out.returncode == 1 and "Traceback" not in out.stderr
    assert "Key 'lrr' not in 'Stage'. Did you mean: 'lr'?" in out.stderr


# ---- reading


def test_numbers_paths_and_defaults(file, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    recipe = read_recipe(file)
    stage1, stage2 = recipe.stages.values()
    assert stage1.lr == 1e-3 and isinstance(stage1.lr, float), "1e-3 without a dot is a number"
    assert stage2.lr == 2e-5 and stage2.train == "full" and stage2.sources["pages"] == 0.5
    folder = file.parent.resolve()
    assert recipe.sources["pages"].path == f"{folder}/my.py:pages", "relative to the recipe"
    assert recipe.sources["photos"].path == f"json:{folder}/photos.json"
    assert recipe.tasks["doc"].path == f"{folder.parent}/tasks.py:doc"
    assert recipe.run == "runs/a", "outputs go below the folder you are in"
    assert recipe.sources["pages"].prompt == "read it"


def test_local_paths_of_every_kind_are_relative_to_the_recipe(tmp_path):
    sub = (tmp_path / "sub").resolve()
    sub.mkdir()
    wanted = {
        "parquet:./a/*.parquet": f"parquet:{sub}/a/*.parquet",
        "pdf:../pdfs/": f"pdf:{sub.parent}/pdfs",
        "json:./a.json+./b.zip+c.tar": f"json:{sub}/a.json+{sub}/b.zip+c.tar",
        "json:../a.json+../d.tar": f"json:{sub.parent}/a.json+{sub.parent}/d.tar",
        "json:hf://datasets/o/n/a.json+b.zip": "json:hf://datasets/o/n/a.json+b.zip",
        "json:hf://datasets/o/n/a.json+./b.zip": f"json:hf://datasets/o/n/a.json+{sub}/b.zip",
        "webdataset:/far/../a.tar": "webdataset:/far/../a.tar",
        "./c++/my.py:pages": f"{sub}/c++/my.py:pages",
    }
    sources = {f"s{i}": {"path": path} for i, path in enumerate(wanted)}
    recipe = read_recipe(write(sub, yaml.dump({"sources": sources})))
    assert [source.path for source in recipe.sources.values()] == list(wanted.values())
    again = read_recipe(recipe_file := write(sub, yaml.dump({"base": "x.yaml"}), "y.yaml"))
    assert again == recipe and recipe_file.parent == sub


def test_a_delta_is_its_base_with_changed_keys(file, tmp_path):
    (tmp_path / "sub").mkdir()
    delta = write(
        tmp_path / "sub",
        """
base: ../a.yaml
run: runs/b
stages: {stage1: null, stage2: {lr: 1e-4}}
visual: {max_grid: 3x3}
sources: {photos: {path: "json:./other.json"}}
""",
    )
    base, recipe = read_recipe(file), read_recipe(delta)
    assert recipe.stages["stage1"] is None
    assert recipe.stages["stage2"] == replace(base.stages["stage2"], lr=1e-4)
    assert recipe.sources["pages"] == base.sources["pages"], "a base's paths stay the base's"
    assert recipe.sources["photos"].path == f"json:{tmp_path.resolve()}/sub/other.json"
    assert recipe.visual == replace(base.visual, max_grid="3x3")
    again = write(tmp_path, "base: sub/x.yaml\nseed: 4", "y.yaml")
    assert read_recipe(again) == replace(recipe, seed=4), "a delta of a delta"


def test_overrides_are_typed_and_come_last(file):
    recipe = read_recipe(
        file,
        [
            "stages.stage2.lr=1e-5",
            "visual.max_grid=2x2..6x6",
            "seed=7",
            "fresh=true",
            "stages.stage1=null",
            "sources.pages.samples=3",
            "visual.max_visual_tokens=37T",
        ],
        seed=8,
    )
    assert recipe.stages["stage2"].lr == 1e-5 and recipe.stages["stage1"] is None
    assert recipe.visual == Visual("2x2..6x6", max_visual_tokens="37T")
    assert recipe.seed == 8 and recipe.fresh is True, "changes given as values come last"
    assert recipe.sources["pages"].samples == 3
    assert read_recipe(file, ["seed=7"]).seed == 7


def test_written_and_read_again_is_the_same(file, tmp_path):
    recipe = read_recipe(file, ["stages.stage1=null", "visual.budget=mosaic"])
    write_recipe(recipe, tmp_path / "out.yaml")
    assert read_recipe(tmp_path / "out.yaml") == recipe
    assert differences(recipe, read_recipe(tmp_path / "out.yaml")) == []


# ---- mistakes


@pytest.mark.parametrize(
    "text,message",
    [
        ("sede: 1", "Key 'sede' not in 'Recipe'. Did you mean: 'seed'?"),
        ("visual: {max_gird: 3x3}", "Did you mean: 'max_grid'?"),
        ("stages: {s: {batchsize: 1}}", "Did you mean: 'batch_size'?"),
        ("seed: one", "Value 'one' of type 'str' could not be converted to Integer"),
        ("stages: {s: {lr: fast}}", "could not be converted to Float"),
        ("fresh: maybe", "not a valid bool"),
        ("encoder: clip", "encoder: 'clip' is unknown. Choose from clip_l_224"),
        ("connector: tanh", "Choose from relu, gelu"),
        ("template: chatml", "Choose from plain, qwen_1_5, vicuna_v1"),
        ("label_mask: all", "Choose from answers, released"),
        ("precision: fp16", "Choose from auto, fp32"),
        ("visual: {pooling: max}", "Choose from bilinear, average"),
        ("visual: {arrange: rows}", "Choose from raster, flat"),
        ("visual: {budget: none}", "Choose from per_view, mosaic"),
        ("visual: {max_grid: 3x0}", "'3x0' is not a grid"),
        ("visual: {max_visual_tokens: much}", "'much' is not a budget. Use 5T"),
        (
            "visual: {max_grid: 6x6, max_visual_tokens: 36}",
            "36 tokens is below one token for each of the 37 views of grid 6x6",
        ),
        ("visual: {max_visual_tokens: 1T, budget: mosaic}", "a mosaic budget must be at least 2T"),
        ("visual: {arrange: flat, budget: mosaic}", "flat needs budget per_view"),
        ("visual: {pool_stride: 0}", "visual.pool_stride: 0; expected 1 or more"),
        (
            "sources: {a: {path: x}}\nstages: {s: {sources: {b: 1}}}",
            "stages.s.sources: 'b' is not one of the recipe's: ['a']",
        ),
        ("stages: {s: {lr: 1}}", "stages.s has no sources"),
        (
            "sources: {a: {path: x}}\nstages: {s: {sources: {a: 1}, train: llm}}",
            "stages.s.train: 'llm' is unknown. Choose from projector, projector+llm, full",
        ),
        (
            "sources: {a: {path: x}}\nstages: {s: {sources: {a: 1}, template: x}}",
            "stages.s.template: 'x' is unknown. Choose from plain",
        ),
        (
            "tasks: {t: {path: x, metric: bleu}}",
            "tasks.t.metric: 'bleu' is unknown. Choose from anls",
        ),
        ("settings: {big: {max_grid: huge}}", "'huge' is not a grid"),
        ("settings: {big: {max_gird: 3x3}}", "Did you mean: 'max_grid'?"),
        ("settings: {big: {lift: tall}}", "could not be converted to Integer"),
        ("a: [b", "is not valid YAML"),
        ("- seed", "is not a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        read_recipe(write(tmp_path, text))
    assert message in str(error.value)


def test_the_smallest_budget_that_works_is_accepted(tmp_path):
    for text in (
        "visual: {max_grid: 6x6, max_visual_tokens: 37}",
        "visual: {max_grid: base, max_visual_tokens: 1}",
        "visual: {max_visual_tokens: 2T, budget: mosaic}",
    ):
        read_recipe(write(tmp_path, text))


def test_overrides_with_mistakes(file, tmp_path):
    with pytest.raises(ValueError, match="'seed' is not an override. Write key=value"):
        read_recipe(file, ["seed"])
    with pytest.raises(ValueError, match="stages.stage3 has no sources. .*stage1.*stage3"):
        read_recipe(file, ["stages.stage3.lr=1e-5"])
    with pytest.raises(FileNotFoundError, match="none.yaml is not a file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="none.yaml is not a file"):
        read_recipe(write(tmp_path, "base: none.yaml"))


def test_with_visual_types_what_a_setting_says():
    changes = {"max_grid": "3x3", "lift": "4", "pool_after_projector": "false"}
    recipe = with_visual(Recipe(), changes)
    assert recipe.visual == Visual("3x3", lift=4, pool_after_projector=False)
    assert replace(recipe, visual=Visual()) == Recipe()
    other = Recipe(visual=Visual("6x6", max_visual_tokens="37T"))
    assert with_visual(other, {"pooling": "average"}).visual == replace(
        other.visual, pooling="average"
    )


# ---- what makes another run


def test_differences_name_what_changes_a_run(file):
    old = read_recipe(file)
    new = read_recipe(file, ["stages.stage2.lr=1e-5", "visual.max_grid=3x3", "stages.stage1=null"])
    found = differences(old, new)
    assert "stages.stage2.lr: 2e-05 -> 1e-05" in found
    assert "visual.max_grid: 5grids -> 3x3" in found
    assert "stages.stage1.train: projector -> None" in found
    assert differences(old, old) == []
    free = ["run=b", "fresh=true", "data=d", "workers=0", "tasks.doc=null", "settings.small.lift=2"]
    assert differences(old, read_recipe(file, free)) == []


def test_papers_and_unused_sources_make_no_other_run(file, tmp_path):
    old = read_recipe(file)
    papers = [
        f"sources.pages.{k}={v}" for k, v in (("expected", 9), ("origin", "x"), ("licence", "y"))
    ]
    assert differences(old, read_recipe(file, papers)) == []
    more = replace(old, sources=old.sources | {"spare": replace(old.sources["pages"], samples=1)})
    assert differences(old, more) == differences(more, old) == []
    assert differences(old, read_recipe(file, ["sources.pages.samples=3"])) == [
        "sources.pages.samples: 10 -> 3"
    ]
    assert differences(old, read_recipe(file, ["stages.stage2.sources.photos=0"])) == [
        f"sources.photos.{key}: {getattr(old.sources['photos'], key)} -> None"
        for key in ("path", "prompt", "samples", "split")
    ] + ["stages.stage2.sources.photos: 2.0 -> 0.0"]


@pytest.mark.parametrize("key", [k for k, v in asdict(Recipe()).items() if not isinstance(v, dict)])
def test_each_key_is_either_free_or_makes_another_run(key):
    old = Recipe()
    value = getattr(old, key)
    other = not value if isinstance(value, bool) else value + type(value)(1)
    new = replace(old, **{key: other})
    free = key in {"run", "fresh", "data", "workers", "reference", "shard"}
    assert [d.split(":")[0] for d in differences(old, new)] == ([] if free else [key])


def test_keys_that_only_buy_memory_may_change_on_resume():
    nano = str(Path(__file__).parents[1] / "recipes/nano.yaml")
    stage = "stages.stage2."
    keys = [
        f"{stage}microbatch_tokens=99",
        f"{stage}checkpoint_activations=true",
        f"{stage}save_interval=7",
        "shard=true",
    ]
    assert not differences(read_recipe(nano), read_recipe(nano, keys))
    assert differences(read_recipe(nano), read_recipe(nano, [f"{stage}lr=3"]))


@pytest.mark.parametrize("words", [["plan"], ["nosuch"], ["plan", "x.yaml", "--devices", "0"]])
def test_a_wrong_command_line_is_told_without_a_traceback(words, capsys):
    from nanollava.__main__ import run

    with pytest.raises(SystemExit) as stopped:
        run(words)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


# ---- digests


def test_a_key_that_a_later_edition_adds_changes_no_digest_at_its_default(file, monkeypatch):
    """Results that were measured before the key existed keep their keys."""
    old = read_recipe(file)
    before = run_keys(old), hashed(old.visual), hashed(old.tasks["doc"])
    for kind in (Recipe, Visual, Stage, Source, Task):
        names = {f.name for f in fields(kind) if not f.metadata.get("free")}
        assert set(FIRST_EDITION[kind].split()) <= names
        later = FIRST_EDITION[kind].split()[-1]  # as if this key had come with a later edition
        fewer = FIRST_EDITION[kind].replace(later, "").strip()
        monkeypatch.setitem(FIRST_EDITION, kind, fewer)
    after = run_keys(old), hashed(old.visual), hashed(old.tasks["doc"])
    assert "stages.stage1.anyres" in before[0] and "stages.stage1.anyres" not in after[0]
    assert "arrange" in before[1] and "arrange" not in after[1] and after[1] != before[1]
    assert "max_new_tokens" in before[2] and "max_new_tokens" not in after[2]
    changed = read_recipe(file, ["stages.stage1.anyres=false", "visual.arrange=flat"])
    assert run_keys(changed)["stages.stage1.anyres"] is False, "any other value counts"
    assert differences(old, changed) == [
        "stages.stage1.anyres: None -> False",
        "visual.arrange: None -> flat",
    ]


def test_every_key_that_a_run_depends_on_is_of_an_edition():
    """FIRST_EDITION lists the keys that always enter digests; a new key does not by itself."""
    for kind, names in FIRST_EDITION.items():
        known = {f.name for f in fields(kind)}
        assert set(names.split()) <= known, kind


@pytest.mark.parametrize("kind", [Recipe, Visual, Stage, Source, Task, Assumed])
def test_every_key_has_its_comment_where_it_is_defined(kind):
    """One screen shows a part's keys: default, comment, and what they may be."""
    lines = inspect.getsource(kind).split("@property")[0].splitlines()
    keys = {line.split(":")[0].strip(): line for line in lines if re.match(r"    \w+: \w", line)}
    assert keys.keys() == {f.name for f in fields(kind)}
    assert not [name for name, line in keys.items() if "  # " not in line]
