"""Sources and shards: what goes in comes out, what cannot be read is named and left out."""

import errno
import getpass
import importlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import requests
from conftest import tar
from filelock import FileLock, Timeout
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from streaming import LocalDataset

from nanollava import data, files
from nanollava.data import make_loader, prepare, prepare_source, shard_folder, split_images
from nanollava.extras import readers
from nanollava.recipe import Recipe, Source, Stage, read_recipe
from nanollava.sequence import Writer
from nanollava.sources import function_of, images_of, import_file, records

ROOT = Path(__file__).parents[1]
OWN = ROOT / "recipes" / "nano" / "own_source.py"


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
    assert len(LocalDataset(local=str(folder))) == 7
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
    with pytest.raises(ValueError, match="pdf:FILE; did you mean parquet:[?]$"):
        list(records(Source("parket:./a/*.parquet"), 0))


def test_a_file_imports_its_neighbours_and_can_be_mended(tmp_path):
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


# ---- a user's own files


def write_files(folder, **texts):
    """A folder of Python files: name="source"."""
    for name, text in texts.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def call(folder, name="mine", function="f"):
    return function_of(f"{folder}/{name}.py:{function}")()


def test_two_users_files_and_neighbours_of_one_name(tmp_path):
    before = set(sys.modules)
    for name in "ab":
        pages = f"import fonts\nTEXT = '{name}' + fonts.SIZE\n"
        mine = "from pages import TEXT\ndef f():\n    import pages\n    return TEXT, pages.TEXT\n"
        write_files(tmp_path / name, mine=mine, pages=pages, fonts=f"SIZE = '{ord(name)}'\n")
    assert call(tmp_path / "a") == ("a97", "a97") and call(tmp_path / "b") == ("b98", "b98")
    assert call(tmp_path / "a") == ("a97", "a97"), "still its own"
    assert not {"pages", "fonts", "mine"} & (set(sys.modules) - before)


def test_a_link_to_a_users_file_has_the_neighbours_of_the_link(tmp_path):
    write_files(tmp_path / "real", mine="import pages\ndef f():\n    return pages.TEXT\n")
    write_files(tmp_path / "mine", pages="TEXT = 'beside the link'\n")
    (tmp_path / "mine/mine.py").symlink_to(tmp_path / "real/mine.py")
    assert call(tmp_path / "mine") == "beside the link"


NANO_AND_MINE = """
import sys
from nanollava.sources import function_of
def nano():
    records = list(function_of("{root}/recipes/nano/world.py:doc")("test", 2, 0))
    assert len(records) == 2
def mine():
    assert function_of("{folder}/mine.py:f")() == "hello"
for step in sys.argv[1:]:
    dict(nano=nano, mine=mine)[step]()
"""


@pytest.mark.parametrize("order", ["nano mine nano", "mine nano mine"])
def test_a_users_pages_and_those_of_the_nano_world(tmp_path, order):
    """In a process of its own: the order is that of the first imports."""
    mine = "import pages\ndef f():\n    return pages.HELLO\n"
    folder = write_files(tmp_path / "user", mine=mine, pages="HELLO = 'hello'\n")
    write_files(tmp_path, run=NANO_AND_MINE.format(root=ROOT, folder=folder))
    subprocess.run([sys.executable, tmp_path / "run.py", *order.split()], check=True, cwd=ROOT)


def test_a_neighbour_is_imported_when_a_function_runs(tmp_path):
    write_files(tmp_path, mine="def f():\n    from late import X\n    return X\n")
    function = function_of(f"{tmp_path}/mine.py:f")
    with pytest.raises(ModuleNotFoundError, match="late"):
        function()
    write_files(tmp_path, late="import later\nX = later.X\n", later="X = 5\n")
    assert function() == 5, "written after the first import of the folder"


def test_neighbour_packages(tmp_path):
    """Submodules, relative and absolute, and each form of the import statement."""
    mine = """
import tools.text
import tools.deep.inner as inner
from tools import number, text as words
from tools.deep import inner as same
from tools.text import *
from . import plain
from .plain import P
from .tools import number as numbered
def f():
    import plain as again
    assert same is inner and words is tools.text and again is plain and numbered is number
    return tools.text.T, number.N, inner.I, STARRED, P
"""
    write_files(
        tmp_path,
        mine=mine,
        plain="P = 'p'\n",
        **{
            "tools/__init__": "from . import number\n",
            "tools/text": "import plain\nfrom .number import N\nT, STARRED = f'{plain.P}{N}', 's'",
            "tools/number": "N = 3\n",
            "tools/deep/__init__": "",
            "tools/deep/inner": "import tools.number\nfrom ..text import T\nI = T * tools.number.N",
        },
    )
    assert call(tmp_path) == ("p3", 3, "p3p3p3", "s", "p")


