"""The house rules, measured: sizes, density, functions, imports, formatting, what the README names.

python tests/test_house.py     # the figures, as the README prints them
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "nanollava").rglob("*.py"))
MODEL_PATH = ("anyres", "encoder", "projector", "pooling", "prompts", "sequence", "llm", "model")
FOLDERS = ("extras", "hf", "benchmarks", "ablations")
ONE_PLACE = {  # a heavy library: the only modules that import it
    "composer": {"train"},
    "open_clip": {"encoder"},
    "timm": {"encoder"},
    "transformers": {"llm", "extras.blog_llms", "hf.llava_onevision", "hf.export"},
    "streaming": {"data"},
    "datasets": {"extras.readers", "extras.recaption"},
    "flash_attn": {"llm"},
    "lmms_eval": {"benchmarks.lmms", "benchmarks.judge"},
    "gradio": set(),
    "matplotlib": set(),
}


def name_of(file: Path) -> str:
    """nanollava/hf/export.py -> hf.export"""
    return ".".join(file.relative_to(ROOT / "nanollava").with_suffix("").parts)


def code_lines(source: str) -> int:
    """Lines of code: no blanks, comments or docstrings."""
    tree, lines = ast.parse(source), set()
    empty = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def syntax_nodes(source: str) -> int:
    """Nodes of the syntax tree, without those that only tell reading from writing."""
    contexts = (ast.Load, ast.Store, ast.Del)
    return sum(not isinstance(node, contexts) for node in ast.walk(ast.parse(source)))


def sizes() -> dict[str, int]:
    """Code lines of the model's path, of the compact module, of each folder and of everything."""
    lines = {name_of(file): code_lines(file.read_text()) for file in PACKAGE}
    counts = {
        "anyres to model": sum(lines[name] for name in MODEL_PATH),
        "nanollava/*.py": sum(n for name, n in lines.items() if "." not in name),
    }
    for folder in FOLDERS:
        inside = [n for name, n in lines.items() if name.startswith(f"{folder}.")]
        counts[f"nanollava/{folder}/"] = sum(inside)
    counts["everything"] = sum(lines.values())
    return counts


def told_sizes() -> str:
    """The counts as the README has them."""
    return ", ".join(f"{name} {count:,}" for name, count in sizes().items())


def imports(file: Path) -> set[str]:
    """Modules that a file imports, lazily or not; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_sizes_and_what_the_readme_says_of_them():
    counts = sizes()
    print(told_sizes())
    assert counts["anyres to model"] <= 1050
    assert counts["nanollava/*.py"] <= 2500
    assert counts["everything"] <= 4800
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert told_sizes() in readme, "python tests/test_house.py"


def test_code_is_not_squeezed():
    texts = [file.read_text() for file in PACKAGE]
    density = sum(map(syntax_nodes, texts)) / sum(map(code_lines, texts))
    print(f"{density:.2f} syntax nodes a line")
    assert round(density, 2) <= 7.5


def test_functions_are_short():
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{name_of(file)}.{node.name}")
        for file in PACKAGE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    lengths.sort()
    assert lengths[-1][0] <= 60, lengths[-3:]
    assert lengths[int(0.9 * len(lengths))][0] <= 40
    assert median(length for length, _ in lengths) <= 12


def test_imports_have_at_most_seven_floors_and_no_cycle():
    """Every import counts, lazy ones too; but for those of the package's own __init__."""
    modules = {name_of(file): file for file in PACKAGE if file.name != "__init__.py"}
    graph = {}
    for name, file in modules.items():
        graph[name] = {other for other in modules if f"nanollava.{other}" in imports(file)}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"cycle: {above} {name}"
        return 1 + max((floor(n, (*above, name)) for n in graph[name]), default=0)

    floors = {name: floor(name) for name in graph}
    assert max(floors.values()) <= 7, floors


@pytest.mark.parametrize("library", ONE_PLACE)
def test_heavy_libraries_are_imported_in_one_place(library):
    found = {name_of(f) for f in PACKAGE if any(n.split(".")[0] == library for n in imports(f))}
    assert found <= ONE_PLACE[library]


def test_only_a_users_own_file_is_imported_by_path():
    ways = ("spec_from_file_location", "SourceFileLoader", "importlib.import_module", "exec_module")
    found = {name_of(f) for f in PACKAGE if any(way in f.read_text() for way in ways)}
    assert found == {"extras.user_files"}


def numbers_of(file: Path, line: int) -> tuple[int, int]:
    """Of the statement around a line: its numbers, and all of its constants."""
    statements = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno
    ]
    smallest = min(statements, key=lambda node: node.end_lineno - node.lineno)
    constants = [n.value for n in ast.walk(smallest) if isinstance(n, ast.Constant)]
    return sum(isinstance(value, int | float) for value in constants), len(constants)


def test_formatting_has_no_exceptions_but_tables_of_numbers():
    """`recipes/nano` is exempt: its files enter the digests of measured sweeps."""
    checked = 0
    for file in ROOT.rglob("*.py"):
        if {"runs", "data", "build"} & set(file.parts) or ROOT / "recipes/nano" in file.parents:
            continue
        checked += 1
        for i, text in enumerate(file.read_text().splitlines(), 1):
            if re.search(r"# fmt: (skip|off)", text) and file != Path(__file__):
                numbers, constants = numbers_of(file, i)
                assert numbers >= 8 and numbers > constants / 2, f"{file}:{i}"
    assert checked > 50


def loaded(statement: str) -> set[str]:
    """The top-level modules that a statement loads, in a process of its own."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_light_doors_load_nothing_heavy():
    heavy = {*ONE_PLACE, "torch"}
    assert not loaded("import nanollava") & heavy
    assert not loaded("import nanollava.__main__") & heavy
    read = "from nanollava.recipe import read_recipe; read_recipe('recipes/nano.yaml')"
    assert not loaded(read) & {"open_clip", "timm", "composer", "streaming", "transformers"}


def test_help_answers_at_once():
    """In CPU seconds of the whole process, which other work on the machine does not change."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'nanollava', '--help'], check=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *told, seconds = done.stdout.splitlines()
    assert float(seconds) < 1.5
    from typer.main import get_command

    from nanollava.__main__ import app

    assert all(any(name in line for line in told) for name in get_command(app).commands)


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:nanollava|recipes|notebooks|tests|demo|\.ci)/[\w./-]*\w", text))
    assert named and not [path for path in named if not (ROOT / path).exists()]


def test_readme_commands_exist():
    from typer.main import get_command

    from nanollava.__main__ import app

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"python -m nanollava (\w+)", text))
    assert used and used <= {*get_command(app).commands}
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


if __name__ == "__main__":
    print(told_sizes())
