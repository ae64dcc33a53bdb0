"""Ablations: rows become the right runs, share what they may, and say no more than they show."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launching import ROOT, command, write_recipe
from safetensors.torch import load_file

from nanollava.ablations import ablate, results, verdicts
from nanollava.ablations.rows import UNSCORED, read_rows
from nanollava.anyres import layout
from nanollava.evaluate import DIGITS, read_lines
from nanollava.metrics import f1
from nanollava.recipe import Recipe, read_recipe, used_sources

FILES = sorted((ROOT / "recipes/ablations").glob("*.yaml"))
rows_of = cache(read_rows)  # several tests read all rows, and OmegaConf takes 0.1 s for each


@cache
def recipe_of(base: Path, *keys: str) -> Recipe:
    """A row's recipe with seed 0, read once."""
    return read_recipe(base, [*keys])


def rows_file(tmp_path, base: Path, rows="{a: {}}") -> Path:
    file = tmp_path / "rows.yaml"
    file.write_text(f"base: {{nano: {base}}}\nrows: {rows}\n")
    return file


def rows_in(tmp_path, text: str, scale="nano") -> dict:
    base = ROOT / "recipes"
    file = tmp_path / "rows.yaml"
    file.write_text(f"base: {{nano: {base}/nano_sweep.yaml, full: {base}/qwen05b.yaml}}\n{text}")
    return read_rows(file, scale)


# ---- rows


def test_roles_and_ratios_become_each_bases_own(tmp_path):
    text = """
roles: {nano: {recap: recap_118k}, full: {recap: recap_coco118k}}
full: [stages.stage1_5=null]
rows:
  a:
    keys: ["stages.stage1.sources={$recap: 1}", stages.stage2.lr*=0.5, stages.stage2.batch_size*=2]
  b: {nano: null}
  c: {full: null, nano: [llm=./nano/weights/llm_s]}
"""
    nano, full = rows_in(tmp_path, text), rows_in(tmp_path, text, "full")
    assert [*nano] == ["a", "c"] and [*full] == ["a", "b"]
    small = read_recipe(nano["a"].base, nano["a"].keys)
    large = read_recipe(full["a"].base, full["a"].keys)
    assert small.stages["stage1"].sources["recap_118k"] == 1
    assert large.stages["stage1"].sources["recap_coco118k"] == 1
    assert (small.stages["stage2"].lr, large.stages["stage2"].lr) == (5e-4, 1e-5)
    assert (small.stages["stage2"].batch_size, large.stages["stage2"].batch_size) == (32, 128)
    assert large.stages["stage1_5"] is None
    llm = read_recipe(nano["c"].base, nano["c"].keys).llm
    assert llm == str(ROOT / "recipes/nano/weights/llm_s"), "relative to the base, not to here"


def test_a_role_that_a_base_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match="row a: roles.nano has no 'recap'"):
        rows_in(tmp_path, "rows: {a: {keys: ['stages.stage1.sources={$recap: 1}']}}")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_row_is_a_recipe_of_the_nano_base_and_every_claim_has_its_rows(file):
    read = rows_of(file)
    for row in read.values():
        recipe = recipe_of(row.base, *row.keys)
        tasks = {name for name, task in recipe.tasks.items() if task}
        assert all(recipe.tasks[name].samples >= 500 for name in tasks)
        doors = [*map(recipe.sources.get, used_sources(recipe)), *map(recipe.tasks.get, tasks)]
        assert all(Path(door.path.rpartition(":")[0]).is_file() for door in doors)
    for claim in verdicts.read_claims(file):
        assert {*claim.contrast} <= {*read} and claim.margin > 0 and claim.says
        assert {*claim.metric} <= tasks | UNSCORED.keys()


