"""Run folders and checkpoints: what is kept, what is refused, what is never deleted."""

import json
import os
import re
import shutil
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from composer import Time

from nanollava.extras.losses import JUMP_WINDOW, expected_losses, find_jump, write_reference
from nanollava.runs import (
    add_losses,
    check_run,
    open_run,
    read_losses,
    rewind_losses,
    weights_only,
)
from nanollava.train import Logging, Stopping


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    return replace(tiny_recipe, run=str(tmp_path / "run"))


def with_seed(recipe, seed, **changes):
    return replace(recipe, seed=seed, **changes)


def test_a_run_that_never_began_does_not_lock_its_folder(recipe, tmp_path):
    open_run(recipe, 1)
    check_run(with_seed(recipe, 5))
    rewind_losses(tmp_path / "run", "stage1", 0)
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        check_run(with_seed(recipe, 5))
    check_run(with_seed(recipe, 5, fresh=True))


def test_fresh_deletes_runs_and_nothing_else(recipe, tmp_path):
    open_run(recipe, 1)
    (tmp_path / "run" / "model.safetensors").touch()
    open_run(with_seed(recipe, 5, fresh=True), 1)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "fresh: false" in (tmp_path / "run" / "recipe.yaml").read_text()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="refusing to delete .*precious: it is not a run folder"):
        open_run(with_seed(recipe, 0, fresh=True, run=str(precious)), 1)
    assert (precious / "thesis.txt").read_text() == "years"


def test_every_start_is_noted_and_git_is_not_needed(recipe, tmp_path, monkeypatch):
    open_run(recipe, 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    open_run(recipe, 2)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [s["processes"] for s in starts] == [1, 2] and starts[1]["commit"] == ""


def test_losses_after_the_checkpoint_are_forgotten(tmp_path):
    rewind_losses(tmp_path, "stage1", 0)
    for stage in "ab":
        for step in (1, 2, 3):
            add_losses(tmp_path, stage, step, [("all", 1.0, 9)], 1e-3, 0.1)
    rewind_losses(tmp_path, "b", 2)
    kept = [(r["stage"], int(r["step"])) for r in read_losses(tmp_path)]
    assert kept == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]


def state_after(step: int, **sums: tuple[float, int]) -> SimpleNamespace:
    """Composer's state after a step with {source: (sum of losses, tokens)}."""
    model = SimpleNamespace(sources=[*sums], table=torch.tensor([*sums.values()]).double())
    return SimpleNamespace(
        model=model,
        batch=[SimpleNamespace(name=name, note="") for name in ("left", "right")],
        timestamp=SimpleNamespace(batch=Time(step, "ba"), token=Time(80 * step, "tok")),
        max_duration=Time(99, "ba"),
        schedulers=[SimpleNamespace(get_last_lr=lambda: [1e-3, 1e-4])],
    )


def test_the_band_lies_around_the_means_of_ten_steps(tmp_path):
    for run, losses in (("a", [2.0] * 10 + [1.0]), ("b", [3.0] * 10 + [4.0])):
        (tmp_path / run).mkdir()
        rewind_losses(tmp_path / run, "stage1", 0)
        for step, loss in enumerate(losses, 1):
            rows = [("short", loss, 9), ("all", loss, 9)]
            add_losses(tmp_path / run, "stage1", step, rows, 1e-3, 0.1)
    write_reference([tmp_path / "a", tmp_path / "b"], out := tmp_path / "reference.csv")
    expected = expected_losses(str(out), "stage1", 11)
    assert expected[1] == " (expected 1.90-3.15)"  # 2 - 5%, 3 + 5%
    assert expected[11] == " (expected 1.80-3.26)"  # means 1.9 and 3.1
    assert list(expected) == list(range(1, 12))  # the reference ends at step 11
    assert expected_losses(str(out), "stage2", 11) == expected_losses("", "stage1", 11) == {}
    assert expected_losses(str(out), "stage1", 12) == {}  # another schedule has other losses


