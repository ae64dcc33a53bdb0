"""SIGKILL at random moments, checkpoints half written among them: the rerun ends bit for bit like a
run that was never killed, its data in the same order. By hand: `python -m pytest -m slow -s`.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from launching import check_equal_runs, finish, losses, start, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def written(run: Path) -> set[tuple[str, int]]:
    """Checkpoints and half files of a run, with their sizes."""
    files = [*run.glob("*/*"), *run.glob("*")]
    names = [f for f in files if f.suffix in (".pt", ".half", ".symlink")]
    found = set()
    for file in names:
        try:
            found.add((str(file), file.lstat().st_size))
        except FileNotFoundError:  # gone meanwhile
            continue
    return found


def wait_for(process, run: Path, moment: str, after: float) -> str | None:
    """Until a number of steps was logged, or a checkpoint is being written; None: it ended."""
    before, steps, end = written(run), len(losses(run)) if (run / "losses.csv").exists() else 0, 0
    while process.poll() is None:
        if moment == "writing" and written(run) - before:
            return "while a checkpoint was written"
        if moment == "steps" and (run / "losses.csv").exists() and len(losses(run)) > steps:
            end = end or time.perf_counter() + after
            if time.perf_counter() > end:
                return f"{after:.2f} s after a start's first step"
        time.sleep(0.0005)
    return None


@pytest.mark.parametrize("processes, kills", [(1, 12), (2, 8)])
def test_killed_at_random_it_ends_bit_for_bit_like_a_run_never_killed(tmp_path, processes, kills):
    draw, flags = random.Random(processes), ("-n", str(processes)) * (processes > 1)
    recipe, told = write_recipe(tmp_path), []
    finish(start(recipe, f"run={tmp_path}/whole", flags=flags))
    run = tmp_path / "killed"
    while len(told) < kills:
        process = start(recipe, f"run={run}", flags=flags)
        moment = "writing" if len(told) % 2 else "steps"
        found = wait_for(process, run, moment, draw.uniform(0, 0.8))
        if found:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
            stages = [
                s
                for s in ("stage1", "stage1_5", "stage2")
                if (run / s / "model.safetensors").exists()
            ]
            steps = len(losses(run)) if (run / "losses.csv").exists() else 0
            told.append(f"{found}; {steps} steps, whole stages: {', '.join(stages)}")
            print(told[-1], flush=True)
            continue
        assert process.returncode == 0, process.communicate()[0][-3000:]
        check_equal_runs(tmp_path / "whole", run)
        run = tmp_path / f"killed{len(told)}"  # it has ended: kill another one
    finish(start(recipe, f"run={run}", flags=flags))
    check_equal_runs(tmp_path / "whole", run)