def test_what_is_refused(tmp_path):
    file = tmp_path / "rows.yaml"
    tree = {"base": {"nano": str(ROOT / "recipes/nano_sweep.yaml")}, "rows": {"a": {}, "b": {}}}
    for contrast, told in (
        ({"a": 1, "c": -1}, r"no rows \['c'\]; the file has \['a', 'b'\]"),
        ({"a": 1, "b": -0.5}, "the weights .* do not sum to 0"),
    ):
        claim = {"says": "x", "section": "2", "metric": "loss", "contrast": contrast, "margin": 1}
        file.write_text(yaml.safe_dump(tree | {"claims": {"x": claim}}))
        with pytest.raises(ValueError, match=f"claim 'x'.*{told}"):
            verdicts.read_claims(file)
    with pytest.raises(ValueError, match=r"has no row \['c'\]; it has \['a', 'b'\]"):
        ablate.plan_jobs(file, "nano", range(1), ["c"], set())


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "is not an ablation file: .*missing mandatory value: rows"),
        ("rows: {}", "is not an ablation file: expected rows"),
        ("rows: {a: }", "is not an ablation file"),
        ("rows: [a, b]", "is not an ablation file"),
        ("rows: {a: {kyes: [seed=1]}}", "is not an ablation file: Key 'kyes'"),
        ("rows: {a: {keys: seed=1}}", "is not an ablation file"),
        ("rows: {a: {keys: [stages.stage2.lrr*=2]}}", "row a: stages.stage2.lrr.*has no number"),
        ("rows: {a: {keys: [encoder*=2]}}", "row a: encoder.*has no number"),
        ("rows: {a: {infer: {max_gird: 4x4}}}", "row a: visual keys.*max_gird"),
        ("rows: {a: {}}\nclaim: {}", "is not an ablation file: Key 'claim'"),
        (
            "rows: {a: {}}\nclaims: {c: {says: x, section: '2', metric: loss, contrast: {a: 0}}}",
            "margin",
        ),
        ("rows: {a: {", "is not an ablation file"),
    ],
)
def test_files_that_mean_nothing_are_named(text, told, tmp_path):
    with pytest.raises(ValueError, match=f"rows.yaml.*{told}|{told}") as error:
        rows_in(tmp_path, text)
        verdicts.read_claims(tmp_path / "rows.yaml")
    assert "rows.yaml" in str(error.value)


# ---- runs


def test_each_row_is_asked_by_its_seed_on_its_own_tasks(tmp_path):
    rows = "{a: {}, b: {keys: [tasks.nano-doc.samples=7]}, c: {infer: {max_grid: base}}}"
    file = rows_file(tmp_path, ROOT / "recipes/nano_sweep.yaml", rows)
    jobs = ablate.plan_jobs(file, "nano", range(3, 5), [], set())
    last = [job for job in jobs.values() if job.measurements]
    assert [job.recipe.seed for job in last] == [3, 4] and len(jobs) == 4
    for job in last:
        wanted = {one.row: one for one in job.measurements}
        assert [one.seed for one in job.measurements] == [job.recipe.seed] * 3
        assert wanted["a"].tasks["nano-doc"].samples == 500
        assert wanted["b"].tasks["nano-doc"].samples == 7
        assert len({one.key for one in job.measurements}) == 3, "each is measured by itself"
    done = {(one.row, one.seed, one.key) for job in last for one in job.measurements}
    assert not ablate.plan_jobs(file, "nano", range(3, 5), [], done)
    some = ablate.plan_jobs(file, "nano", range(3, 5), ["b"], set())
    assert {one.row for job in some.values() for one in job.measurements} == {"b"}


def test_seeds_for_tuning_are_not_mixed_with_evidence():
    with pytest.raises(ValueError, match="seeds 98 to 102 are mixed"):
        ablate.ablate(FILES[0], 5, 98, [], 1, False)


