"""Training as a user launches it: processes, nodes, kills, reruns, wrong folders."""

import gc
import json
import os
import signal
import socket
import weakref

import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.utils import reproducibility
from launching import check_equal_runs, command, finish, losses, start, stop_at, write_recipe
from PIL import Image
from safetensors.torch import load_file
from streaming.base.constant import BARRIER_FILELOCK
from torch.utils.data import DataLoader

from nanollava import train as training
from nanollava.__main__ import run as commands
from nanollava.model import VLM
from nanollava.prompts import Turn
from nanollava.recipe import read_recipe
from nanollava.sequence import pack
from nanollava.train import Stopping, make_trainer, train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(recipe file, run folder of an undisturbed run with one process)."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = write_recipe(folder)
    finish(start(recipe, f"run={folder}/one"))
    return recipe, folder / "one"


def scores(run) -> list[tuple]:
    rows = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    return [(r["task"], r["setting"], r["score"], r["n"]) for r in rows]


def largest_difference(a, b) -> float:
    one, two = (load_file(run / "model.safetensors") for run in (a, b))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def check_same_course(a, b) -> None:
    """Equal losses at every step, to float32's last digits."""
    one, two = losses(a), losses(b)
    assert one.keys() == two.keys() and len(one) == 28
    assert max(abs(one[k] - two[k]) for k in one) < 1e-5
    assert largest_difference(a, b) < 1e-5


def test_loss_falls_and_run_folder_is_whole(tiny):
    _, run = tiny
    course = losses(run)
    assert course["stage2", 20] < course["stage2", 1]
    names = {"recipe.yaml", "environment.json", "losses.csv", "model.safetensors", "config.json"}
    assert names <= {p.name for p in run.iterdir()}
    assert {"stage1", "stage1_5", "stage2"} <= {p.name for p in run.iterdir() if p.is_dir()}


def test_stage1_moves_the_projector_alone_and_stage1_5_everything(tiny):
    recipe, run = tiny
    reproducibility.seed_all(0)
    start = VLM(read_recipe(recipe)).state_dict()
    one, two = (load_file(run / s / "model.safetensors") for s in ("stage1", "stage1_5"))
    moved = {name.split(".")[0] for name in one if not one[name].equal(start[name])}
    assert moved == {"projector"}, "no tile in stage 1, so the newline stays where it was, too"
    moved = {name for name in one if not one[name].equal(two[name])}
    assert moved == set(one), "stage 1.5 trains everything"


def test_two_processes_equal_one(tiny):
    """Same global batch, uneven packs, ranks that hold only text."""
    recipe, run = tiny
    finish(start(recipe, f"run={run.parent}/two", flags=("-n", "2")))
    check_same_course(run, run.parent / "two")
    assert scores(run) == scores(run.parent / "two") and len(scores(run)) == 2


def test_two_processes_score_what_one_does(tiny):
    """`composer -n 2 -m nanollava evaluate`: each answers its share, one row for a setting."""
    _, run = tiny
    rows = (run / "results.jsonl").read_text()
    (run / "results.jsonl").unlink()
    told = finish(start(run, flags=("-n", "2", "-m", "nanollava", "evaluate")))
    again = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    assert [{**r, "seconds": 0, "cpu_seconds": 0} for r in again] == [
        {**json.loads(r), "seconds": 0, "cpu_seconds": 0} for r in rows.splitlines()
    ]
    assert told.count("nano-mixed ") == 1, told  # one table


def own_temporary_folder(folder, rank: int) -> str:
    """A TMPDIR in which every second name of streaming's shared memory counts as taken.

    Two nodes on one machine would otherwise reach for the same memory at the same moment.
    """
    folder.mkdir()
    for prefix in range(1 - rank, 100, 2):
        (folder / f"{prefix:06}_{BARRIER_FILELOCK}").touch()
    return str(folder)


