"""Sources and shards: what goes in comes out, what cannot be read is named and left out."""

import getpass
import io
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image
from streaming import StreamingDataset

from nanollava import data
from nanollava.data import make_loader, prepare_source, shard_folder, split_images
from nanollava.recipe import Recipe, Stage
from nanollava.sequence import Writer
from nanollava.sources import Source, function_of, images_of, import_file, records

OWN = Path(__file__).parents[1] / "recipes" / "nano" / "own_source.py"


def png(W=20, H=10, color=(9, 8, 7)):
    Image.new("RGB", (W, H), color).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


# ---- doors


def test_the_documented_own_source_works(tmp_path):
    """recipes/nano/own_source.py: ten lines, and it is a whole source."""
    found = list(records(Source(f"{OWN}:squares", samples=7), seed=1))
    assert len(found) == 7 and len({r["id"] for r in found}) == 7
    for record in found:
        pixel = np.asarray(Image.open(io.BytesIO(record["image"])))[5, 5]
        named = Image.new("RGB", (1, 1), record["conversations"][1]["value"]).getpixel((0, 0))
        assert tuple(pixel) == named, "the answer is true"
    recipe = Recipe(data=str(tmp_path), sources={"own": Source(f"{OWN}:squares", samples=7)})
    folder = prepare_source(recipe, "own")
    assert len(StreamingDataset(local=str(folder), batch_size=1)) == 7
    assert not (folder / "bad.json").exists()


def test_a_function_gets_split_count_and_seed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def make(**keys):\n    yield {'id': str(keys), 'conversations': []}\n")
    (record,) = records(Source(f"{file}:make", "val", 3), seed=5)
    assert record["id"] == str({"split": "val", "count": 3, "seed": 5})
    file = tmp_path / "nameless.py"
    file.write_text("def nameless(**keys):\n    yield {}\n    yield {'id': 'b'}\n    yield {}\n")
    assert [r["id"] for r in records(Source(f"{file}:nameless"), 0)] == ["0", "b", "2"]


def test_doors_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="has no function 'circles'; it has .*squares"):
        function_of(f"{OWN}:circles")
    with pytest.raises(FileNotFoundError, match=r"begin local paths with \./"):
        list(records(Source("nowhere.py:f"), 0))
    for path in ("squares", "csv:a.csv", "own_source.py"):
        with pytest.raises(ValueError, match="write FILE.py:function or one of json:FILE"):
            list(records(Source(path), 0))