def test_a_key_is_the_same_wherever_the_repository_lies(tmp_path):
    """With a pyproject.toml above the recipe, as in a checkout, or alone in a folder."""

    def key(base: Path) -> str:
        row = read_rows(rows_file(tmp_path, base))["a"]
        return ablate.measurement("a", row, read_recipe(row.base, row.keys)).key

    for place in ("one", "two/deeper"):
        folder = tmp_path / place / "recipes"
        folder.mkdir(parents=True)
        for name in ("nano.yaml", "nano_sweep.yaml"):
            shutil.copy(ROOT / "recipes" / name, folder)
    alone = [key(tmp_path / place / "recipes/nano_sweep.yaml") for place in ("one", "two/deeper")]
    assert alone[0] == alone[1] != key(ROOT / "recipes/nano_sweep.yaml")
    (tmp_path / "one/pyproject.toml").touch()
    (tmp_path / "two/deeper/.git").mkdir()
    checkouts = [
        key(tmp_path / f"{place}/recipes/nano_sweep.yaml") for place in ("one", "two/deeper")
    ]
    assert {*checkouts} == {key(ROOT / "recipes/nano_sweep.yaml")}


def test_a_row_that_ends_without_tiles_keeps_its_own_layout():
    one = ends(["stages.stage2=null", "visual.max_grid=6x6"])
    assert len(one) == 1 and one != ends(["stages.stage2=null"])


def test_other_content_is_another_run(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def some(**_):\n    yield {}\n")
    keys = [f"sources.sheets.path={own}:some"]
    before = ends(keys)
    own.write_text("def some(**_):\n    yield {'id': 1}\n")
    assert ends(keys)[1] != before[1] and ends(keys)[0] == before[0]


def ends(keys: list[str], seed=0) -> list[str]:
    """The run folders that lead to a row."""
    recipe = read_recipe(ROOT / "recipes/nano_sweep.yaml", keys, seed=seed)
    return [Path(part.run).name for part in ablate.split_stages(recipe, ROOT)]


def test_rows_share_a_stage_only_if_it_is_the_same():
    base, grid = ends([]), ends(["visual.max_grid=6x6", "visual.max_visual_tokens=(9+1)T"])
    assert base[0] == grid[0] and base[1] != grid[1]
    assert ends(["visual.lift=4", "visual.pooling=average", "visual.arrange=flat"])[0] == base[0]
    assert ends(["tasks.nano-doc.samples=7", "data=elsewhere", "workers=3"]) == base
    others = (
        "visual.pool_stride=2",
        "llm=./recipes/nano/weights/llm_s",
        "stages.stage1.lr=1",
        "sources.short.samples=7",
        "label_mask=released",
    )
    assert len({base[0], ends([], seed=1)[0], *(ends([key])[0] for key in others)}) == 7
    pooled = ["visual.pool_stride=2", "visual.pool_after_projector=false"]
    assert ends(pooled)[0] != ends(pooled[:1])[0], "stage 1 pools as well"
    assert ends(["stages.stage2.lr=1"])[0] == base[0]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"pool_stride": 2},
        {"pool_stride": 2, "pooling": "average", "pool_after_projector": False},
        {"max_grid": "6x6", "lift": 6},
        {"arrange": "flat"},
        {"budget": "mosaic", "max_grid": "3x3"},
        {"max_visual_tokens": "20"},
    ],
)
def test_a_shared_stage_sees_what_the_row_would_have_shown_it(keys):
    recipe = read_recipe(ROOT / "recipes/nano_sweep.yaml")
    own = replace(recipe.visual, **keys)
    shared = ablate.untiled(own, 36)
    for size in ((192, 192), (96, 300), (48, 48), (7, 5)):
        mine, other = (layout(size, replace(v, max_grid="base"), 48, 6) for v in (own, shared))
        assert (mine.side, mine.views) == (other.side, other.views)
    if mine.side < 6:
        assert (own.pooling, own.pool_after_projector) == (
            shared.pooling,
            shared.pool_after_projector,
        )


def slow(name: str):
    """A job's stand-in: returns when it began and ended."""
    start = time.time()
    time.sleep(0.2)
    if name == "fails":
        raise ValueError("this one")
    return start, time.time()


def test_a_job_waits_for_the_one_that_it_starts_from(monkeypatch):
    order = [("a", ""), ("b", "a"), ("c", ""), ("d", "b")]
    jobs = {run: ablate.Job(run, start) for run, start in order}
    monkeypatch.setattr(ablate, "run_job", lambda job: slow(job.recipe))
    monkeypatch.setattr(ablate, "worker_pool", ThreadPoolExecutor)
    times = {job.recipe: when for job, when in ablate.run_jobs(jobs, 2)}
    assert times["b"][0] >= times["a"][1] and times["d"][0] >= times["b"][1]
    assert times["c"][0] < times["a"][1], "both workers are busy"