def test_a_step_is_logged(tmp_path):
    """losses.csv has each source and all of them; the bar has the mean loss of ten steps."""
    log = Logging(tmp_path, "stage1", {11: " (expected 1.80-3.26)"})
    log.fit_start(state_after(0, pages=(0, 0)), None)
    for step in range(1, 12):
        log.batch_end(state_after(step, pages=(step * 6.0, 3), films=(0, 0), talks=(2.0, 1)), None)
    log.close(None, None)
    rows = [tuple(row.values())[:-1] for row in read_losses(tmp_path)]
    assert rows[:3] == [
        ("stage1", "1", "pages", "2.000000", "3", "0.001"),
        ("stage1", "1", "talks", "2.000000", "1", "0.001"),
        ("stage1", "1", "all", "2.000000", "4", "0.001"),
    ]
    assert rows[-1] == ("stage1", "11", "all", "17.000000", "4", "0.001")
    assert log.bar.n == 11  # steps 2 to 11 have the losses 3.5, 5.0 ... 17.0
    assert log.bar.postfix.startswith("loss 10.250 (expected 1.80-3.26), ")
    assert re.fullmatch(r".*, [\d,]+ tokens/s", log.bar.postfix)


def test_a_missing_reference_is_told_before_anything_is_made(recipe):
    with pytest.raises(FileNotFoundError, match="reference: nowhere.csv is not a file"):
        check_run(replace(recipe, reference="nowhere.csv"))


@pytest.mark.parametrize(
    ("step", "stop", "due"),
    [(2, False, True), (3, False, False), (3, True, True), (4, True, False)],
)
def test_checkpoints_every_interval_and_before_stopping_but_not_at_the_end(step, stop, due):
    """A checkpoint of the last step could not be resumed: nothing would be left to do."""
    stopping = Stopping(2)
    stopping.stop = stop
    state = SimpleNamespace(timestamp=SimpleNamespace(batch=Time(step, "ba")))
    state.max_duration = Time(4, "ba")
    assert stopping.due(state, None) is due


def warnings(losses: list[float]) -> list[str]:
    """The warnings of a run with these losses."""
    recent, found = deque(maxlen=JUMP_WINDOW), []
    for loss in losses:
        found.append(find_jump(loss, recent))
        recent.append(loss)
    return found


def test_a_loss_that_jumps_is_told():
    calm = [1.0, 1.2, 0.8, 1.1, 0.9] * 4
    found = warnings([9.0, *calm, 3.0, 1.3])
    assert not any(found[:21]), "too few before, or all alike"
    assert found[21:] == ["the loss jumps to 3 from 1 +- 0.14", ""]
    assert find_jump(float("nan"), []) == "the loss is nan"
    found = warnings([*[1.0] * 25, 1.1, 1.5])
    assert not any(found[:26]), "many deviations, no jump"
    assert found[26]


def test_a_jump_is_told_with_its_sources_and_samples(tmp_path):
    log = Logging(tmp_path, "stage1", {})
    log.fit_start(state_after(0, pages=(0, 0)), None)
    for step, loss in enumerate([1.0, 1.2, 0.8, 1.1, 0.9] * 4, 1):
        log.batch_end(state_after(step, pages=(33 * loss, 33)), None)
    log.batch_end(state_after(21, pages=(25.0, 25), films=(74.0, 8), none=(0, 0)), None)
    told = "step 21: the loss jumps to 3 from 1 +- 0.14 (pages 1, films 9.25); samples left, right"
    assert (tmp_path / "notes.txt").read_text() == f"stage1: {told}\n"
    for sums in ((float("nan"), 1), (0, 0)):  # not a number, or no supervised token at all
        with pytest.raises(ValueError, match="stage1 step 22: the loss is nan .*left, right. Fix"):
            log.batch_end(state_after(22, pages=sums), None)
    log.close(None, None)


@pytest.mark.parametrize("torn", ["stage2", "stage2,", "stage2,1", "stage2,11,all,0.5,7,1e-3"])
def test_half_a_line_of_losses_is_left_out(tmp_path, torn):
    rewind_losses(tmp_path, "stage2", 0)
    add_losses(tmp_path, "stage2", 1, [("all", 0.5, 7)], 1e-3, 0.1)
    whole = read_losses(tmp_path)
    with (tmp_path / "losses.csv").open("a") as file:
        file.write(torn)
    assert len(whole) == 1 and read_losses(tmp_path) == whole


@pytest.mark.parametrize("own", [None, "1"])
def test_reading_weights_only_ends_with_the_checkpoint(tmp_path, monkeypatch, own):
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(key, raising=False)
    if own:
        monkeypatch.setenv(key, own)
    with weights_only(tmp_path):
        assert os.environ[key] == "1"
    assert os.environ.get(key) == own
