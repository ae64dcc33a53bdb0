"""Run folders and checkpoints: what is kept, what is refused, what is never deleted."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanollava.runs import add_losses, check_run, keep_losses, open_run, read_losses
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


@pytest.mark.parametrize(
    ("step", "stop", "due"),
    [(2, False, True), (3, False, False), (3, True, True), (4, True, False)],
)
def test_checkpoints_every_interval_and_before_stopping_but_not_at_the_end(step, stop, due):
    """A checkpoint of the last step could not be resumed: nothing would be left to do."""
    report = Report(None, "stage1", 2)
    report.stop = stop
    state = SimpleNamespace(timestamp=SimpleNamespace(batch=step))
    state.max_duration = SimpleNamespace(value=4)
    assert report.due(state, None) is due