def test_a_folder_without_init_is_a_package_unless_something_installed_has_its_name(tmp_path):
    """As in a script: a user's folder of data, datasets/, does not hide the library datasets."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "list.json").write_text("[]")
    write_files(
        tmp_path,
        mine="import bare.inner, datasets\ndef f():\n    return bare.inner.X, datasets.Dataset\n",
        outer="X = 4\n",
        **{"bare/inner": "from outer import X\n"},
    )
    assert call(tmp_path) == (4, datasets.Dataset)


def test_a_neighbour_named_like_the_standard_library_stays_at_home(tmp_path):
    write_files(
        tmp_path,
        mine="import random, json.decoder, other\ndef f():\n    return random.MINE, other.MINE\n",
        other="from random import MINE\n",
        random="import string\nMINE = string.digits\n",
    )
    before = sys.modules["random"]
    assert call(tmp_path) == ("0123456789",) * 2
    import random

    assert random is before and random.random() < 1 and not hasattr(random, "MINE")
    write_files(tmp_path / "b", mine="import random\ndef f():\n    return random.random()\n")
    assert call(tmp_path / "b") < 1, "nor does the next user see it"


def test_a_neighbour_that_fails_leaves_nothing_behind_and_can_be_corrected(tmp_path):
    write_files(
        tmp_path,
        mine="import good, bad\ndef f():\n    return bad.X\n",
        good="X = 1\n",
        bad="X = 2\n1 / 0\n",
    )
    for _ in range(2):
        before = set(sys.modules)
        with pytest.raises(ZeroDivisionError):
            import_file(tmp_path / "mine.py")
        left = {name.rpartition(".")[2] for name in set(sys.modules) - before}
        assert not left & {"mine", "bad"}
    write_files(tmp_path, bad="X = 22\n")
    assert call(tmp_path) == 22


@pytest.mark.parametrize("name", ["my-source", "my source", "source.v2", "2nd", "class"])
def test_a_file_whose_name_is_no_identifier(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(
        "from . import near\nimport near as same\ndef f():\n"
        "    return near.X, same is near, __file__\n"
    )
    write_files(tmp_path, near="X = 6\n", source="X = 'another file'\n")
    file = tmp_path / f"{name}.py"
    assert call(tmp_path, name) == (6, True, str(file))
    assert import_file(file) is import_file(str(file))


def test_a_file_and_a_package_of_one_name(tmp_path):
    write_files(tmp_path, mine="def f():\n    return 'file'\n", **{"mine/__init__": ""})
    assert call(tmp_path) == "file", "FILE.py is what was asked for"
    assert import_file(tmp_path / "mine" / "__init__.py").__file__.endswith("__init__.py")


def test_files_that_import_each_other(tmp_path):
    write_files(
        tmp_path,
        mine="X = 1\nimport other\ndef f():\n    return other.g()\n",
        other="import mine\ndef g():\n    return mine.X, mine.f\n",
    )
    assert call(tmp_path) == (1, function_of(f"{tmp_path}/mine.py:f")), "one module, not two"


def test_threads_get_one_whole_module(tmp_path):
    mine = "import time, slow\ntime.sleep(0.3)\ndef f():\n    return slow.LOADED\n"
    slow = "import time\ntime.sleep(0.3)\nLOADED = object()\n"
    write_files(tmp_path, mine=mine, slow=slow)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: call(tmp_path), range(8)))
    assert len(set(loaded)) == 1


def test_dataclasses_and_pickles_of_a_users_file(tmp_path):
    """A function and an object travel to a forked process and back."""
    mine = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar, get_type_hints
import near
@dataclass
class Page:
    SIZE: ClassVar[int] = 3
    word: str = near.WORD
    lines: list[Page] = field(default_factory=list)
def f(page=None):
    import near
    return Page(near.WORD * Page.SIZE, [page] if page else [])
def g():
    return f
"""
    write_files(tmp_path, mine=mine, near="WORD = 'tax'\n")
    function = function_of(f"{tmp_path}/mine.py:f")
    page = function()
    assert page.word == "taxtaxtax" and pickle.loads(pickle.dumps(page)) == page
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(function, page).result(60) == function(page)
        assert pool.submit(call, tmp_path, "mine", "g").result(60) is function


def test_the_import_system_works_as_before(tmp_path):
    """Libraries call invalidate_caches, torch.distributed.nn among them."""
    write_files(tmp_path, mine="def f():\n    return 1\n")
    assert call(tmp_path) == 1
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="nanollava_user_nobody"):
        importlib.import_module("nanollava_user_nobody.mine")


