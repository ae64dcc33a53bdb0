"""Where files enter that nobody vouches for; each entrance may raise what a user can fix.

    python tests/doors.py image --seconds 600     # atheris (pip install atheris), one door

A mutated file must end in a result or in ALLOWED, within SECONDS; anything else is a finding.
"""

import gc
import io
import json
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from types import FunctionType

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
FOLLOWED = ("nanollava", "omegaconf", "yaml", "PIL", "tarfile", "zipfile", "json")  # by atheris
sys.path.insert(0, str(Path(__file__).parent))
from conftest import film, tar  # noqa: E402

from nanollava import generate  # noqa: E402
from nanollava.ablations import rows, verdicts  # noqa: E402
from nanollava.anyres import open_image  # noqa: E402
from nanollava.data import usable  # noqa: E402
from nanollava.evaluate import read_lines  # noqa: E402
from nanollava.extras.video import open_video  # noqa: E402
from nanollava.prompts import encode, read_turns  # noqa: E402
from nanollava.recipe import Source, read_recipe  # noqa: E402
from nanollava.sources import records  # noqa: E402

ALLOWED = (ValueError, OSError)
SECONDS = 2.0
RECORDS = [
    {
        "id": "a",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": "a page"},
        ],
    },
    {
        "id": 7,
        "conversations": [
            {"from": "human", "value": "hello"},
            {"from": "gpt", "value": "hello there"},
        ],
    },
]


def picture(kind: str, mode: str = "RGB", **keys) -> bytes:
    """A small image file of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind, **keys)
    return file.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    """A zip of files."""
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as box:
        for name, data in files.items():
            box.writestr(name, data)
    return out.getvalue()


def table() -> bytes:
    """A parquet file of LLaVA records."""
    from datasets import Dataset

    talk = RECORDS[0]["conversations"]
    row = {"id": "a", "image": {"bytes": picture("PNG"), "path": "a.png"}, "conversations": talk}
    Dataset.from_list([row] * 3).to_parquet(out := io.BytesIO())
    return out.getvalue()


def pdf() -> bytes:
    """A page with a word on it."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(2, 1))
    figure.text(0.1, 0.5, "tax 305")
    figure.savefig(out := io.BytesIO(), format="pdf")
    plt.close(figure)
    return out.getvalue()


def read(where: str) -> None:
    """The first records of a source, as `prepare` looks at them."""
    for _ in islice(usable(records(Source(where), 0), []), 8):
        pass


