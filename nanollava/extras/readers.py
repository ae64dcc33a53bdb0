"""Readers: files as they are published -> LLaVA records (those of `nanollava/sources.py`).

    path: json:./list.json+images.zip | parquet:WHERE | webdataset:WHERE | pdf:FOLDER

WHERE is a file, a folder (all below it), a glob, or files of a dataset on the hub,
`hf://datasets/ORG/NAME/PATTERN`. `+` joins further ones, relative to the first one's folder or to
the dataset; one that begins with a slash is here all the same. Each reader yields records one by
one, in a fixed order. What cannot be read becomes a record with an `error`, to be counted and named
where records are checked.
"""

import io
import json
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import filter_repo_objects

from nanollava.files import explain_failed_download

HUB = "hf://datasets/"
BROKEN = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
)
LARGEST = 2**28  # bytes of an image in a container
IMAGES = ("image", "jpg", "jpeg", "png", "webp")  # columns, of which a row fills one
ANSWERS = ("conversations", "ground_truth", "txt")  # LLaVA, SynthDOG, captions: a row has one


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever is wrong with a file, the ValueError names it."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{file}: {str(error) or type(error).__name__}") from error


def split_where(where: str) -> tuple[str, list[str]]:
    """WHERE -> the hub's dataset and patterns in it, or "" and paths here."""
    first, *others = where.split("+")
    if not first.startswith(HUB):
        return "", [first, *(str(Path(first).parent / other) for other in others)]
    org, name, *rest = [*first.removeprefix(HUB).split("/"), ""]
    if not org or not name or not rest[0]:
        raise ValueError(f"{where}: write hf://datasets/ORG/NAME/PATTERN, e.g. .../data/*.parquet")
    return f"{org}/{name}", ["/".join(rest[:-1]), *others]


def locate(where: str) -> list[Path]:
    """The files of WHERE, each pattern's by name; the hub's are fetched or found in its cache.

    Where the hub is out of reach its cache is taken as it is, even if files are missing there.
    """
    (dataset, patterns), root, files = split_where(where), Path(), []
    if dataset:
        with explain_failed_download(
            f"datasets/{dataset}: {' + '.join(patterns)}", "its source's KIND:./path"
        ):
            root = snapshot_download(dataset, repo_type="dataset", allow_patterns=patterns)
    for place in (Path(root, pattern) for pattern in patterns):
        names = glob(str(place / "**" if place.is_dir() else place), recursive=True)
        found = sorted(file for file in map(Path, names) if file.is_file())
        if not found:
            raise FileNotFoundError(f"no file at {place} (in a recipe, begin local paths with ./)")
        files += found
    return files


def weigh(where: str) -> tuple[int, int]:
    """Bytes of the files of WHERE, and of those that are still to be fetched."""
    dataset, patterns = split_where(where)
    try:
        with explain_failed_download(dataset, ""):
            files = HfApi().dataset_info(dataset, files_metadata=True).siblings if dataset else ()
    except FileNotFoundError:
        dataset = ""  # `locate` looks into the cache, or says what to do
    if not dataset:
        return sum(file.stat().st_size for file in locate(where)), 0
    wanted = filter_repo_objects(files, allow_patterns=patterns, key=lambda f: f.rfilename)
    sizes = {file.rfilename: file.size or 0 for file in wanted}
    cached = {name: try_to_load_from_cache(dataset, name, repo_type="dataset") for name in sizes}
    missing = sum(size for name, size in sizes.items() if not isinstance(cached[name], str))
    return sum(sizes.values()), missing


def check_space(folder: str, write: float, fetch: float) -> str:
    """The room on the disks, in words; ValueError where so many bytes will not fit there."""
    places = [Path(place).absolute() for place in (HF_HUB_CACHE, folder)]
    cache, data = (next(p for p in (place, *place.parents) if p.exists()) for place in places)
    if data.stat().st_dev == cache.stat().st_dev:
        write += fetch
    for place, need in ((cache, fetch), (data, write)):
        room = f"{(free := shutil.disk_usage(place).free) / 1e9:.2f} GB free in {place}"
        if need > free:
            raise ValueError(f"no room for {need / 1e9:.2f} GB: {room}")
    return room


def record_of(row: dict, folder: Path) -> dict:
    """A row of a list or table -> a record, by its columns; its paths are relative to `folder`.

    What does not fit is left as it is, to be counted as bad where records are checked.
    """
    images = next((row[name] for name in IMAGES if row.get(name)), [])
    images = images if isinstance(images, list) else [images]
    images = [x.get("bytes") or x.get("path") if isinstance(x, dict) else x for x in images]
    turns = (("human", "<image>"), ("gpt", answer_of(row)))
    record = {
        "source": row.get("data_source") or "",
        "image": [x if isinstance(x, bytes) else folder / str(x) for x in images if x],
        "conversations": row.get("conversations") or [{"from": k, "value": v} for k, v in turns],
    }
    name = row.get("id", row.get("__key__"))
    return record if name is None else record | {"id": str(name)}