def test_our_own_package_stays_ours(tmp_path):
    """Next to a checkout, or to a file of that name, nanollava is still the one that runs."""
    write_files(
        tmp_path,
        mine="import nanollava.sources\ndef f():\n    return nanollava.sources\n",
        **{"nanollava/__init__": "1 / 0\n"},
    )
    assert call(tmp_path) is sys.modules["nanollava.sources"]


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
        {
            "id": 7,
            "image": "images/a.png",
            "conversations": talk("<image>", "a"),
            "data_source": "pages",
        },
        {"image": ["images/a.png", "images/a.png"], "conversations": talk("<image><image>", "b")},
        {"id": "c", "conversations": talk("text", "c")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = list(records(Source(f"json:{tmp_path}/a.json"), 0))
    assert [r["id"] for r in found] == ["7", "1", "c"]
    assert [images_of(r) for r in found] == [[png()], [png()] * 2, []], "bytes as they were"
    assert [r["conversations"] for r in found] == [r["conversations"] for r in rows]
    assert [r["source"] for r in found] == ["pages", "", ""]


# ---- files of the formats that the blog's data comes in


def llava(count, folder="00453"):
    """Rows and images as LLaVA-Pretrain's: two records may share an image."""
    rows = [
        {
            "id": f"{i:09}",
            "image": f"{folder}/{i // 2:09}.png",
            "conversations": talk("Describe it.\n<image>", f"answer {i}"),
        }
        for i in range(count)
    ]
    return rows, {row["image"]: png(20 + i, color=(i, 0, 0)) for i, row in enumerate(rows[::2])}


def write_zip(file, members):
    with zipfile.ZipFile(file, "w") as box:
        box.mkdir("00453")
        for name, image in members.items():
            box.writestr(name, image)


def write_tar(file, members, mode="w:gz"):
    Path(file).write_bytes(tar(members, mode))


def write_parquet(file, rows, **columns):
    features = {"image": datasets.Image(), **{k: datasets.Value(v) for k, v in columns.items()}}
    if "conversations" in rows[0]:
        turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        features["conversations"] = [turn]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(file)


def read(path, **keys):
    return list(records(Source(path, **keys), 0))


def prepared(tmp_path, path, **keys):
    """(rows of the shards, lines of bad.json) of one source."""
    recipe = Recipe(data=str(tmp_path / "shards"), sources={"a": Source(path, **keys)})
    folder = prepare_source(recipe, "a")
    bad = folder / "bad.json"
    rows = list(LocalDataset(local=str(folder)))
    return rows, json.loads(bad.read_text()) if bad.exists() else []


def test_a_list_and_its_zip(tmp_path):
    """LLaVA-Pretrain: the records of each member, in the zip's order; text first, lost last."""
    rows, images = llava(6)
    rows.insert(3, {"id": "text", "conversations": talk("hello", "you")})
    rows.append(rows[0] | {"id": "lost", "image": "00453/none.png"})
    rows.append(rows[0] | {"id": "two", "image": [rows[0]["image"], rows[1]["image"]]})
    (tmp_path / "blip.json").write_text(json.dumps(rows))
    write_zip(tmp_path / "images.zip", {"00453/other.png": b"x", **dict(reversed(images.items()))})
    found = read(f"json:{tmp_path}/blip.json+images.zip")
    order = [
        "text",
        "two",
        "000000004",
        "000000005",
        "000000002",
        "000000003",
        "000000000",
        "000000001",
        "lost",
    ]
    assert [r["id"] for r in found] == order
    by_id = {row["id"]: row for row in rows}
    for record in found[2:-1]:
        assert images_of(record) == [images[by_id[record["id"]]["image"]]]
        assert record["conversations"] == by_id[record["id"]]["conversations"]
    shards, bad = prepared(tmp_path, f"json:{tmp_path}/blip.json+images.zip")
    assert [r["id"] for r in shards] == [order[0], *order[2:-1]]
    assert bad[0].startswith("two: several images in an archive. Unpack the archive")
    assert bad[1] == "lost: image 00453/none.png is in none of images.zip"


def test_lists_and_tars(tmp_path):
    """UReader: a list over several tar.gz, some with a ./ or a folder of their own around."""
    rows, images = llava(8, "docvqa/train")
    (tmp_path / "tr").mkdir()
    (tmp_path / "tr" / "tr_processed.json").write_text(json.dumps(rows))
    parts = [dict(list(images.items())[i::2]) for i in range(2)]
    write_tar(tmp_path / "tr" / "images_1.tar.gz", {f"./{k}": v for k, v in parts[0].items()})
    write_tar(tmp_path / "tr" / "images_2.tar", {f"x/{k}": v for k, v in parts[1].items()}, "w")
    found = read(f"json:{tmp_path}/tr/tr_processed.json+images_*")
    assert {r["id"]: images_of(r) for r in found} == {r["id"]: [images[r["image"]]] for r in rows}
    assert [r["id"][-1] for r in found] == list("01452367")
    (tmp_path / "more.json").write_text(json.dumps(rows[:1]))
    both = read(f"json:{tmp_path}/tr/tr_processed.json+../more.json+images_1.tar.gz+images_2.tar")
    assert len(both) == 9 and not any("error" in r for r in both)


def test_parquet_with_images_and_without(tmp_path):
    """LLaVA-NeXT-Data: an Image column that is null for text; several files; the bytes stay."""
    picture = png()
    rows = [
        {
            "id": str(i),
            "image": {"bytes": picture, "path": "a.png"} if i % 3 else None,
            "conversations": talk("<image>" if i % 3 else "hi", f"{i}"),
            "data_source": "coco",
        }
        for i in range(7)
    ]
    for part, some in enumerate((rows[:4], rows[4:])):
        write_parquet(tmp_path / f"train-{part}.parquet", some, id="string", data_source="string")
    (tmp_path / "test-0.parquet").write_bytes(b"")
    found = read(f"parquet:{tmp_path}/train-*.parquet", prompt="Describe it.")
    assert [r["id"] for r in found] == list("0123456")
    assert [images_of(r) for r in found] == [[picture] if i % 3 else [] for i in range(7)]
    assert found[0]["conversations"] == talk("hi", "0")
    assert found[1]["conversations"] == talk("<image>\nDescribe it.", "1")
    assert {r["source"] for r in found} == {"coco"}
    shards, bad = prepared(tmp_path, f"parquet:{tmp_path}/train-*.parquet", samples=5)
    assert [r["id"] for r in shards] == list("01234") and bad == []


def test_parquet_with_paths(tmp_path):
    """Paths instead of bytes, plain or in an Image column, are relative to the parquet file; a
    table without an image column is text.
    """
    (tmp_path / "a.png").write_bytes(png())
    rows = {
        "a": {"id": 1, "image": "a.png", "conversations": talk("q", "a")},
        "b": {"image": {"bytes": None, "path": "a.png"}, "txt": "a"},
        "c": {"conversations": talk("q", "a")},
    }
    for name, row in rows.items():
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    found = read(f"parquet:{tmp_path}/*.parquet")
    assert [r["id"] for r in found] == ["1", "1", "2"]
    assert [images_of(r) for r in found] == [[png()], [png()], []]


def test_syndog_pages(tmp_path):
    truth = [json.dumps({"gt_parse": {"text_sequence": text}}) for text in ("One two", "三四")]
    rows = [{"image": {"bytes": png(), "path": None}, "ground_truth": t} for t in (*truth, "{", "")]
    write_parquet(tmp_path / "train-0.parquet", rows, ground_truth="string")
    shards, bad = prepared(tmp_path, f"parquet:{tmp_path}/train-0.parquet", prompt="OCR it.")
    assert [r["conversations"] for r in shards] == [
        talk("<image>\nOCR it.", "One two"),
        talk("<image>\nOCR it.", "三四"),
    ]
    assert [split_images(r["image"], r["sizes"]) for r in shards] == [[png()]] * 2
    assert [line[:2] for line in bad] == ["2:", "3:"], "a page without text does not stop the rest"


def test_webdataset_pairs(tmp_path):
    """cc3m-wds: jpg, txt and a json whose fields vary in type from sample to sample."""
    members = {}
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(jpg := io.BytesIO(), "JPEG")
        members[f"{i:09}.jpg"] = jpg.getvalue()
        members[f"{i:09}.json"] = json.dumps({"width": 8 if i < 6 else "odd"}).encode()
        members[f"{i:09}.txt"] = f"caption {i}".encode()
    del members["000000007.txt"], members["000000009.jpg"]
    write_tar(tmp_path / "cc3m-train-0000.tar", members, "w")
    shards, bad = prepared(tmp_path, f"webdataset:{tmp_path}/cc3m-train-*.tar", prompt="Caption:")
    assert [r["id"] for r in shards] == [f"{i:09}" for i in range(12) if i not in (7, 9)]
    assert shards[3]["conversations"] == talk("<image>\nCaption:", "caption 3")
    assert shards[3]["image"] == members["000000003.jpg"], "the same JPEG"
    assert [line.split(":")[0] for line in bad] == ["000000007", "000000009"]


def test_text_only_lists(tmp_path):
    """Evol-Instruct: no image key, ids under another name."""
    rows = [{"idx": f"x{i}", "conversations": talk(f"q{i}", f"a{i}")} for i in range(3)]
    (tmp_path / "evol.json").write_text(json.dumps(rows))
    shards, bad = prepared(tmp_path, f"json:{tmp_path}/evol.json", prompt="Describe it.")
    assert [r["conversations"] for r in shards] == [r["conversations"] for r in rows] and not bad


def write_pdf(file, *pages):
    """A PDF of lines of Helvetica, 300 x 600 points; an empty string is an empty page."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    parts = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, text in enumerate(pages):
        parts.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 600]/Contents {5 + 2 * i} 0 R"
            "/Resources<</Font<</F 3 0 R>>>>>>"
        )
        lines = "".join(f"({line})Tj 0 -40 Td " for line in text.split("\n"))
        draw = f"BT /F 24 Tf 20 500 Td {lines}ET"
        parts.append(f"<</Length {len(draw)}>>stream\n{draw}\nendstream")
    body, places = "%PDF-1.4\n", []
    for i, part in enumerate(parts, 1):
        places.append(len(body))
        body += f"{i} 0 obj{part}endobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(parts) + 1}"
    file.write_bytes(f"{body}{end}/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF".encode())


def test_pdf_pages(tmp_path):
    """Each page is drawn and its text is the answer; empty and broken ones are named."""
    (tmp_path / "pdfs" / "sub").mkdir(parents=True)
    write_pdf(tmp_path / "pdfs" / "b.pdf", "Hello there\nsecond line", "", "third page")
    write_pdf(tmp_path / "pdfs" / "sub" / "c.PDF", "a reposi-\ntory")
    (tmp_path / "pdfs" / "a.pdf").write_bytes(b"%PDF-1.4 torn")
    (tmp_path / "pdfs" / "notes.txt").write_text("not a PDF")
    shards, bad = prepared(tmp_path, f"pdf:{tmp_path}/pdfs")
    assert [r["id"] for r in shards] == ["b.pdf#page=1", "b.pdf#page=3", "c.PDF#page=1"]
    ask = "<image>\nRead the text in the image."
    assert shards[0]["conversations"] == talk(ask, "Hello there\nsecond line")
    page = np.asarray(Image.open(io.BytesIO(shards[0]["image"])).convert("L"))
    assert page.shape == (1344, 672) and page[0, 0] == 255
    dark = np.flatnonzero((page < 128).any(1)) / 1344 * 600  # in points from the top
    assert 78 < dark.min() < 90 and 138 < dark.max() < 148, "two lines where the file puts them"
    assert bad[0].startswith(f"a.pdf: {tmp_path}/pdfs/a.pdf: ")
    assert bad[1] == f"b.pdf#page=2: {tmp_path}/pdfs/b.pdf: this page has no text"
    (own,) = read(f"pdf:{tmp_path}/pdfs/sub", prompt="Transcribe.")
    assert own["conversations"] == talk("<image>\nTranscribe.", "a reposi-\ntory"), "as printed"
    before = shard_folder(Recipe(sources={"a": Source(f"pdf:{tmp_path}/pdfs")}), "a")
    write_pdf(tmp_path / "pdfs" / "d.pdf", "new")
    assert shard_folder(Recipe(sources={"a": Source(f"pdf:{tmp_path}/pdfs")}), "a") != before


def test_small_and_large_images(tmp_path):
    """One pixel is an image; 20,000 x 20,000 pixels, a megabyte of PNG, are refused by number."""
    (tmp_path / "dot.png").write_bytes(png(1, 1))
    (tmp_path / "line.png").write_bytes(png(20_000, 1))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "wall.png")
    rows = [
        {"id": n, "image": f"{n}.png", "conversations": talk("<image>", "a")}
        for n in ("dot", "line", "wall")
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    shards, bad = prepared(tmp_path, f"json:{tmp_path}/a.json")
    assert [r["id"] for r in shards] == ["dot", "line"]
    assert len(bad) == 1 and "wall: unreadable image: Image size (400000000 pixels)" in bad[0]


# ---- files that cannot be read


def cut(file, keep=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    return file


def test_cut_files_are_named(tmp_path):
    rows, images = llava(40)
    images = {k: os.urandom(999) for k in images}  # what gzip cannot make smaller
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_zip(tmp_path / "a.zip", images)
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        write_tar(tmp_path / name, images, mode)
    for name in ("a.zip", "a.tar", "a.tar.gz"):
        cut(tmp_path / name)
        with pytest.raises(ValueError, match=f"{tmp_path}/{name}: "):
            read(f"json:{tmp_path}/a.json+{name}")
    picture = {"bytes": png(), "path": "a.png"}
    write_parquet(tmp_path / "a.parquet", [{"image": picture, "txt": "a"}] * 99, txt="string")
    with pytest.raises(ValueError, match=f"{tmp_path}/a.parquet: .*footer"):
        read(f"parquet:{cut(tmp_path / 'a.parquet')}")
    pairs = {f"{i}.{kind}": b"abc" for i in range(9) for kind in ("jpg", "txt")}
    for keep in (0.3, 0.31, 0.33):  # between two members, in a header, in a member
        write_tar(tmp_path / "w.tar", pairs, "w")
        with pytest.raises(ValueError, match=f"{tmp_path}/w.tar: the file is cut off"):
            read(f"webdataset:{cut(tmp_path / 'w.tar', keep)}")
    with pytest.raises(ValueError, match=f"{tmp_path}/a.json: "):
        read(f"json:{cut(tmp_path / 'a.json')}")
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="a.json: the file has to be a list of LLaVA records"):
        read(f"json:{tmp_path}/a.json")


@pytest.mark.parametrize("size", [100, 511, 512, 1024, 5000])
def test_a_tar_without_its_end_is_cut_however_small(size, tmp_path):
    write_tar(tmp_path / "w.tar", {"1.jpg": os.urandom(size), "1.txt": b"a dot"}, "w")
    assert len(read(f"webdataset:{tmp_path}/w.tar")) == 1
    whole = (tmp_path / "w.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "w.tar").write_bytes(whole)
    with pytest.raises(
        ValueError, match=f"{tmp_path}/w.tar: the file is cut off: a tar ends in zeros. Download"
    ):
        read(f"webdataset:{tmp_path}/w.tar")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("parquet:hf://datasets/org/name", "names no files.*write hf://datasets/ORG/NAME/PATTERN"),
        ("parquet:hf://datasets/org/", "names no files.*write hf://datasets/ORG/NAME/PATTERN"),
        ("parquet:hf://datasets//name/*.parquet", "names no files.*write hf://datasets/ORG"),
        ("parquet:hf://datasets/org/name//*.parquet", "names no files.*write hf://datasets/ORG"),
        (f"json:{ROOT}/README.md", "json:README.md.*list.*ends in .json"),
        (f"pdf:{ROOT}/README.md", "give a folder of PDFs, or files whose names end in .pdf"),
    ],
)
def test_addresses_that_mean_nothing_are_refused(path, told):
    with pytest.raises(ValueError, match=told):
        read(path)


def test_tables_of_other_columns_are_refused(tmp_path):
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"a.parquet: columns \['answer', 'question'\]; expected"):
        read(f"parquet:{tmp_path}/a.parquet")
    write_tar(tmp_path / "a.tar", {"1.jpg": b"x", "2.jpg": b"y"}, "w")
    with pytest.raises(ValueError, match=r"a.tar: columns .*'jpg'.*expected one of .*'txt'"):
        read(f"webdataset:{tmp_path}/a.tar")
    for path in ("parquet:./none/*.parquet", f"json:{tmp_path}/a.tar+none.zip", "pdf:./none"):
        with pytest.raises(
            FileNotFoundError, match=r"no file at .*none.*begin local paths with \./"
        ):
            read(path)


# ---- the hub


def served(monkeypatch, folder, sizes):
    """The hub as if it had a dataset of these sizes, all of it in the cache but *.zip."""
    asked = []

    def snapshot(dataset, **keys):
        asked.append((dataset, keys))
        return str(folder)

    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    info = SimpleNamespace(dataset_info=lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(readers, "snapshot_download", snapshot)
    monkeypatch.setattr(readers, "HfApi", lambda: info)
    in_cache = lambda _, name, **__: None if name.endswith(".zip") else f"/cache/{name}"  # noqa: E731
    monkeypatch.setattr(readers, "try_to_load_from_cache", in_cache)
    return asked


def test_files_of_the_hub(tmp_path, monkeypatch):
    rows, images = llava(4)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "blip.json").write_text(json.dumps(rows))
    write_zip(tmp_path / "images.zip", images)
    sizes = {"sub/blip.json": 3 * 10**9, "images.zip": 5 * 10**9, "other.bin": 7 * 10**9}
    asked = served(monkeypatch, tmp_path, sizes)
    where = "hf://datasets/some/where/sub/blip.json+images.zip"
    assert len(read(f"json:{where}")) == 4
    keys = {"repo_type": "dataset", "allow_patterns": ["sub/blip.json", "images.zip"]}
    assert asked == [("some/where", keys)]
    assert readers.weigh(where) == (8 * 10**9, 5 * 10**9), (
        "other.bin is not wanted, the list is there"
    )
    here = tmp_path / "mine.zip"
    shutil.move(tmp_path / "images.zip", here)
    assert len(read(f"json:hf://datasets/some/where/sub/blip.json+{here}")) == 4
    with pytest.raises(FileNotFoundError, match="no file at .*images.zip"):
        read(f"json:{where}")


def failing(kind):
    def fail(*_, **__):
        reply = requests.Response()
        reply.status_code = 404
        raise kind("404 Client Error.\nRepository Not Found", response=reply)

    return fail


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (
            RepositoryNotFoundError,
            "Look at huggingface.co/datasets/old/name: it may have a new name",
        ),
        (GatedRepoError, "you must accept its terms (and run `hf auth login`)"),
    ],
)
def test_a_renamed_or_gated_dataset_is_named(tmp_path, monkeypatch, kind, advice):
    monkeypatch.setattr(readers, "snapshot_download", failing(kind))
    with pytest.raises(FileNotFoundError) as error:
        read("parquet:hf://datasets/old/name/data/*.parquet")
    assert str(error.value).startswith(
        "datasets/old/name: data/*.parquet cannot be downloaded: 404"
    )
    assert advice in str(error.value)


def test_without_a_network_the_advice_is_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = Source("parquet:hf://datasets/some/where/*.parquet")
    recipe = Recipe(
        data=str(tmp_path / "d"), sources={"a": source}, stages={"s": Stage(sources={"a": 1})}
    )
    with pytest.raises(FileNotFoundError, match="datasets/some/where.*its source's KIND:./path"):
        prepare(recipe)
    assert not (tmp_path / "d").exists(), "before anything is written"


def test_a_full_disk_while_fetching_is_told_as_such():
    with pytest.raises(OSError) as error, files.explain_failed_download("a", "b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC


# ---- how much it is


def used(recipe):
    return replace(recipe, stages={"s": Stage(sources={name: 1 for name in recipe.sources})})


def test_sizes_are_told_and_what_cannot_fit_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(llava(2)[0]))
    sizes = {"a.json": 10**9, "b.zip": 2 * 10**9}
    served(monkeypatch, tmp_path, sizes)
    recipe = used(
        Recipe(
            data=str(tmp_path / "d" / "e"),
            sources={
                "far": Source("json:hf://datasets/some/where/a.json+b.zip"),
                "own": Source(f"{OWN}:squares", samples=3),
            },
        )
    )
    free = {"free": 5 * 10**9 - 1}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(**free))
    with pytest.raises(ValueError, match="5.00 GB free in .*, but 5.00 GB are needed: free some"):
        prepare(recipe)  # 3 GB of shards and 2 GB to fetch
    assert not (tmp_path / "d").exists()
    prepare(replace(recipe, sources=recipe.sources | {"far": Source(f"{OWN}:squares", samples=2)}))
    assert "5.00 GB free" in capsys.readouterr().out
    few = replace(recipe.sources["far"], samples=9)  # what a part weighs is not known
    free["free"] = 2 * 10**9
    monkeypatch.setattr(data, "prepare_source", lambda *_: None)
    prepare(replace(recipe, sources=recipe.sources | {"far": few}))
    told = capsys.readouterr().out
    assert told.endswith(", 2.00 GB to download; sizes: far 3.00 GB\n"), "own is there"
    prepare(Recipe())
    assert "no stage of this recipe uses a source" in capsys.readouterr().out
    free["free"] -= 1
    with pytest.raises(ValueError, match="2.00 GB free in .*, but 2.00 GB are needed"):
        prepare(replace(recipe, sources=recipe.sources | {"far": few}))


def test_what_is_written_already_needs_no_room(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(llava(30)[0]))
    size = (tmp_path / "a.json").stat().st_size
    recipe = used(
        Recipe(data=str(tmp_path / "d"), sources={"a": Source(f"json:{tmp_path}/a.json")})
    )
    monkeypatch.setattr(data, "prepare_source", lambda *_: None)
    free = SimpleNamespace(free=size - 10)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="GB are needed"):
        prepare(recipe)
    chunk = Path(f"{shard_folder(recipe, 'a')}.part", "00000")
    chunk.mkdir(parents=True)
    (chunk / "shard.00000.mds").write_bytes(bytes(10))
    prepare(recipe)


def test_images_of_any_shape():
    assert images_of({"image": b"x"}) == [b"x"]
    assert images_of({"image": [b"x", b"y"]}) == images_of({"image": (b"x", b"y")}) == [b"x", b"y"]
    assert images_of({"image": None}) == images_of({"image": []}) == images_of({}) == []
    assert images_of({"image": lambda: b"drawn"}) == [b"drawn"], "made when it is wanted"


def test_what_goes_wrong_in_the_making_is_named():
    def fail():
        raise RuntimeError("pdfium")

    talked, bad = talk("<image>", "a"), []
    rows = [{"id": "a", "image": fail, "conversations": talked}, {"id": "b", "error": "gone"}]
    good = {"id": "c", "image": png, "conversations": talked}
    assert list(data.usable([*rows, good], bad)) == [(good, [png()])]
    assert bad == ["a: pdfium", "b: gone"]


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
    rows = {r["id"]: r for r in LocalDataset(local=str(folder))}
    assert set(rows) == {"one", "two", "text"}
    images = {k: split_images(r["image"], r["sizes"]) for k, r in rows.items()}
    assert images == {"one": [good], "two": [wide, good], "text": []}
    assert rows["one"]["conversations"] == talk("<image>\nRead it.", "a frame")
    assert rows["text"]["conversations"] == talk("Ünïcode?", "yes")
    assert {r["source"] for r in rows.values()} == {"mix"}
    bad = json.loads((folder / "bad.json").read_text())
    assert [line.split(":")[0] for line in bad] == [
        "cut",
        "gone",
        "empty",
        "none",
        "count",
        "odd",
        "blank",
    ]
    assert "unreadable image" in bad[0] and "gone.png" in bad[1]
    assert "0 <image> for 1 images; write one for each" in bad[4]
    assert "mix: 3 records, 7 left out: cut: unreadable image" in capsys.readouterr().out


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


# ---- chunks: a stop costs at most one


COUNTED = """
import os, signal
from pathlib import Path
STOP, PICTURE = Path(__file__).with_name("stop"), {picture!r}
def f(split, count, seed):
    for i in range(count):
        if i == int(STOP.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        image = b"no image" if i % 10 == 4 else PICTURE
        yield {{"id": f"r{{i}}", "image": image, "conversations": [
            {{"from": "human", "value": "<image>"}}, {{"from": "gpt", "value": f"{{i}}"}}]}}
"""


def ids(folder):
    return [r["id"] for r in LocalDataset(local=str(folder))]


@pytest.mark.parametrize("stop", [0, 7, 8, 29])
def test_killed_within_a_source_it_goes_on_after_the_last_whole_chunk(
    tmp_path, monkeypatch, capsys, stop
):
    """kill -9 before record `stop`: another start rewrites nothing that was whole."""
    monkeypatch.setattr(data, "CHUNK", 8)
    (tmp_path / "counted.py").write_text(COUNTED.format(picture=png()))
    (tmp_path / "stop").write_text("-1")
    source = Source(f"{tmp_path}/counted.py:f", samples=30)
    recipe = Recipe(data=str(tmp_path / "again"), sources={"a": source})
    once = prepare_source(replace(recipe, data=str(tmp_path / "once")), "a")
    (tmp_path / "stop").write_text(str(stop))
    process = multiprocessing.get_context("fork").Process(target=prepare_source, args=(recipe, "a"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    part = Path(f"{shard_folder(recipe, 'a')}.part")
    whole = {p: p.stat().st_mtime_ns for p in part.rglob("[0-9]*/*.mds")}
    assert len(whole) == stop // 8
    (part / "next" / "shard.00000.mds").write_bytes(b"torn")
    (part / "index.json").write_text("of a stop between the last two steps")
    (tmp_path / "stop").write_text("-1")
    capsys.readouterr()
    again = prepare_source(recipe, "a")
    assert ids(once) == ids(again) == [f"r{i}" for i in range(30) if i % 10 != 4]
    for file, stamp in whole.items():
        assert (again / file.relative_to(part)).stat().st_mtime_ns == stamp, "kept, not rewritten"
    bad = json.loads((again / "bad.json").read_text())
    assert [line.split(":")[0] for line in bad] == ["r4", "r14", "r24"]
    assert bad == json.loads((once / "bad.json").read_text())
    told = capsys.readouterr().out
    assert "a: 27 records (expected 30), 3 left out: r4: unreadable image" in told
    assert "r24: " in told and not part.exists()


def test_one_chunk_is_the_folder_itself(tmp_path, monkeypatch):
    """Small sources have the shards they always had; the hash takes no heed of documentation."""
    source = Source(f"{OWN}:squares", samples=8)
    recipe = Recipe(data=str(tmp_path), sources={"a": source})
    folder = prepare_source(recipe, "a")
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "shard.00000.mds"]
    papers = replace(source, expected=9, origin="here", licence="none")
    assert shard_folder(replace(recipe, sources={"a": papers}), "a") == folder
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.chdir(tmp_path)
    two = prepare_source(replace(recipe, data="two #2"), "a")
    assert ids(two) == ids(folder)
    names = sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
    assert names == [
        "00000/index.json",
        "00000/shard.00000.mds",
        "00001/index.json",
        "00001/shard.00000.mds",
        "index.json",
    ]
    assert not list(Path("two #2").glob("*.part"))


def test_a_full_disk_keeps_what_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 8)
    recipe = Recipe(data=str(tmp_path), sources={"a": Source(f"{OWN}:squares", samples=30)})
    write, room = data.MDSWriter.write, [20]

    def full(self, sample):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, sample)

    monkeypatch.setattr(data.MDSWriter, "write", full)
    with pytest.raises(OSError, match="no space left in .*. Free some and run it again"):
        prepare_source(recipe, "a")
    part = Path(f"{shard_folder(recipe, 'a')}.part")
    assert sorted(p.name for p in part.iterdir()) == ["00000", "00001"], "room for others"
    assert sum(room) == -1
    room[0] = 14  # just what is missing
    folder = prepare_source(recipe, "a")
    assert ids(folder) == [f"squares-train-{i}" for i in range(30)] and room == [0]


def test_cut_shards_are_named(tmp_path):
    """Streaming would end early without a word, or fail without a name."""
    recipe = Recipe(data=str(tmp_path), sources={"a": Source(f"{OWN}:squares", samples=8)})
    shard = prepare_source(recipe, "a") / "shard.00000.mds"
    size = shard.stat().st_size
    cut(shard)
    message = f"{shard} is damaged: expected {size:,} bytes. Delete {shard.parent}"
    with pytest.raises(ValueError, match=message):
        prepare_source(recipe, "a")
    shard.unlink()
    with pytest.raises(ValueError, match=message):
        prepare_source(recipe, "a")


def test_two_runs_that_want_one_source_write_it_once(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def f(split, count, seed):\n"
        "    Path(__file__).with_name('asked').open('a').write('x')\n"
        "    for i in range(9):\n        time.sleep(0.02)\n"
        "        yield {'conversations': [{'from': 'human', 'value': 'q'},\n"
        "                                 {'from': 'gpt', 'value': str(i)}]}\n"
    )
    recipe = Recipe(data=str(tmp_path / "d"), sources={"a": Source(f"{tmp_path}/mine.py:f")})
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(prepare_source(recipe, "a")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and (tmp_path / "asked").read_text() == "x"
    assert ids(folders[0]) == [str(i) for i in range(9)]


def test_no_usable_record_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", "image": "none.png"}]))
    recipe = Recipe(data=str(tmp_path / "d"), sources={"a": Source(f"json:{tmp_path}/a.json")})
    with pytest.raises(ValueError, match="source a has no usable record; left out: .*none.png"):
        prepare_source(recipe, "a")
    assert [p.suffix for p in (tmp_path / "d").iterdir()] == [".lock"]


# ---- the blog's sources


def test_the_sources_of_the_blog_are_a_base():
    text = (ROOT / "recipes" / "sources.yaml").read_text()
    assert text.startswith("# A base for recipes") and "if __name__" not in text
    recipe = read_recipe(ROOT / "recipes" / "sources.yaml")
    assert recipe == replace(Recipe(), sources=recipe.sources), "sources, nothing else"
    for name, source in recipe.sources.items():
        assert source.expected and source.origin and source.licence, name
        kind, _, where = source.path.partition(":")
        dataset, patterns = readers.split_where(where)
        assert kind in ("json", "parquet", "webdataset") and all(patterns), name
        assert dataset in source.origin or not dataset, name
    names = """blip558k recap_coco118k recap_blip558k recap_cc3m llava_next_779k cc3m_raw cc12m_raw
        ureader_100k syndog_en_100k syndog_zh_100k syndog_en syndog_zh evol_143k sharegpt4v_100k"""
    assert set(names.split()) <= set(recipe.sources)
    assert not any("validation" in source.path for source in recipe.sources.values())


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
        *(
            shard_folder(replace(recipe, sources={"a": replace(source, **change)}), "a")
            for change in ({"samples": 3}, {"split": "val"}, {"prompt": "x"})
        ),
    ]
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
    with pytest.raises(
        ValueError, match="batch_size 3 does not divide among 2 processes. Choose a multiple of 2"
    ):
        make_loader(recipe, stage, writer, 2)


def read_with_few_descriptors(limit, recipe, stage, writer):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    batches = [batch for _ in range(2) for batch in make_loader(recipe, stage, writer, 1)]
    assert [len(batch) for batch in batches] == [256, 256]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_of_256_documents_needs_few_file_descriptors(mixed, tokenizer, workers):
    """Each tensor that a worker sends takes one; the usual limit is 1,024 for all of a process.

    256 documents would need 768. The rest of the 600 is for streaming, which opens the shared
    memory that other runs left behind while it looks for a free name.
    """
    recipe, *_ = mixed
    prepare_source(recipe, "mix")
    recipe = replace(recipe, workers=workers)
    stage = Stage(sources={"mix": 100}, batch_size=256)
    writer = Writer(tokenizer, recipe.visual, 48, 6, "qwen_1_5")
    job = multiprocessing.get_context("spawn").Process(
        target=read_with_few_descriptors, args=(600, recipe, stage, writer)
    )
    job.start()
    job.join(400)
    assert job.exitcode == 0


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