def file_of(name: str) -> Callable[[bytes, Path], None]:
    """A door that reads KIND:NAME."""
    kind, _, name = name.partition(":")

    def door(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        read(f"{kind}:{folder / name}")

    return door


def boxed(name: str) -> Callable[[bytes, Path], None]:
    """A door that reads a list of records whose images are in a container."""

    def door(data: bytes, folder: Path) -> None:
        (folder / "list.json").write_text(json.dumps(RECORDS))
        (folder / name).write_bytes(data)
        read(f"json:{folder}/list.json+{name}")

    return door


def run_file(name: str) -> Callable[[bytes, Path], None]:
    """A door that opens a run folder, one of whose files is damaged."""

    def door(data: bytes, folder: Path) -> None:
        shutil.copytree(ROOT / "demo/nano", folder / "run", dirs_exist_ok=True)
        (folder / "run" / name).write_bytes(data)
        generate.load(folder / "run")

    return door


def at_home(name: str) -> bytes:
    """One of our recipes, whose base is found from anywhere."""
    text, folder = (ROOT / "recipes" / name).read_text(), f"{ROOT}/recipes/"
    return text.replace("../", folder).replace("base: sources", f"base: {folder}sources").encode()


def text_file(reader: Callable[[Path], object], name: str) -> Callable[[bytes, Path], None]:
    """A door that reads one file."""

    def door(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        reader(folder / name)

    return door


@cache
def tokenizer():
    """Nano's."""
    return AutoTokenizer.from_pretrained(ROOT / "recipes/nano/tokenizer")


def talk(data: bytes, folder: Path) -> None:
    """A record's conversation -> ids."""
    turns = read_turns(json.loads(data), 1)
    encode(tokenizer(), turns, "qwen_1_5")


IMAGES = {"1.jpg": picture("JPEG"), "1.txt": b"a dot", "2.jpg": picture("JPEG"), "2.txt": b"two"}
NAMED = {"images/a.png": picture("PNG"), "images/b.png": picture("PNG")}
LINES = b'{"task": "a", "score": 0.5}\n{"task": "b", "sc'
DOORS: dict[str, tuple[Callable[[bytes, Path], None], Callable[[], list[bytes]]]] = {
    "image": (
        lambda data, folder: open_image(data),
        lambda: [
            picture("PNG"),
            picture("JPEG"),
            picture("GIF", "P"),
            picture("WEBP"),
            picture("TIFF"),
            picture("BMP"),
            picture("PNG", "P"),
            picture("TIFF", "CMYK"),
            picture("PPM"),
            picture("PNG", "I;16"),
            picture("JPEG", "CMYK"),
            picture("TIFF", compression="tiff_lzw"),
        ],
    ),
    "video": (
        lambda data, folder: open_video(data, 4),
        lambda: [film(6), film(4, kind="avi"), film(4, kind="matroska")],
    ),
    "recipe": (
        text_file(read_recipe, "own.yaml"),
        lambda: [at_home("qwen05b.yaml"), at_home("nano.yaml")],
    ),
    "ablation": (
        text_file(lambda file: (rows.read_rows(file), verdicts.read_claims(file)), "own.yaml"),
        lambda: [at_home("ablations/lifting.yaml")],
    ),
    "json": (file_of("json:own.json"), lambda: [json.dumps(RECORDS).encode()]),
    "zip": (boxed("own.zip"), lambda: [archive(NAMED)]),
    "tar": (boxed("own.tar"), lambda: [tar(NAMED)]),
    "parquet": (file_of("parquet:own.parquet"), lambda: [table()]),
    "webdataset": (file_of("webdataset:own.tar"), lambda: [tar(IMAGES)]),
    "pdf": (file_of("pdf:own.pdf"), lambda: [pdf()]),
    "talk": (talk, lambda: [json.dumps(RECORDS[0]["conversations"]).encode()]),
    "results": (text_file(read_lines, "own.jsonl"), lambda: [LINES]),
    "weights": (
        run_file("model.safetensors"),
        lambda: [(ROOT / "demo/nano/model.safetensors").read_bytes()],
    ),
    "run's recipe": (
        run_file("recipe.yaml"),
        lambda: [(ROOT / "demo/nano/recipe.yaml").read_bytes()],
    ),
    "run's config": (
        run_file("config.json"),
        lambda: [(ROOT / "demo/nano/config.json").read_bytes()],
    ),
    "run's tokenizer": (
        run_file("tokenizer.json"),
        lambda: [(ROOT / "demo/nano/tokenizer.json").read_bytes()],
    ),
}
seeds_of = cache(lambda name: DOORS[name][1]())


def through(name: str, data: bytes, allowed: tuple[type[Exception], ...] = ALLOWED) -> None:
    """Bytes through a door; AssertionError for more time than SECONDS, other errors as they are."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        with suppress(*allowed):
            DOORS[name][0](data, Path(folder))
        took = time.process_time() - begin
    assert took < SECONDS, f"{name}: {took:.1f} s"


def fuzz(name: str, seconds: float = 600) -> None:
    """Atheris on one door, from its seeds on; it ends at the first finding."""
    if name not in DOORS:
        raise SystemExit(f"no such door: {name}; there are {', '.join(DOORS)}")
    import atheris

    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(seeds_of(name)):
            Path(corpus, str(i)).write_bytes(data)
        limits = (f"-max_total_time={seconds:.0f}", "-timeout=20", "-rss_limit_mb=6000")
        words = [sys.argv[0], corpus, *limits, "-print_final_stats=1"]
        for function in gc.get_objects():
            if isinstance(function, FunctionType) and str(function.__module__).startswith(FOLLOWED):
                atheris.instrument_func(function)
        atheris.Setup(words, lambda data: through(name, data))
        atheris.Fuzz()


if __name__ == "__main__":
    import typer

    typer.run(fuzz)
