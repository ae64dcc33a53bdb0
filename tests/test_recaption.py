"""Re-captioning: every image once, whatever happens; only captions worth training on."""

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, command

import nanollava
from nanollava.evaluate import Answer
from nanollava.extras import recaption
from nanollava.generate import Assistant
from nanollava.recipe import Source
from nanollava.sources import images_of, import_file, records

WORLD = f"{ROOT}/recipes/nano/world.py"


@pytest.fixture(scope="module")
def nano():
    return nanollava.load(ROOT / "demo/nano")


@pytest.fixture
def run(monkeypatch, nano):
    """The command in this process, in chunks of four."""
    monkeypatch.setattr(recaption, "CHUNK", 4)
    monkeypatch.setattr(recaption, "load", lambda model: nano)

    def command_(out: Path, source=f"{WORLD}:short_captions", rank=(0, 1), **keys):
        for name, value in zip(("RANK", "WORLD_SIZE"), rank):
            monkeypatch.setenv(name, str(value))
        keys = {"samples": 10, "max_new_tokens": 96, "seed": 0} | keys
        keys = {"prompt": "Describe the image."} | keys
        recaption.recaption(source, ROOT / "demo/nano", out, **keys)
        return out

    return command_


def read(out: Path) -> list[dict]:
    return list(records(Source(f"parquet:{out}/*.parquet"), 0))


def test_images_keep_their_bytes_and_ids_and_get_what_the_model_says(run, tmp_path, nano):
    found = read(run(tmp_path / "out"))
    raw = list(records(Source(f"{WORLD}:short_captions", samples=10), 0))
    assert [r["id"] for r in found] == [r["id"] for r in raw]
    assert [images_of(r) for r in found] == [images_of(r) for r in raw]
    assert [r["source"] for r in found] == [r["source"] for r in raw]
    for new in found[:3]:
        said = nano.chat(images_of(new)[0], "Describe the image.", max_new_tokens=96)
        assert [t["value"] for t in new["conversations"]] == ["<image>\nDescribe the image.", said]
    card = (tmp_path / "out/README.md").read_text()
    assert "- 10 captions; left out: none" in card and '"Describe the image."' in card