def test_no_job_begins_after_one_that_failed(monkeypatch):
    begun = []
    jobs = {run: ablate.Job(run) for run in ("fails", "a", "b")}
    monkeypatch.setattr(ablate, "run_job", lambda job: (begun.append(job.recipe), slow(job.recipe)))
    monkeypatch.setattr(ablate, "worker_pool", ThreadPoolExecutor)
    with pytest.raises(ValueError, match="this one"):
        [*ablate.run_jobs(jobs, 1)]
    assert begun == ["fails"]


def test_a_fresh_process_can_begin_with_any_job():
    wanted = ablate.Measurement("row", 0, {}, {}, "key")
    with ablate.worker_pool(1) as processes:
        assert processes.submit(repr, wanted).result() == repr(wanted)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A real sweep of two rows and one of equal training, by command."""
    folder = tmp_path_factory.mktemp("sweep")
    base = write_recipe(folder)
    base.write_text(base.read_text().replace("workers: 1", "workers: 0"))
    (folder / "rows.yaml").write_text("""
base: {nano: ./tiny.yaml}
rows:
  grid: {keys: [seed=0]}
  base view: {infer: {max_grid: base}}
  fewer tokens: {keys: [visual.max_visual_tokens=2T, visual.max_grid=1x1]}
""")
    words = ("-m", "nanollava", "ablate", "rows.yaml", "--seeds", 1, "--workers", 2)
    return folder, command(*words, cwd=folder)


def lines_of(folder) -> dict:
    return {x["row"]: x for x in read_lines(folder / "results/rows.jsonl")}


def test_a_sweep_measures_each_row_and_goes_on_where_it_was(swept):
    folder, told = swept
    lines = lines_of(folder)
    assert [*lines] and {*lines} == {"grid", "base view", "fewer tokens"} and "3 results" in told
    assert lines["grid"]["run"] == lines["base view"]["run"] != lines["fewer tokens"]["run"]
    for line in lines.values():
        task = line["tasks"]["nano-mixed"]
        assert len(task["each"]) == task["n"] == 5 and len(line["losses"]) == 20
        assert {*line["cpu_seconds"]} == {"stage1", "stage1_5", "stage2"}
        assert all(s > 0 for s in line["cpu_seconds"].values()) and line["flops"] > 1e6
    tokens = {k: x["tasks"]["nano-mixed"]["tokens"] for k, x in lines.items()}
    assert tokens["grid"] > tokens["fewer tokens"] > tokens["base view"]
    assert all((folder / "runs/ablate" / line["run"]).is_dir() for line in lines.values())
    content = (folder / "results/rows.jsonl").read_text()
    again = command("-m", "nanollava", "ablate", folder / "rows.yaml", "--seeds", 1, cwd=folder)
    assert "3 results" in again and (folder / "results/rows.jsonl").read_text() == content


def test_a_row_by_shared_stages_equals_the_recipe_trained_in_one_go(swept, tmp_path):
    folder, _ = swept
    run = folder / "runs/ablate" / lines_of(folder)["fewer tokens"]["run"]
    command(
        "-m",
        "nanollava",
        "train",
        folder / "tiny.yaml",
        f"run={tmp_path}/run",
        "visual.max_visual_tokens=2T",
        "visual.max_grid=1x1",
    )
    ours, whole = (load_file(f / "model.safetensors") for f in (run, tmp_path / "run"))
    assert all(torch.equal(x, whole[name]) for name, x in ours.items())


# ---- verdicts


def line(row, seed, score, rows=None, **keys):
    rows = np.array([score] * 4) if rows is None else rows
    task = {
        "metric": "nano_f1_yes" if rows.ndim > 1 else "nano_anls",
        "score": score,
        "n": len(rows),
        "each": "".join(DIGITS[i] for i in np.rint(63 * rows).astype(int).ravel()),
    }
    return {"row": row, "seed": seed, "tasks": {"t": task}, **keys}


CLAIM = verdicts.Claim("c", "says", "2", ("t",), {"a": 1, "b": -1}, 0.02)


def test_a_paired_t_over_seeds():
    a, b = (0.50, 0.61, 0.72, 0.58, 0.66), (0.45, 0.52, 0.69, 0.50, 0.60)
    lines = [line(row, s, x) for row, xs in (("a", a), ("b", b)) for s, x in enumerate(xs)]
    found = verdicts.measure(CLAIM, lines)
    d = np.subtract(a, b)
    half = 2.776445 * d.std(ddof=1) / 5**0.5  # t of 4 degrees of freedom
    assert found.mean == pytest.approx(d.mean()) and found.seeds == (0, 1, 2, 3, 4)
    assert found.low == pytest.approx(d.mean() - half, rel=1e-5)
    assert found.high == pytest.approx(d.mean() + half, rel=1e-5)


def test_only_seeds_that_have_all_rows_count_and_the_last_line_of_each():
    lines = [line("a", 0, 0.9), line("a", 0, 0.5), line("b", 0, 0.4), line("a", 1, 0.7)]
    found = verdicts.measure(CLAIM, lines)
    assert found.seeds == (0,) and found.mean == pytest.approx(0.1)
    two = verdicts.measure(CLAIM, seeds(0.200, 0.201))
    assert two.p < 0.01 and verdicts.judge([two])[0].word == "waits for seeds"


def test_a_mean_over_metrics():
    lines = [line("a", 0, 0.5, losses=[0.3]), line("b", 0, 0.1, losses=[0.2])]
    found = verdicts.measure(replace(CLAIM, metric=("t", "loss")), lines)
    assert found.mean == pytest.approx((0.4 + 0.1) / 2)


def test_a_tie_of_seeds_is_no_evidence():
    found = verdicts.measure(CLAIM, seeds(0.03, 0.03, 0.03))
    assert found.p == 1 and verdicts.judge([found])[0].word == "not resolved"


def test_holm_by_hand():
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert verdicts.holm([0.5, 0.6]) == [1.0, 1.0] and verdicts.holm([]) == []


def seeds(*values):
    return [line(row, s, x if row == "a" else 0.0) for s, x in enumerate(values) for row in "ab"]


LARGE, SMALL = (0.20, 0.22, 0.21, 0.19, 0.20), (0.010, 0.011, 0.010, 0.009, 0.010)


def minus(values):
    return tuple(-x for x in values)


@pytest.mark.parametrize(
    "holds, values, word",
    [
        ("above", LARGE, "same direction"),
        ("above", minus(LARGE), "opposite"),
        ("above", (0.20, -0.22, 0.31, -0.19, 0.20), "not resolved"),
        ("above", SMALL, "not resolved"),  # sure, but too small to matter
        ("beyond", LARGE, "same direction"),
        ("beyond", minus(LARGE), "same direction"),
        ("beyond", SMALL, "opposite"),
        ("beyond", (0.02, -0.05, 0.01, 0.04, 0.00), "not resolved"),
        ("within", SMALL, "same direction"),
        ("within", minus(SMALL), "same direction"),
        ("within", LARGE, "opposite"),
        ("within", minus(LARGE), "opposite"),
        ("within", (0.02, -0.05, 0.01, 0.04, 0.00), "not resolved"),
        ("within", (-0.03, 0.01, 0.0, 0.01, -0.01), "not resolved"),  # too low on one side alone
        ("within", (0.03, -0.01, 0.0, -0.01, 0.01), "not resolved"),
        ("at_most", SMALL, "same direction"),
        ("at_most", minus(LARGE), "same direction"),
        ("at_most", LARGE, "opposite"),
        ("at_most", (0.03, -0.01, 0.0, -0.01, 0.01), "not resolved"),
    ],
)
def test_words(holds, values, word):
    found = verdicts.measure(replace(CLAIM, holds=holds), seeds(*values))
    assert verdicts.judge([found])[0].word == word


def test_more_claims_ask_for_more_evidence():
    weak = verdicts.measure(CLAIM, seeds(0.10, 0.14, 0.05, 0.20, 0.06))
    assert 0.005 < weak.p < 0.05 and verdicts.judge([weak])[0].word == "same direction"
    assert {v.word for v in verdicts.judge([weak] * 20)} == {"not resolved"}
    for holds, word in (
        ("within", "same direction"),
        ("at_most", "same direction"),
        ("beyond", "not resolved"),
    ):
        more = [replace(weak, claim=replace(CLAIM, holds=holds))] * 20
        assert verdicts.judge([weak] + more)[0].word == word, "an interval is no test"


def test_questions_are_paired_and_scores_survive_their_code():
    rng = np.random.default_rng(1)
    each = rng.random(400)
    a, b = each.clip(0.1), (each - 0.1).clip(0)  # differ by 0.1 in every question
    lines = [line("a", 0, a.mean(), a), line("b", 0, b.mean(), b)]
    low, high = verdicts.measure(CLAIM, lines).questions
    assert 0.09 < low < high < 0.11, "unpaired, it would be four times as wide"
    assert np.abs(verdicts.scores(lines[0]["tasks"]["t"]) - a).max() <= 0.5 / 63 + 1e-12
    pairs = rng.integers(0, 2, (300, 2)).astype(float)
    task = line("a", 0, f1(pairs), pairs)["tasks"]["t"]
    assert np.array_equal(verdicts.scores(task), pairs)
    other = pairs.copy()
    other[:, 0] = other[:, 1]  # always right
    low, high = verdicts.measure(
        CLAIM, [line("a", 0, 1.0, other), line("b", 0, 0.5, pairs)]
    ).questions
    assert low < 1 - f1(pairs) < high


def test_scores_are_read_as_digits_and_as_numbers():
    single, pairs = np.array([0.0, 31 / 63, 1.0]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for expected in (single, pairs):
        old = line("a", 0, 0.5, expected)["tasks"]["t"]
        for each in (old["each"], expected.tolist(), expected.ravel().tolist()):
            read = verdicts.scores(old | {"each": each})
            assert read.shape == expected.shape and np.array_equal(read, expected)


def test_a_bootstrap_is_of_the_mean_over_metrics_and_seeds():
    def two(row, seed, t, u):
        tasks = {
            n: line(row, seed, x, np.full(50, x))["tasks"]["t"] for n, x in {"t": t, "u": u}.items()
        }
        return line(row, seed, t) | {"tasks": tasks}

    lines = [
        two("a", 0, 1.0, 1.0),
        two("b", 0, 0.0, 20 / 63),
        two("a", 1, 1.0, 1.0),
        two("b", 1, 40 / 63, 60 / 63),
    ]
    found = verdicts.measure(replace(CLAIM, metric=("t", "u")), lines)
    mean = (1 + 43 / 63 + 23 / 63 + 3 / 63) / 4  # all questions alike: no spread but over them
    assert found.questions == pytest.approx((mean, mean)) and found.mean == pytest.approx(mean)


def test_losses_and_seconds_can_be_claimed_about():
    keys = {"losses": [9.0] * 18 + [1.0, 2.0], "cpu_seconds": {"stage1": 5.0, "stage2": np.e}}
    one = line("a", 0, 0.5, **keys)
    assert verdicts.value(one, "loss") == 1.5 and verdicts.value(one, "train") == pytest.approx(1)
    assert verdicts.value(one | {"flops": np.e**2}, "flops") == pytest.approx(2)
    assert np.isnan(verdicts.value(one, "flops")), "lines of before it was written"
    two = {n: {"cpu_seconds": np.e / 2} for n in "tu"}
    assert verdicts.value(one | {"tasks": two}, "infer") == pytest.approx(1), "of all tasks"
    torn = line("b", 0, 0.5, losses=[1.0], cpu_seconds={"stage2": None})
    found = verdicts.measure(replace(CLAIM, metric=("train",)), [one, torn])
    assert found.seeds == (), "a stage that was resumed has no seconds"


def test_two_trainings_of_one_recipe_and_seed_are_counted_and_compared(monkeypatch):
    def trained(score, loss, **keys):
        tasks = {"t": {"score": score}}
        cpu = {"stage1": 9, "stage2": 1800}
        return {"run": "r", "key": "k", "losses": [loss], "cpu_seconds": cpu, "tasks": tasks} | keys

    lines = [trained(0.5, 1.0), trained(0.5, 1.0), trained(0.53, 1.1)]  # the second shares a run
    lines += [trained(0.9, 1.0, key="asked otherwise"), trained(0.2, 2.0, run="q", key="j")]
    monkeypatch.setattr(results, "files", lambda: [Path("x.yaml")])
    monkeypatch.setattr(results, "result_lines", lambda file: lines)
    told = results.trainings()
    assert "3 last stages were trained in 1.5 CPU hours, of 2 recipes" in told
    assert "3.0 points apart in the median, 3.0 at most" in told


# ---- what is committed


def test_the_page_of_results_is_that_of_the_lines():
    assert (ROOT / "recipes/RESULTS.md").read_text() == results.page(), (
        "python -m nanollava.ablations.results"
    )


def test_the_readme_says_what_the_page_of_results_says():
    text, page = ((ROOT / name).read_text() for name in ("README.md", "recipes/RESULTS.md"))
    assert re.search(r"\d+ claims: [^.]+", page).group() in text
    shown = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", text, re.M)
    assert len(shown) > 5
    for file, name, told, word in shown:
        section = page.split(f"\n## {file}\n")[1].split("\n## ")[0]
        (line,) = [x for x in section.splitlines() if x.startswith(f"| {name} |")]
        assert f"| {told} |" in line and line.endswith(f"| **{word}** |"), name


def test_measured_lines_are_whole_and_of_reporting_seeds():
    for file in results.files():
        read = rows_of(file)
        for x in results.result_lines(file):
            assert x["row"] in read and x["seed"] < ablate.TUNING and "dirty" not in x["commit"]
            for task in x["tasks"].values():
                total = verdicts.METRICS[task["metric"]][1]
                assert task["n"] >= 500
                assert total(verdicts.scores(task)) == pytest.approx(task["score"], abs=0.008)
            assert json.dumps(x).find(str(ROOT)) < 0


def test_every_committed_key_is_recomputed():
    """No measured result is orphaned by a change of recipe keys, their names or their order."""
    count = 0
    for file in results.files():
        for (name, seed), x in verdicts.latest(results.result_lines(file)).items():
            row = rows_of(file)[name]
            recipe = replace(recipe_of(row.base, *row.keys), seed=seed)
            wanted = ablate.measurement(name, row, recipe)
            assert (wanted.seed, wanted.key) == (seed, x["key"]), (file.stem, name, seed)
            count += 1
    assert count == 581


def test_a_label_says_what_the_row_is_in_nano():
    labelled = 0
    for file in FILES:
        for row in filter(lambda row: row.label, rows_of(file).values()):
            recipe = recipe_of(row.base, *row.keys)
            stage = recipe.stages["stage2"]
            amounts = {recipe.sources[name].samples for name in used_sources(recipe)}
            known = {Path(recipe.llm).name, f"batch {stage.batch_size}"}
            known |= {f"lr {stage.lr:g}", f"vision {stage.vision_lr:g}"}
            for word in re.findall(r"llm_\w|batch \d+|(?:lr|vision) \S+(?=,|$)", row.label):
                name, _, number = word.partition(" ")
                assert (f"{name} {float(number):g}" if number else name) in known, row.label
            for number in re.findall(r"(\d+) \w+(?: \w+)?(?=,|$)", row.label):
                assert int(number) in amounts, row.label
            labelled += 1
    assert labelled == 45
    page = (ROOT / "recipes/RESULTS.md").read_text()
    assert "| llm_s, batch 8 | 0.5B, batch 64 | 3 |" in page and "| 3x3, mosaic | 3 |" in page
    assert "| vision lr a fifth |  | 3 |" in page
