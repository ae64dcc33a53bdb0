"""All benches, each in a process of its own -> one table, in RESULTS.md beside this file.

    python tests/bench                  # 24 minutes on one idle core; the peer takes up to 21 GB
    python tests/bench step generate    # some of them; the table is printed alone

Only the processes load torch: one that is forked after it may wait for ever.
"""

import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("preprocess", "step", "generate", "trainer", "planned", "heads", "recaption")
HEAD = """# Benches

`python tests/bench`: {date}, commit {commit}, one thread on {machine};
torch {torch}, transformers {transformers}, mosaicml {mosaicml}; {minutes:.0f} minutes. CPU time,
contenders in turns, medians of five rounds, or of one to three of those that take a minute and
more; equal results come first. The peer is transformers' LlavaOnevision with the same weights.

| what | found | target | met | |
|---|---|---|---|---|
"""


def apart(function: Callable, *arguments: str) -> Any:
    """A function's result in a process of its own, forked while nothing is loaded here."""
    with ProcessPoolExecutor(1, get_context("fork")) as one:
        try:
            return one.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            told = f"{' '.join(arguments)}: the process was killed; the peer takes up to 21 GB"
            raise SystemExit(told) from error


def run(name: str) -> list[tuple[str, list[str]]]:
    """One bench's rows as text: a Row would bring torch here."""
    return [(str(row), row.cells()) for row in import_module(name).main()]


def commit() -> str:
    """The commit that is measured, as results of ablations name theirs."""
    from nanollava.extras.environment import commit

    return commit()


def main() -> None:
    """Run them, print each row as it comes, write the table."""
    begin, rows, chosen = time.perf_counter(), [], sys.argv[1:] or NAMES
    if unknown := {*chosen} - {*NAMES}:
        raise SystemExit(f"no such bench: {sorted(unknown)}; there are {', '.join(NAMES)}")
    for name in chosen:
        for told, cells in apart(run, name):
            print(told, flush=True)
            rows.append(cells)
    if sys.argv[1:]:
        return
    head = HEAD.format(
        date=date.today(),
        commit=apart(commit),
        machine=platform.machine(),
        minutes=(time.perf_counter() - begin) / 60,
        **{name: version(name) for name in ("torch", "transformers", "mosaicml")},
    )
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    (HERE / "RESULTS.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
