"""What goes wrong while a run trains: it stops with the reason, keeps what is whole, and the same
command ends bit for bit as if nothing had happened.
"""

import errno
import os
import random
import shutil
import signal
import time
from collections import namedtuple

import composer.utils.checkpoint
import psutil
import pytest
import torch
from launching import check_equal_runs, finish, losses, start, stop_at, write_recipe
from safetensors import SafetensorError

from nanollava import checkpoint as parts
from nanollava import files, runs
from nanollava.__main__ import run as run_command
from nanollava.data import shard_folder
from nanollava.recipe import read_recipe
from nanollava.train import ComposerVLM, Stopping, train


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that `start` starts: sums of other threads have other last digits."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """(recipe file, run folder) of a run that nothing happened to."""
    recipe = write_recipe(tmp_path_factory.mktemp("faults"))
    train(read_recipe(recipe, [f"run={recipe.parent}/whole"]))
    return recipe, recipe.parent / "whole"


def again(whole, run) -> None:
    """The same command: it ends as the run that nothing happened to."""
    recipe, unharmed = whole
    train(read_recipe(recipe, [f"run={run}"]))
    check_equal_runs(unharmed, run)


def stops(whole, run, error, told: str) -> None:
    """A run that stops with an error."""
    with pytest.raises(error, match=told):
        train(read_recipe(whole[0], [f"run={run}"]))
    assert not (run / "model.safetensors").exists()


def test_a_disk_that_is_full_at_a_checkpoint(whole, tmp_path, monkeypatch):
    """Half of it lies there; the one before is whole."""
    write, before = composer.utils.checkpoint._write_checkpoint_file, []

    def full(state, name):
        before.append(name)
        if "stage2-ba9" in name:
            with open(name, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, name)

    monkeypatch.setattr(composer.utils.checkpoint, "_write_checkpoint_file", full)
    told = "no space left in .*run. Free some and run it again"
    stops(whole, tmp_path / "run", OSError, told)
    assert "stage2-ba6" in before[-2]
    monkeypatch.undo()
    again(whole, tmp_path / "run")
    assert losses(tmp_path / "run").keys() == losses(whole[1]).keys()


def test_a_disk_that_is_full_when_a_stage_ends(whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(parts, "save_file", full)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(1, 1, 0))
    stops(whole, tmp_path / "run", OSError, "no space left in .*run. Free some")
    monkeypatch.undo()
    again(whole, tmp_path / "run")


def test_a_loss_that_is_no_number(whole, tmp_path, monkeypatch):
    """It names the samples and their sources, and the last checkpoint is of a step before it."""
    forward, steps = ComposerVLM.forward, [0]

    def broken(self, packed):
        steps[0] += 1
        found = forward(self, packed)
        return found * torch.nan if steps[0] == 8 else found

    monkeypatch.setattr(ComposerVLM, "forward", broken)
    told = r"stage1_5 step \d: the loss is nan \(mixed nan\); samples train-\d+, .*\. Fix these"
    stops(whole, tmp_path / "run", ValueError, told)
    assert "the loss is nan" in (tmp_path / "run/notes.txt").read_text()
    monkeypatch.undo()
    again(whole, tmp_path / "run")


def test_an_error_that_is_none_of_these_stays_what_it_is(whole, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("another reason")

    monkeypatch.setattr(ComposerVLM, "forward", broken)
    stops(whole, tmp_path / "run", RuntimeError, "another reason")


def test_shards_that_rot_name_the_sample(whole, tmp_path):
    """Of the right size, with other bytes: `prepare` cannot see it without reading all of it."""
    recipe = read_recipe(whole[0], [f"run={tmp_path}/run", f"data={tmp_path}/data"])
    runs.write_recipe(recipe, tmp_path / "own.yaml")
    train(read_recipe(tmp_path / "own.yaml", ["stages.stage1_5=null", "stages.stage2=null"]))
    (shard,) = shard_folder(recipe, "mixed").glob("*.mds")
    data = bytearray(shard.read_bytes())
    place = data.find(b"PNG", len(data) // 2)
    data[place : place + 3] = b"???"
    shard.write_bytes(data)
    told = r"source mixed has damaged shards at sample train-\d+: unreadable image"
    with pytest.raises(ValueError, match=told):
        train(read_recipe(tmp_path / "own.yaml", [f"run={tmp_path}/other"]))


def test_half_a_line_of_losses(whole, tmp_path):
    """As a full disk leaves it."""
    run = tmp_path / "run"
    stop_at(start(whole[0], f"run={run}"), run, ("stage2", 8), signal.SIGTERM)
    with (run / "losses.csv").open("a") as file:
        file.write("stage2,1")
    again(whole, run)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_is_code_runs_nothing(whole, tmp_path):
    run, trap = tmp_path / "run", tmp_path / "trap"
    stop_at(start(whole[0], f"run={run}"), run, ("stage2", 8), signal.SIGTERM)
    latest = run / "checkpoints/stage2-latest-rank0.pt"
    torch.save(torch.load(latest, weights_only=False) | {"more": Trap(trap)}, latest)
    stops(whole, run, ValueError, "run/checkpoints has objects no run writes. Delete it")
    assert not trap.exists()
    torch.load(latest, weights_only=False)
    assert trap.exists()  # Composer would have
    shutil.rmtree(run / "checkpoints")
    again(whole, run)


def test_a_clock_that_jumps(whole, tmp_path, monkeypatch):
    real, draw = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + draw.choice((-86400, 0, 86400)))
    again(whole, tmp_path / "run")


def test_a_worker_that_is_killed(whole, tmp_path):
    """The run ends with the reason instead of waiting."""
    run = tmp_path / "run"
    process, killed = start(whole[0], f"run={run}"), False
    while not killed and process.poll() is None:
        if (run / "losses.csv").exists() and ("stage2", 2) in losses(run):
            trainer = psutil.Process(process.pid)
            for worker in (p for p in trainer.children() if p.cmdline() == trainer.cmdline()):
                worker.send_signal(signal.SIGKILL)
                killed = True
        time.sleep(0.02)
    told = finish(process, code=1)
    assert killed and "DataLoader worker" in told, told[-3000:]
    again(whole, run)


def test_other_processes_go_on_in_the_same_order(whole, tmp_path):
    """One process until a kill in stage 2, then two."""
    recipe, unharmed = whole
    run = tmp_path / "run"
    stop_at(start(recipe, f"run={run}"), run, ("stage2", 8), signal.SIGKILL)
    told = finish(start(recipe, f"run={run}", flags=("-n", "2")))
    assert f"{run} resumes with 2 processes, and its samples keep their order" in told
    one, two = losses(unharmed), losses(run)
    assert one.keys() == two.keys() and max(abs(one[k] - two[k]) for k in one) < 1e-5


@pytest.mark.parametrize(
    ("number", "flags"),
    [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGHUP, ()), (signal.SIGINT, ("-n", "2"))],
)
def test_a_stop_signal_to_the_whole_process_group(whole, tmp_path, number, flags):
    """As Ctrl-C, a scheduler or a closed connection sends it: the data workers hear it, too."""
    run, rare = tmp_path / "run", "stages.stage2.save_interval=1000"
    process = start(whole[0], f"run={run}", rare, flags=flags)
    told = stop_at(process, run, ("stage2", 8), number)
    assert "stopping after this step" in told, told
    if not flags:  # Composer's launcher has a code and a traceback of its own
        assert process.returncode == 128 + number
        # SIGHUP ends Python's own tracker of shared memory, which is not quiet about it.
        assert number == signal.SIGHUP or "Traceback" not in told, told
    last = max(step for stage, step in losses(run) if stage == "stage2")
    assert 8 <= last < 20 and (run / f"checkpoints/stage2-ba{last}-rank0.pt").exists()
    if not flags:  # two processes add up in another order
        again(whole, run)


def test_who_asked_not_to_be_hung_up_on_is_not(monkeypatch):
    """`nohup` leaves SIGHUP ignored: it stays so."""
    stop = Stopping(1)
    stop.handlers[signal.SIGHUP] = signal.SIG_IGN
    asked = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: asked.append(number))
    stop.fit_start(None, None)
    assert asked == [signal.SIGINT, signal.SIGTERM]


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(capfd):
    stop = Stopping(1)
    stop.receive(signal.SIGTERM, None)
    stop.receive(signal.SIGINT, None)  # the first one, after another signal
    assert stop.received == signal.SIGINT and "stopping after this step" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)


def test_a_stop_signal_after_the_last_step_of_a_stage(whole, tmp_path, monkeypatch):
    """There is no step left that would notice it, and the stage's folder is complete."""
    run, real = tmp_path / "run", Stopping.close

    def close(self, *args):
        self.receive(signal.SIGTERM, None)
        real(self, *args)

    monkeypatch.setattr(Stopping, "close", close)
    with pytest.raises(SystemExit) as stopped:
        train(read_recipe(whole[0], [f"run={run}"]))
    assert stopped.value.code == 143
    assert (run / "stage1/model.safetensors").exists() and not (run / "stage1_5").exists()
    monkeypatch.undo()
    again(whole, run)


def test_ctrl_c_is_an_exit_code(monkeypatch):
    """`composer RECIPE && next` must not go on to the next command."""

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanollava.recipe.read_recipe", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run_command(["prepare", "recipes/nano.yaml"])
    assert stopped.value.code == 130