def test_two_nodes_equal_one(tiny, tmp_path):
    recipe, run = tiny
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        start(
            recipe,
            f"run={run.parent}/nodes",
            flags=(
                "-n",
                "1",
                "--world_size",
                "2",
                "--node_rank",
                str(rank),
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                port,
            ),
            TMPDIR=own_temporary_folder(tmp_path / str(rank), rank),
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        finish(node)
    check_same_course(run, run.parent / "nodes")


def test_packs_do_not_matter(tiny):
    """All documents in one pack, or several packs: the same weights."""
    recipe, run = tiny
    budgets = [f"stages.{s}.microbatch_tokens=100000" for s in ("stage1", "stage1_5", "stage2")]
    train(read_recipe(recipe, [f"run={run.parent}/packed", *budgets]))
    check_same_course(run, run.parent / "packed")


def test_stopped_and_rerun_equals_never_stopped(tiny):
    """Once in each stage, by SIGKILL or SIGTERM: bit for bit the same weights and losses."""
    recipe, run = tiny
    again = run.parent / "again"
    moments = {
        ("stage1", 3): signal.SIGKILL,
        ("stage1_5", 2): signal.SIGTERM,
        ("stage2", 8): signal.SIGKILL,
    }
    for moment, number in moments.items():
        stop_at(start(recipe, f"run={again}"), again, moment, number)
        assert not (again / "model.safetensors").exists()
    finish(start(recipe, f"run={again}"))
    check_equal_runs(run, again)


def test_shards_equal_whole_copies_also_after_a_kill(tiny):
    """FSDP over two processes, killed in stage 2, against one process without it."""
    recipe, run = tiny
    shards, flags = run.parent / "shards", ("-n", "2")
    keys = ("shard=true", "stages.stage2.checkpoint_activations=true")
    stop_at(
        start(recipe, f"run={shards}", *keys, flags=flags), shards, ("stage2", 8), signal.SIGKILL
    )
    finish(start(recipe, f"run={shards}", *keys, flags=flags))
    check_same_course(run, shards)


def test_what_is_too_long_is_named_and_does_not_stop_a_run(tiny):
    """Of pages of 192 x 192 pixels not even the question fits; long words are cut."""
    recipe, run = tiny
    short, keys = run.parent / "short", ("max_length=180", "stages.stage1=null")
    told = finish(start(recipe, f"run={short}", *keys, "tasks.nano-mixed=null"))
    notes = (short / "notes.txt").read_text().splitlines()
    assert any(x.endswith("left out") for x in notes) and notes[0] in told
    assert all("max_length is 180" in x for x in notes)
    assert max(step for stage, step in losses(short) if stage == "stage2") == 20


def test_a_stage_that_is_over_leaves_nothing_behind(tiny, monkeypatch):
    """Composer registers an exit handler that would hold the model and Adam's moments."""
    recipe, run = tiny
    held = []
    real = training.begin
    monkeypatch.setattr(training, "begin", lambda *a: held.append(weakref.ref(m := real(*a))) or m)
    train(read_recipe(recipe, [f"run={run.parent}/held"]))
    gc.collect()
    assert len(held) == 3 and not any(ref() for ref in held[:2])


def test_recomputed_activations_change_nothing(tiny):
    recipe, run = tiny
    keys = [f"stages.{s}.checkpoint_activations=true" for s in ("stage1", "stage1_5", "stage2")]
    train(read_recipe(recipe, [f"run={run.parent}/recomputed", *keys]))
    check_same_course(run, run.parent / "recomputed")


def test_again_from_another_folder(tiny, tmp_path, monkeypatch):
    """A finished run is left as it is, wherever the same command is typed."""
    recipe, run = tiny
    before = (run / "model.safetensors").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    train(read_recipe(recipe, [f"run={run}"]))
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_folder_is_refused(tiny):
    recipe, run = tiny
    with pytest.raises(ValueError, match=r"stages.stage2.lr: 0.001 -> 0.0005\n.*fresh=true"):
        train(read_recipe(recipe, [f"run={run}", "stages.stage2.lr=5e-4"]))
    assert (run / "model.safetensors").exists()


def test_plain_commands(tiny, tmp_path):
    """python -m nanollava train, evaluate and chat; evaluation is not done twice."""
    recipe, run = tiny
    told = command("-m", "nanollava", "train", recipe, f"run={run}")
    near = os.path.relpath(run)  # as short as a command can be
    assert "already trained" in told
    assert f'chat {near} {near}/sample.png "what is the value?"' in told
    before = (run / "results.jsonl").read_text()
    assert "nano-mixed" in command("-m", "nanollava", "evaluate", run)
    assert (run / "results.jsonl").read_text() == before
    Image.new("RGB", (150, 60), (200, 30, 30)).save(tmp_path / "red.png")
    told = command("-m", "nanollava", "chat", run, tmp_path / "red.png", "what is it?", "--why")
    assert Image.open(run / "why.png").size[1] == 384
    assert "saw 150x60 pixels as grid" in told and "visual tokens" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "nowhere.yaml"), "nowhere.yaml is not a file"),
        (("chat", "{run}/checkpoints", "x.png", "what?"), "has no model.safetensors"),
        (("chat", "{run}", "{run}/recipe.yaml", "what?"), "unreadable image"),
        (("chat", "{run}", "{red}", "what?", "--max-grid", "3by3"), "'3by3' is not a grid"),
        (("evaluate", "{run}", "--tasks", "nano-mixd"), "unknown tasks ['nano-mixd']"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, capsys, words, told):
    """What was given and what to do, without a traceback."""
    _, run = tiny
    red = tmp_path / "red.png"
    Image.new("RGB", (150, 60), (200, 30, 30)).save(red)
    with pytest.raises(SystemExit) as stopped:
        commands([word.format(run=run, red=red) for word in words])
    assert told in str(stopped.value)


def test_recomputed_activations_give_the_same_gradients(tiny_recipe):
    """checkpoint_activations trades time for memory and changes nothing else."""
    torch.manual_seed(0)
    model = VLM(tiny_recipe).train()
    image = Image.effect_noise((150, 100), 90).convert("RGB")
    turns = [Turn("user", "<image>\nwhat?", 1), Turn("assistant", "tax 305")]
    row = pack([model.writer()(turns, [image])] * 2, 48)
    found = []
    for switch in (
        model.llm.gradient_checkpointing_enable,
        model.llm.gradient_checkpointing_disable,
    ):
        switch()
        model.zero_grad()
        model(row).mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_speed_monitor_sees_the_useful_flops(tiny, tmp_path):
    """flops per second = flops_per_batch x batches per second, as Composer logs them."""
    recipe = read_recipe(tiny[0], [f"run={tmp_path}", "stages.stage2.duration=1ep"])
    model = VLM(recipe)
    turns = [Turn("user", "<image>\nwhat?", 1), Turn("assistant", "tax 305")]
    image = Image.new("RGB", (144, 144))
    documents = [model.writer()(turns, [image], source="mixed")] * 48
    loader = DataLoader(documents, batch_size=4, collate_fn=list)
    trainer = make_trainer(recipe, "stage2", model, loader, Stopping(1000))
    log = InMemoryLogger()
    log.init(trainer.state, trainer.logger)
    trainer.logger.destinations = (log,)
    trainer.fit()
    flops, batches = (
        log.data[f"throughput/{name}_per_sec"][-1][1] for name in ("flops", "batches")
    )
    student = trainer.state.model
    trainer.close()
    assert flops / batches == pytest.approx(student.flops_per_batch(documents[:4]), rel=1e-6)