def answer_of(row: dict) -> str | None:
    """A caption, or a SynthDOG page's text: {"gt_parse": {"text_sequence": "..."}}."""
    try:
        return json.loads(row["ground_truth"])["gt_parse"]["text_sequence"]
    except (KeyError, TypeError, ValueError):
        return row.get("txt")


def from_tables(kind: str, files: list[Path]) -> Iterator[dict]:
    """Parquet files or webdataset tars, one after the other, a few rows in memory."""
    from datasets import load_dataset

    for file in files:
        with reading(file), file.open("rb") as end:
            end.seek(max(0, file.stat().st_size - 1024))
            if file.suffix == ".tar" and any(end.read() or b"?"):
                raise ValueError("cut off: a tar ends in zeros")  # the reader may not notice
            rows = load_dataset(kind, data_files=str(file), split="train", streaming=True)
            there = sorted(rows.features)
            if not {*there} & {*ANSWERS}:
                raise ValueError(f"columns {there}; expected one of {ANSWERS} and one of {IMAGES}")
            # columns that vary from row to row, as a json of urls does, are not even looked at
            known = {"id", "__key__", "data_source", *IMAGES, *ANSWERS}
            rows = rows.select_columns([name for name in there if name in known])
            yield from (record_of(row, file.parent) for row in rows.decode(False))


def from_json(kind: str, files: list[Path]) -> Iterator[dict]:
    """LLaVA lists. Images are files relative to a list's folder or, if zips or tars are named too,
    their members of the same name, a container's own top folder left out if need be. Records then
    come in the order of the members, those without an image first.
    """
    from datasets import StreamingDownloadManager

    boxes = [file for file in files if file.suffix != ".json"]
    if len(boxes) == len(files):
        raise ValueError(f"json: wants a list whose name ends in .json, found {boxes[0].name}")
    waiting: dict[Path, list[dict]] = {}
    for file in (file for file in files if file.suffix == ".json"):
        with reading(file):
            rows = json.loads(file.read_bytes())
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("expected a list of LLaVA records")
        for record in (record_of(row, Path() if boxes else file.parent) for row in rows):
            if not boxes or not record["image"]:
                yield record
            elif len(record["image"]) > 1:
                yield record | {"error": "several images in a zip or tar: unpack it and name none"}
            else:
                waiting.setdefault(record["image"][0], []).append(record)
    for box in boxes:
        with reading(box):
            for member, content in StreamingDownloadManager().iter_archive(str(box)):
                name = Path(member) if Path(member) in waiting else Path(*Path(member).parts[1:])
                image = content.read(LARGEST + 1) if name in waiting else b""
                if len(image) > LARGEST:  # a few MB of a zip can hold many GB of zeros
                    raise ValueError(f"{member}: more than {LARGEST:,} bytes")
                yield from (record | {"image": image} for record in waiting.pop(name, ()))
    for name, lost in waiting.items():
        error = f"image {name} is in none of {', '.join(box.name for box in boxes)}"
        yield from (record | {"error": error} for record in lost)


def from_pdf(kind: str, files: list[Path]) -> Iterator[dict]:
    """Each page of each PDF as an image, and the text that it holds as the answer."""
    from pypdfium2 import PdfDocument, PdfiumError

    files = [file for file in files if file.suffix.lower() == ".pdf"]
    if not files:
        raise ValueError("pdf: wants a folder or files whose names end in .pdf; there is none")
    for file in files:
        try:
            for i, page in enumerate(PdfDocument(file), 1):
                text = page.get_textpage().get_text_bounded().replace("\r\n", "\n")
                text = text.replace("\x02", "-\n").strip()  # pdfium's mark in a broken word
                record = record_of({"id": f"{file.name}#page={i}", "txt": text}, file.parent)
                record["image"] = partial(draw, page)
                yield record if text else record | {"error": f"{file}: this page has no text"}
        except PdfiumError as error:
            yield {"id": file.name, "error": f"{file}: {error}"}


def draw(page: Any) -> bytes:
    """A PDF's page as PNG, its long side 1,344 pixels (pdfium rounds up)."""
    image = page.render(scale=1343.9 / max(page.get_size())).to_pil()
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


READERS = {"json": from_json, "parquet": from_tables, "webdataset": from_tables, "pdf": from_pdf}


def read(kind: str, where: str) -> Iterator[dict]:
    """The records of the files of WHERE, by the reader of their KIND."""
    return READERS[kind](kind, locate(where))