def test_a_file_imports_its_neighbours_and_can_be_mended(tmp_path):
    import sys

    (tmp_path / "neighbour_of_mine.py").write_text("COLOR = 'teal'")
    file = tmp_path / "mended.py"
    file.write_text("1 / 0")
    before = list(sys.path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            import_file(str(file))
    assert sys.path == before
    file.write_text("import neighbour_of_mine\ndef f():\n    return neighbour_of_mine.COLOR\n")
    assert function_of(f"{file}:f")() == "teal"
    assert sys.path == before and import_file(str(file)) is import_file(str(file))
    other = tmp_path / "sub" / "mended.py"
    other.parent.mkdir()
    other.write_text("def f():\n    return 'other'\n")
    assert function_of(f"{other}:f")() == "other", "two files of one name are two modules"


def test_samples_is_a_limit(tmp_path):
    file = tmp_path / "endless.py"
    file.write_text(
        "def f(split, count, seed):\n    for i in range(4):\n"
        "        yield {'conversations': [], 'id': i}\n    assert not count, 'read too far'\n"
    )
    assert [r["id"] for r in records(Source(f"{file}:f", samples=3), 0)] == [0, 1, 2]
    assert len(list(records(Source(f"{file}:f"), 0))) == 4, "0 is all there are"
    assert len(list(records(Source(f"{file}:f", samples=4), 0))) == 4


def test_prompt_goes_to_bare_images_only(tmp_path):
    values = ["<image>", " <image>\n", "<image>\nwhat?", "hello", "<image><image>"]
    rows = [{"conversations": talk(v, "<image>")} for v in values]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = list(records(Source(f"json:{tmp_path}/a.json", prompt="Read it."), 0))
    asked = [r["conversations"][0]["value"] for r in found]
    assert asked == ["<image>\nRead it."] * 2 + values[2:]
    plain = records(Source(f"json:{tmp_path}/a.json"), 0)
    assert [r["conversations"][0]["value"] for r in plain] == values


def test_json_is_llavas_format(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    rows = [
        {"id": 7, "image": "images/a.png", "conversations": talk("<image>", "a"),
         "data_source": "pages"},
        {"image": ["images/a.png", "images/a.png"], "conversations": talk("<image><image>", "b")},
        {"id": "c", "conversations": talk("text", "c")},
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = list(records(Source(f"json:{tmp_path}/a.json"), 0))
    assert [r["id"] for r in found] == ["7", "1", "c"]
    assert [images_of(r) for r in found] == [[png()], [png()] * 2, []], "bytes as they were"
    assert [r["conversations"] for r in found] == [r["conversations"] for r in rows]
    assert [r["source"] for r in found] == ["pages", "", ""]


def test_images_of_any_shape():
    assert images_of({"image": b"x"}) == [b"x"]
    assert images_of({"image": [b"x", b"y"]}) == images_of({"image": (b"x", b"y")}) == [b"x", b"y"]
    assert images_of({"image": None}) == images_of({"image": []}) == images_of({}) == []


# ---- shards


@pytest.fixture
def mixed(tmp_path):
    """A json source of good and bad records, and its recipe."""
    good, wide = png(), png(300, 40, (1, 200, 3))
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "wide.png").write_bytes(wide)
    (tmp_path / "cut.png").write_bytes(good[:50])
    two = talk("<image> or <image>", "1", "sure?", "2")
    rows = [
        {"id": "one", "image": "good.png", "conversations": talk("<image>", "a frame")},
        {"id": "cut", "image": "cut.png", "conversations": talk("<image>", "a")},
        {"id": "gone", "image": "gone.png", "conversations": talk("<image>", "a")},
        {"id": "two", "image": ["wide.png", "good.png"], "conversations": two},
        {"id": "empty", "conversations": []},
        {"id": "none"},
        {"id": "count", "image": "good.png", "conversations": talk("no image", "a")},
        {"id": "text", "conversations": talk("Ünïcode?", "yes")},
        {"id": "odd", "conversations": ["hello"]},
        {"id": "blank", "conversations": [{"from": "human", "value": None}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = Source(f"json:{tmp_path}/a.json", prompt="Read it.")
    recipe = Recipe(data=str(tmp_path / "shards"), sources={"mix": source}, workers=0)
    return recipe, good, wide


def test_shards_give_back_what_went_in(mixed, capsys):
    """Text-only, one image, two images: the same bytes, the same words; the bad ones named."""
    recipe, good, wide = mixed
    folder = prepare_source(recipe, "mix")
    rows = {r["id"]: r for r in StreamingDataset(local=str(folder), batch_size=1)}
    assert set(rows) == {"one", "two", "text"}
    images = {k: split_images(r["image"], r["sizes"]) for k, r in rows.items()}
    assert images == {"one": [good], "two": [wide, good], "text": []}
    assert rows["one"]["conversations"] == talk("<image>\nRead it.", "a frame")
    assert rows["text"]["conversations"] == talk("Ünïcode?", "yes")
    assert {r["source"] for r in rows.values()} == {"mix"}
    bad = json.loads((folder / "bad.json").read_text())
    assert [line.split(":")[0] for line in bad] == [
        "cut", "gone", "empty", "none", "count", "odd", "blank"
    ]  # fmt: skip
    assert "unreadable image" in bad[0] and "gone.png" in bad[1]
    assert "0 <image> in the conversation for 1 images" in bad[4]
    assert "mix: 7 records left out, first: cut: unreadable image" in capsys.readouterr().out


def test_prepared_once_and_a_torn_run_starts_again(mixed):
    recipe = mixed[0]
    folder = shard_folder(recipe, "mix")
    part = folder.with_suffix(".part")
    part.mkdir(parents=True)
    (part / "shard.00000.mds").write_bytes(b"torn")
    assert prepare_source(recipe, "mix") == folder and not part.exists()
    stamp = (folder / "index.json").stat().st_mtime_ns
    assert prepare_source(recipe, "mix") == folder
    assert (folder / "index.json").stat().st_mtime_ns == stamp


def test_a_changed_source_gets_new_shards(tmp_path):
    file = tmp_path / "mine.py"
    text = "def f(split, count, seed):\n    yield {'id': 'A', 'conversations': []}\n"
    file.write_text(text)
    source = Source(f"{file}:f", samples=2)
    recipe = Recipe(data=str(tmp_path), sources={"a": source})
    first = shard_folder(recipe, "a")
    assert shard_folder(recipe, "a") == first and first.parent == tmp_path
    others = [
        shard_folder(replace(recipe, seed=1), "a"),
        *(shard_folder(replace(recipe, sources={"a": replace(source, **change)}), "a")
          for change in ({"samples": 3}, {"split": "val"}, {"prompt": "x"}))
    ]  # fmt: skip
    file.write_text(text.replace("A", "B"))
    assert len({first, shard_folder(recipe, "a"), *others}) == 6
    file.write_text(text)
    assert shard_folder(recipe, "a") == first


def test_documents_come_out_of_the_loader(mixed, tokenizer):
    """Shards -> documents, every sample as often as the stage says, images in their order."""
    recipe, *_ = mixed
    prepare_source(recipe, "mix")
    stage = Stage(sources={"mix": 2}, batch_size=3)
    writer = Writer(tokenizer, recipe.visual, 48, 6, "qwen_1_5")
    batches = list(make_loader(recipe, stage, writer, 1))
    documents = {d.name: d for batch in batches for d in batch}
    assert Counter(d.name for b in batches for d in b) == {"one": 2, "two": 2, "text": 2}
    assert [len(b) for b in batches] == [3, 3]
    assert documents["one"].views.shape[0] == documents["one"].layouts[0].views > 1
    assert documents["two"].views[:, :, 20, 20].tolist() == [[1, 200, 3], [9, 8, 7]]
    assert [p.size for p in documents["two"].layouts] == [(300, 40), (20, 10)]
    assert not documents["text"].layouts and documents["text"].source == "mix"
    with pytest.raises(ValueError, match="batch_size 3 does not divide among 2 processes"):
        make_loader(recipe, stage, writer, 2)


def test_runs_take_turns_to_name_their_shared_memory(mixed, tokenizer, monkeypatch):
    """Streaming takes the next free name: two runs that look at once would take the same."""
    other = FileLock(Path(tempfile.gettempdir(), f"nanollava-{getpass.getuser()}.lock"))

    class Busy(data.Documents):
        def __init__(self, *args, **keys):
            with pytest.raises(Timeout):
                other.acquire(timeout=0.01)
            super().__init__(*args, **keys)

    monkeypatch.setattr(data, "Documents", Busy)
    recipe, *_ = mixed
    prepare_source(recipe, "mix")
    writer = Writer(tokenizer, recipe.visual, 48, 6, "qwen_1_5")
    make_loader(recipe, Stage(sources={"mix": 1}, batch_size=3), writer, 1)
    with other.acquire(timeout=1):  # free again
        pass
