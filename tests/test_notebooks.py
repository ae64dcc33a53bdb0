"""The notebooks run from top to bottom, and are what STYLE asks of a lesson."""

import ast
import base64
import io
import re
import statistics
import sys
import textwrap
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from nanollava.sources import import_file

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [pytest.param(file, id=file.stem) for file in NOTEBOOKS]


QUOTED = r'^> "[^"]+"\s*(> )?\((Section|Introduction)'  # a sentence of the blog with its place


def cells(file, kind):
    notebook = nbformat.read(file, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.notebooks
@pytest.mark.parametrize("file", LESSONS)
def test_runs_from_top_to_bottom(file, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOLLAVA_QUICK", "1")
    monkeypatch.setenv("NANOLLAVA_RUNS", str(tmp_path))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    notebook = import_file(str(ROOT / "notebooks/run.py")).run(file)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)


@pytest.mark.timeout(120)
def test_cells_with_sliders_do_not_hang_and_keep_what_they_draw(tmp_path):
    draw = """
        import matplotlib.pyplot as plt
        from ipywidgets import IntSlider, interact
        %matplotlib inline
        @interact(a=IntSlider(3, 1, 6))
        def redraw(a):
            plt.imshow([[a]])
            plt.show()
    """
    code = [nbformat.v4.new_code_cell(textwrap.dedent(draw)) for _ in range(4)]
    nbformat.write(nbformat.v4.new_notebook(cells=code), tmp_path / "sliders.ipynb")
    done = import_file(str(ROOT / "notebooks/run.py")).run(tmp_path / "sliders.ipynb")
    for cell in done.cells:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("file", LESSONS)
def test_committed_outputs_are_whole_small_and_name_no_machine(file):
    text = file.read_text()
    assert len(text) <= 300_000
    assert nbformat.reads(text, as_version=4).metadata["nanollava"]["quick"] is False
    code = cells(file, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum(bool(cell.outputs) for cell in code) >= 0.85 * len(code)
    assert not re.search(r"/(work|root|home|tmp)/|site-packages", text)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("file", LESSONS)
def test_prose_and_code_keep_their_measure(file):
    code = [cell.source for cell in cells(file, "code")]
    words = sum(len(cell.source.split()) for cell in cells(file, "markdown"))
    lines = [len([x for x in source.splitlines() if x.strip()]) for source in code]
    assert statistics.median(lines) <= 5 and max(lines) <= 12
    assert 5 <= words / sum(lines) <= 14, words / sum(lines)
    for source in code:
        if not source.lstrip().startswith("!") and "\n!" not in source:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 8, node.name


@pytest.mark.parametrize("file", LESSONS)
def test_three_exercises_with_folded_answers_that_are_checked(file):
    answers = [cell for cell in cells(file, "code") if "answer" in cell.metadata.get("tags", [])]
    assert len(answers) >= 3
    for cell in answers:
        assert cell.metadata["jupyter"]["source_hidden"] and "assert " in cell.source
    text = "\n".join(cell.source for cell in cells(file, "markdown"))
    assert all(f"**{n}.**" in text for n in (1, 2, 3))
    assert "**The question.**" in text and re.search(QUOTED, text, re.M)


def test_the_syllabus_names_every_notebook():
    syllabus = (ROOT / "notebooks/README.md").read_text()
    assert all(file.name in syllabus for file in NOTEBOOKS)
    assert set(re.findall(r"\d\d_\w+\.ipynb", syllabus)) == {file.name for file in NOTEBOOKS}


# ------------------------------------------------------------------------------ what they draw

plots = import_file(str(ROOT / "notebooks/plots.py"))
lab = import_file(str(ROOT / "notebooks/lab.py"))


def printed(table):
    """{column: value} of each row of a blog table."""
    keys = plots.BLOG["tables"][table]
    return [dict(zip([*keys["factors"], *keys["metrics"]], row)) for row in keys["rows"]]


def test_what_the_blog_prints_twice_agrees_and_its_means_are_means():
    for table, row in (("T7", 0), ("T8", 2), ("T9", 0)):
        for column in ("chartqa", "docvqa", "infovqa", "vizwiz", "pope"):
            assert printed(table)[row][column] == printed("T4")[0][column]
    for table in ("T1", "T3", "T11"):
        keys = plots.BLOG["tables"][table]
        doubted = {row for row, *_ in keys["doubts"]}
        for i, row in enumerate(printed(table)):
            scores = [row[key] for key in keys["metrics"] if key != "avg"]
            if row["avg"] is not None and i not in doubted:
                assert abs(statistics.mean(scores) - row["avg"]) < 0.16, (table, i)


def test_a_blog_table_shows_the_rows_and_columns_asked_for():
    shown = plots.blog("T4", "max_grids", "docvqa", rows=(0, 3))
    assert shown.data.values.tolist() == [["2x2", 58.8], ["6x6", 56.7]]


def test_bars_reach_from_low_to_high_and_chance_is_marked():
    row = {"setting": "a", "task": "nano-x", "score": 0.5, "low": 0.4, "high": 0.7, "chance": 0.1}
    plots.bars([row])
    axis = plots.plt.gca()
    (bar,), whisker, line = axis.patches, *axis.collections
    assert bar.get_height() == 50
    assert whisker.get_segments()[0][:, 1].tolist() == pytest.approx([40, 70])
    assert line.get_segments()[0][:, 1].tolist() == pytest.approx([10, 10])
    plots.plt.close("all")


def test_measure_asks_as_many_questions_as_it_says(monkeypatch):
    asked = []
    monkeypatch.setattr(lab, "QUICK", False)
    monkeypatch.setattr(
        lab,
        "evaluate_task",
        lambda llava, name, task, visual: (
            asked.append((name, task.samples, task.split, visual.max_grid)) or {"task": name}
        ),
    )
    llava = type(
        "Fake",
        (),
        {"model": type("Fake", (), {"recipe": lab.read_recipe(ROOT / "recipes/nano.yaml")})},
    )
    rows = lab.measure(llava, ["nano-doc"], {"one": {"max_grid": "1x1"}}, n=7)
    assert asked == [("nano-doc", 7, "test", "1x1")] and rows == [
        {"setting": "one", "task": "nano-doc"}
    ]


def test_a_band_lies_between_low_and_high_and_a_run_upon_it(tmp_path):
    (tmp_path / "band.csv").write_text("stage,step,low,high\nstage1,1,4,6\nstage1,2,3,5\n")
    head = "stage,step,source,loss,tokens,lr,seconds\n"
    (tmp_path / "losses.csv").write_text(head + "stage1,1,all,5,9,0,1\nstage1,2,all,4,9,0,1\n")
    plots.band(tmp_path / "band.csv", tmp_path)
    axis = plots.plt.gca()
    corners = axis.collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(c) for c in corners} == {(1, 4), (1, 6), (2, 3), (2, 5)}
    assert axis.lines[0].get_xydata().tolist() == [[1, 5], [2, 4.5]]  # a mean of ten, or fewer
    plots.plt.close("all")


def test_scaling_draws_each_row_at_its_size():
    plots.scaling()
    llm, size, tokens = plots.plt.gcf().axes
    assert llm.lines[0].get_xydata().tolist()[0] == [0.5, 52.8]
    assert llm.lines[0].get_xydata().tolist()[-1] == [110, 76.0]
    assert [line.get_xydata().tolist()[0] for line in size.lines][-1] == [0.4, 66.4]
    assert [line.get_xydata().tolist()[0] for line in tokens.lines][4] == [1024, 64.4]
    plots.plt.close("all")


def test_figure_2_draws_the_blogs_averages_over_the_blogs_amounts():
    sweeps = import_file(str(ROOT / "notebooks/sweeps.py"))
    sweeps.figure_2()
    lines = {line.get_label(): line for line in sweeps.plt.gcf().axes[0].lines}
    recaptions = lines["stage 1.5, re-captions"]
    assert recaptions.get_xdata().tolist() == [118e3, 558e3, 3e6]
    assert list(recaptions.get_ydata()) == [68.6, 69.4, 70.7]
    assert list(lines["stage 1, web, random"].get_ydata()) == [67.7, 67.6, 68.2]
    sweeps.plt.close("all")


def test_pictures_of_a_notebook_keep_their_size_and_look():
    run = import_file(str(ROOT / "notebooks/run.py"))
    pixels = np.zeros((40, 60, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None] * 4
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=0)
    text = run.small(before := base64.b64encode(file.getvalue()).decode())
    kept = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
    assert len(text) < len(before) and kept.shape == pixels.shape
    assert abs(kept.astype(int) - pixels).max() <= 4
