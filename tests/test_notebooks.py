"""The notebooks run from top to bottom, and are what STYLE asks of a lesson."""

import ast
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest

from nanollava.sources import import_file

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [pytest.param(file, id=file.stem) for file in NOTEBOOKS]


QUOTED = r'^> "[^"]+"\s*(> )?\((Section|Introduction)'  # a sentence of the blog with its place


def cells(file, kind):
    notebook = nbformat.read(file, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("file", LESSONS)
def test_runs_from_top_to_bottom(file, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOLLAVA_QUICK", "1")
    monkeypatch.setenv("NANOLLAVA_RUNS", str(tmp_path))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    notebook = import_file(str(ROOT / "notebooks/run.py")).run(file)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)


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
