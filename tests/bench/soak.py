"""Half an hour of nano training beside the demo and its visitors: what memory does, what is left.

    python tests/bench/soak.py                 # --minutes 3 for a look; writes soak.png with --out

A visitor asks twenty questions about as many pages and goes; the next one comes, and the demo
remembers four (half an hour would not fill its usual 256). Every ten seconds: memory that is each
side's own (USS, all of its processes), processes, open files. At the end they must lie within 2% of
the time after the warm-up, and nothing may be left when both have stopped.
Freed memory goes back to the system at once here (GIVE_BACK): glibc would keep most of it, since
packs have ever new sizes, 2 GB instead of 0.5 in nano's stage 2; that costs half as much CPU time
again, so a run does not do it.
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

sys.path.insert(0, str(Path(__file__).parent))
from demo import ROOT, pages, serve, usable, wait  # noqa: E402

EVERY, PAUSE = 10, 2.0  # seconds between looks, and between questions
GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_ARENA_MAX": "1"}


def look(process: psutil.Process) -> tuple[float, int, int]:
    """MB of its own and below, processes, open files."""
    found = []
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found.append((one.memory_full_info().uss / 1e6, 1, one.num_fds()))
    return tuple(map(sum, zip(*found, strict=True)))


def shared() -> set[str]:
    """Names in shared memory, and temporary files of ours."""
    temporary = Path(tempfile.gettempdir())
    found = [
        *Path("/dev/shm").iterdir(),
        *temporary.glob("nanollava*"),
    ]
    return {str(file) for file in found if not file.name.endswith(".lock")}


def train(folder: Path) -> subprocess.Popen:
    """A run whose second stage does not end."""
    keys = [
        f"run={folder}/run",
        f"data={folder}/data",
        "stages.stage1_5=null",
        "reference=''",
        "stages.stage2.duration=1000000ba",
        "stages.stage2.save_interval=100",
    ]
    command = [
        str(Path(sys.executable).parent / "composer"),
        str(ROOT / "recipes/nano.yaml"),
        *keys,
    ]
    with (folder / "train.log").open("w") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, **GIVE_BACK},
            start_new_session=True,
        )


def steps(folder: Path) -> int:
    """How many steps of stage 2 were logged."""
    file = folder / "run/losses.csv"
    return file.read_text().count("stage2,") if file.exists() else 0


def soak(folder: Path, minutes: float) -> dict[str, np.ndarray]:
    """What was seen at each look, by side: (seconds, MB, processes, files)."""
    training, (demo, port) = train(folder), serve("--visits", "4", **GIVE_BACK)
    seen: dict[str, list] = {"training": [], "demo": []}
    try:
        client = usable(port, demo)
        asked = itertools.cycle(pages(folder, 40))
        while training.poll() is None and not steps(folder):
            time.sleep(1)
        begin = last = time.perf_counter()
        answers = 0
        while (now := time.perf_counter()) < begin + 60 * minutes:
            assert training.poll() is None and demo.poll() is None, "one of them has ended"
            if answers % 20 == 0:
                client.close()
                client = usable(port, demo)
            file, text = next(asked)
            wait(client, text, [file])
            answers += 1
            if now - last > EVERY:
                last = now
                for name, process in (("training", training), ("demo", demo)):
                    seen[name].append((now - begin, *look(psutil.Process(process.pid))))
            time.sleep(PAUSE)
        print(f"{answers} answers, {steps(folder)} steps of training in {minutes:g} minutes")
    finally:
        both = [psutil.Process(process.pid) for process in (training, demo)]
        all_of_them = [*both, *(child for one in both for child in one.children(recursive=True))]
        for process in (training, demo):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in (training, demo)]
        alive = psutil.wait_procs(all_of_them, timeout=10)[1]
        print(f"stopped with exit codes {codes}")
    assert codes == [143, 0] and not alive, (codes, alive)
    return {name: np.array(rows) for name, rows in seen.items()}


def draw(found: dict[str, np.ndarray], out: Path) -> None:
    """Memory over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for name, rows in found.items():
        axes.plot(rows[:, 0] / 60, rows[:, 1], label=name)
    axes.set(xlabel="minutes", ylabel="MB of its own", ylim=(0, None))
    axes.legend()
    figure.savefig(out, dpi=150)


def main(
    minutes: Annotated[float, typer.Option(min=1)] = 30,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Soak, print, fail where memory grows or something is left."""
    before = shared()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), minutes)
    bad = []
    for name, rows in found.items():
        part = max(1, len(rows) // 6)  # five minutes of thirty
        warm, end = rows[part : 2 * part].mean(0), rows[-part:].mean(0)
        print(
            f"{name}: MB by sixths "
            + ", ".join(f"{each[:, 1].mean():.0f}" for each in np.array_split(rows, 6))
        )
        told = ", ".join(
            f"{what} {a:.1f} -> {b:.1f}"
            for what, a, b in zip(("MB", "processes", "open files"), warm[1:], end[1:], strict=True)
        )
        print(f"  {told} ({end[1] / warm[1] - 1:+.1%})")
        bad += [name] * bool((end[1:] > 1.02 * warm[1:]).any())
    left = shared() - before
    print(f"left over: {sorted(left) or 'no files'}")
    if out:
        draw(found, out)
    if bad or left:
        sys.exit(f"grew: {bad}, left: {left}")


if __name__ == "__main__":
    typer.run(main)
