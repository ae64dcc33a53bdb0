"""The house rules as tests: README paths and commands, file budgets, import floors."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "nanollava").glob("*.py"))
TOOLS = sorted((ROOT / "recipes/tools").glob("*.py"))  # counted apart, under the same rules
ONE_PLACE = {  # a heavy library and the only modules that import it
    "composer": {"train"},
    "open_clip": {"encoder"},
    "transformers": {"llm", "hf", "export"},
    "streaming": {"data"},
    "gradio": set(),
    "matplotlib": set(),
    "flash_attn": {"llm"},
}


def code_lines(source: str) -> int:
    """Lines of code: no blanks, comments or docstrings."""
    tree, lines = ast.parse(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imports(file: Path) -> set[str]:
    """Modules that a file imports, lazily or not; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_size():
    nano = (ROOT / "recipes/nano").glob("*.py")
    package, tools, nano = (
        [code_lines(file.read_text()) for file in files] for files in (PACKAGE, TOOLS, nano)
    )
    assert max(package + tools) <= 210
    assert sum(package) <= 2200, sum(package)
    print(f"nanollava {sum(package)}, recipes/tools {sum(tools)}, recipes/nano {sum(nano)}")


def test_functions_are_short():
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{file.stem}.{node.name}")
        for file in [*PACKAGE, *TOOLS]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    lengths.sort()
    assert lengths[-1][0] <= 60, lengths[-3:]
    assert lengths[int(0.9 * len(lengths))][0] <= 40


def test_imports_have_at_most_five_floors():
    modules = {file.stem for file in PACKAGE} - {"__init__"}
    graph = {
        file.stem: modules & {n.split(".")[1] for n in imports(file) if n.startswith("nanollava.")}
        for file in PACKAGE
        if file.stem != "__init__"
    }

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"cycle: {above} {name}"
        return 1 + max((floor(n, (*above, name)) for n in graph[name]), default=0)

    assert max(map(floor, graph)) <= 5, {name: floor(name) for name in graph}


@pytest.mark.parametrize("library", ONE_PLACE)
def test_heavy_libraries_are_imported_in_one_place(library):
    files = [*PACKAGE, *TOOLS]
    found = {f.stem for f in files if any(n.split(".")[0] == library for n in imports(f))}
    assert found <= ONE_PLACE[library]


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:nanollava|recipes|notebooks|tests|demo|\.ci)/[\w./-]*\w", text))
    assert named and not [path for path in named if not (ROOT / path).exists()]


def test_readme_commands_exist():
    from typer.main import get_command

    from nanollava.__main__ import BESIDE, app

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"python -m nanollava (\w+)", text))
    assert used and used <= {*get_command(app).commands, *BESIDE}
    assert "pip install -r requirements.txt" in text and "python -m pytest" in text


def test_readme_is_short_and_says_whose_it_is_not():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert lines[1].startswith("Not affiliated with the LLaVA team")
    assert "qnguyen3/nanoLLaVA" in lines[1]


def test_no_machine_path_is_committed():
    texts = [f for f in ROOT.rglob("*") if f.suffix in (".py", ".md", ".yaml", ".json", ".txt")]
    parts = ("/root" + "/", "/home" + "/", "/work" + "/")
    skipped = {"runs", "data", ".git"}
    for file in texts:
        if not skipped & set(file.relative_to(ROOT).parts):
            assert not any(part in file.read_text(errors="ignore") for part in parts), file
