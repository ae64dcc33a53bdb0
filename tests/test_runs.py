"""Run folders and checkpoints: what is kept, what is refused, what is never deleted."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanollava.extras.reference import write_reference
from nanollava.runs import (
    LossBand,
    add_losses,
    check_run,
    keep_losses,
    open_run,
    read_losses,
    weights_only,
)
from nanollava.train import Report


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    return replace(tiny_recipe, run=str(tmp_path / "run"))


def with_seed(recipe, seed, **changes):
    return replace(recipe, seed=seed, **changes)


def test_a_run_that_never_began_does_not_lock_its_folder(recipe, tmp_path):
    open_run(recipe, 1)
    check_run(with_seed(recipe, 5))
    keep_losses(recipe.run, "stage1", 0)
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
    with pytest.raises(ValueError, match="no run folder"):
        open_run(with_seed(recipe, 0, fresh=True, run=str(precious)), 1)
    assert (precious / "thesis.txt").read_text() == "years"


def test_every_start_is_noted_and_git_is_not_needed(recipe, tmp_path, monkeypatch):
    open_run(recipe, 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    open_run(recipe, 2)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [s["processes"] for s in starts] == [1, 2] and starts[1]["commit"] == ""


def test_losses_after_the_checkpoint_are_forgotten(tmp_path):
    keep_losses(tmp_path, "stage1", 0)
    rows = [(stage, step, "all", 1.0, 9, 1e-3, 0.1) for stage in "ab" for step in (1, 2, 3)]
    add_losses(tmp_path, rows)
    keep_losses(tmp_path, "b", 2)
    kept = [(r["stage"], int(r["step"])) for r in read_losses(tmp_path)]
    assert kept == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]


def test_the_band_lies_around_the_means_of_ten_steps(tmp_path):
    for run, losses in (("a", [2.0] * 10 + [1.0]), ("b", [3.0] * 10 + [4.0])):
        (tmp_path / run).mkdir()
        keep_losses(tmp_path / run, "stage1", 0)
        add_losses(
            tmp_path / run,
            [
                ("stage1", step, source, loss, 9, 1e-3, 0.1)
                for step, loss in enumerate(losses, 1)
                for source in ("short", "all")
            ],
        )
    write_reference([tmp_path / "a", tmp_path / "b"], out := tmp_path / "reference.csv")
    expected = LossBand(str(out), "stage1", 11)
    told = [expected.tell(step, 2.5) for step in range(1, 13)]
    assert told[0] == "loss 2.500 (expected 1.90-3.15)"  # 2 - 5%, 3 + 5%
    assert told[10] == "loss 2.500 (expected 1.80-3.26)"  # means 1.9 and 3.1
    assert told[11] == "loss 2.500"  # the reference ends at step 11
    for none in (
        LossBand(str(out), "stage2", 11),
        LossBand("", "stage1", 11),
        LossBand(str(out), "stage1", 12),
    ):
        assert none.tell(1, 1) == "loss 1.000"  # another schedule has other losses


def test_a_missing_reference_is_told_before_anything_is_made(recipe):
    with pytest.raises(FileNotFoundError, match="reference: nowhere.csv is not a file"):
        check_run(replace(recipe, reference="nowhere.csv"))


@pytest.mark.parametrize(
    ("step", "stop", "due"),
    [(2, False, True), (3, False, False), (3, True, True), (4, True, False)],
)
def test_checkpoints_every_interval_and_before_stopping_but_not_at_the_end(step, stop, due):
    """A checkpoint of the last step could not be resumed: nothing would be left to do."""
    report = Report(None, "stage1", 2, None)
    report.stop = stop
    state = SimpleNamespace(timestamp=SimpleNamespace(batch=step))
    state.max_duration = SimpleNamespace(value=4)
    assert report.due(state, None) is due


def test_a_loss_that_jumps_is_told_with_its_sources():
    watch = LossBand("", "stage1", 99)
    calm = [1.0, 1.2, 0.8, 1.1, 0.9] * 4
    assert not any(watch.odd(loss, {}) for loss in [9.0, *calm]), "too few before, or all alike"
    told = watch.odd(3.0, {"pages": 1.0, "films": 9.25})
    assert told == "the loss jumps to 3 from 1 +- 0.14 (pages 1, films 9.25)"
    assert not watch.odd(1.3, {}) and "nan" in watch.odd(float("nan"), {})
    flat = LossBand("", "stage1", 99)
    assert not any(flat.odd(loss, {}) for loss in [*[1.0] * 25, 1.1]), "many deviations, no jump"
    assert flat.odd(1.5, {})


@pytest.mark.parametrize("torn", ["stage2", "stage2,", "stage2,1", "stage2,11,all,0.5,7,1e-3"])
def test_half_a_line_of_losses_is_left_out(tmp_path, torn):
    keep_losses(tmp_path, "stage2", 0)
    add_losses(tmp_path, [("stage2", 1, "all", "0.5", 7, "0.001", "0.10")])
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