def test_stopped_and_on_other_processes_it_is_the_same_without_doing_it_twice(
    run, tmp_path, monkeypatch
):
    whole, asked = read(run(tmp_path / "whole")), []
    answer = Assistant.answer

    def stopping(self, documents, *more):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(documents))
        return answer(self, documents, *more)

    monkeypatch.setattr(Assistant, "answer", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    assert [f.name for f in sorted((tmp_path / "out").glob("*.parquet"))] == ["00000.parquet"]
    asked.clear()
    monkeypatch.setattr(Assistant, "answer", answer)
    written = (tmp_path / "out/00000.parquet").stat().st_mtime_ns
    run(tmp_path / "out", rank=(1, 2))  # chunk 1
    assert not (tmp_path / "out/README.md").exists(), "chunk 2 is not there"
    run(tmp_path / "out", rank=(0, 2))
    assert (tmp_path / "out/00000.parquet").stat().st_mtime_ns == written
    assert read(tmp_path / "out") == whole
    assert "10 captions" in (tmp_path / "out/README.md").read_text()


def cycle(period, words):
    return " ".join(str(i % period) for i in range(words))


@pytest.mark.parametrize(
    "answer, reason",
    [
        (Answer("a red circle", 9, False), ""),
        (Answer(" \n", 9, False), "empty"),
        (Answer("a red circle", 9, True), "cut off"),
        (Answer(), "unreadable image"),
        (Answer("a cat sits. " * 20, 9, False), "repeats itself"),
        (Answer("no no no no", 9, False), ""),  # short texts may
        (Answer(" ".join(map(str, range(60))), 9, False), ""),
        (Answer("no " * 24, 9, False), "repeats itself"),
        (Answer("no " * 23, 9, False), ""),
        (Answer(cycle(12, 27), 9, False), ""),  # 12 of 24 runs are distinct
        (Answer(cycle(11, 27), 9, False), "repeats itself"),
        (Answer("一只猫坐着，" * 8, 9, False), "repeats itself"),  # no spaces
        (Answer("一只黑猫坐在木桌上，旁边放着两本打开的旧书和一杯热茶。", 9, False), ""),
    ],
)
def test_bad_captions_have_a_reason(answer, reason):
    assert recaption.reject_reason(answer) == reason


def test_what_is_left_out_is_counted_and_named(run, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(f"""
import sys; sys.path.insert(0, {str(ROOT / "recipes/nano")!r})
import world
def mixed(split, count, seed):
    one, two, three = world.short_captions(split, 3, seed)
    yield one | {{"id": "a"}}
    yield two | {{"id": "b", "image": b"no image"}}
    yield three | {{"id": "c", "image": None}}
    yield one | {{"id": "d", "image": [one["image"], two["image"]]}}
    yield three | {{"id": "e", "image": "/not/there.png"}}
""")
    out = run(tmp_path / "out", f"{own}:mixed", samples=0)
    assert [r["id"] for r in read(out)] == ["a"]
    left = [
        pair for k in (0, 1) for pair in json.loads((out / f"0000{k}.json").read_text())["left out"]
    ]
    assert {name: why.split(":")[0] for name, why in left} == {
        "b": "unreadable image",
        "c": "no single image",
        "d": "no single image",
        "e": "no single image",
    }
    assert (
        "1 captions; left out: 3 no single image, 1 unreadable image"
        in (out / "README.md").read_text()
    )


def test_short_answers_are_cut_off(run, tmp_path):
    out = run(tmp_path / "out", max_new_tokens=2)
    assert not list(out.glob("*.parquet"))
    assert "0 captions; left out: 10 cut off" in (out / "README.md").read_text()


def test_other_settings_and_unknown_sources_are_rejected(run, tmp_path):
    run(tmp_path / "out", samples=2)
    with pytest.raises(
        ValueError, match="different settings: samples: 2 -> 3. Use the same .* another --out"
    ):
        run(tmp_path / "out", samples=3)
    with pytest.raises(ValueError, match="'blip' is not a source: write KIND:WHERE.*blip558k"):
        run(tmp_path / "other", "blip")


def test_a_mistyped_source_writes_nothing(run, tmp_path):
    for wrong in ("jsonn:./list.json", f"{tmp_path}/none.py:some", "parquet:./none/*.parquet"):
        with pytest.raises((ValueError, OSError)):
            run(tmp_path / "out", wrong)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    printed = command(
        "-m",
        "nanollava",
        "recaption",
        f"{WORLD}:short_captions",
        "--model",
        ROOT / "demo/nano",
        "--out",
        tmp_path,
        "--samples",
        3,
    )
    assert "captions and their dataset card are in" in printed and len(read(tmp_path)) == 3


def test_the_nano_worlds_images_are_described_anew():
    world, made = (import_file(f"{ROOT}/recipes/nano/{n}.py") for n in ("world", "more/recaptions"))
    raw = [*world.short_captions("train", 5, 0)]
    found = [*made.recaptions("train", 5, 0)]
    assert 3 <= len(found) <= 5 and {r["id"] for r in found} <= {r["id"] for r in raw}
    known = {r["id"]: r for r in raw}
    for record in found:
        (question, answer), before = record["conversations"], known[record["id"]]
        assert record["image"] == before["image"] and question["value"] == f"<image>\n{made.PROMPT}"
        assert len(answer["value"].split()) > len(before["conversations"][1]["value"].split())


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # a training of this process may have set it
    nanollava.load(ROOT / "demo/nano", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    nanollava.load(ROOT / "demo/nano", "cpu")
    assert taken == [3], "and without a launcher the one that was chosen"
