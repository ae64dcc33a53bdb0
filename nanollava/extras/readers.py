"""Readers: files as they are published -> LLaVA records (those of `nanollava/sources.py`).

    path: json:./list.json+images.zip | parquet:WHERE | webdataset:WHERE | pdf:FOLDER

WHERE is a file, a folder with everything below it, a glob, or files of a dataset on the hub,
`hf://datasets/ORG/NAME/PATTERN`. `+` adds further ones: local paths relative to the first one's
folder, or patterns in the same dataset, except that a path with a leading slash is always local.
Each reader yields records one by one, in a fixed order. A record that cannot be read gets an
`error`; whoever checks the records counts it and names it.
"""

import io
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from glob import glob
from pathlib import Path
from tarfile import TarError
from typing import Any
from zipfile import BadZipFile

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import filter_repo_objects

from nanollava.files import explain_failed_download

HUB = "hf://datasets/"
# What libraries raise for a damaged file.
DAMAGED = (OSError, ValueError, EOFError, RuntimeError, zlib.error, TarError, BadZipFile)
LARGEST = 2**28  # bytes of an image in an archive
IMAGES = ("image", "jpg", "jpeg", "png", "webp")  # columns; each row fills one of them or none
ANSWERS = ("conversations", "ground_truth", "txt")  # LLaVA, SynthDOG, captions: a table has one
COLUMNS = {"id", "__key__", "data_source", *IMAGES, *ANSWERS}  # all that a record is made from


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Whatever is wrong with a file, raise a ValueError that names the file."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{file}: {str(error) or type(error).__name__}") from error


def split_where(where: str) -> tuple[str, list[str]]:
    """WHERE -> a dataset on the hub and patterns in it, or "" and local paths."""
    first, *others = where.split("+")
    if not first.startswith(HUB):
        folder = Path(first).parent
        return "", [first, *(str(folder / other) for other in others)]
    match = re.fullmatch("([^/]+/[^/]+)/([^/].*)", first.removeprefix(HUB))
    if not match:
        expected = f"{HUB}ORG/NAME/PATTERN, for example {HUB}ORG/NAME/data/*.parquet"
        raise ValueError(f"{where} names no files of a dataset: write {expected}")
    return match[1], [match[2], *others]


def locate(where: str) -> list[Path]:
    """The files of WHERE, pattern by pattern, sorted by name; those on the hub are downloaded.

    Without a network the hub's cache is used as it is, even if files are missing from it.
    """
    dataset, patterns = split_where(where)
    root = Path()
    if dataset:
        what = f"datasets/{dataset}: {' + '.join(patterns)}"
        with explain_failed_download(what, "its source's KIND:./path"):
            root = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=patterns))
    files: list[Path] = []
    for pattern in patterns:
        place = root / pattern
        everything = str(place / "**" if place.is_dir() else place)
        paths = map(Path, glob(everything, recursive=True))
        matching = sorted(path for path in paths if path.is_file())
        if not matching:
            raise FileNotFoundError(f"no file at {place}: in a recipe, begin local paths with ./")
        files += matching
    return files


def weigh(where: str) -> tuple[int, int]:
    """Bytes of the files of WHERE, and how many of these bytes are still to be downloaded."""
    dataset, patterns = split_where(where)
    if dataset:
        with suppress(FileNotFoundError):  # no network: `locate` uses the cache or says what to do
            return weigh_on_hub(dataset, patterns)
    return sum(file.stat().st_size for file in locate(where)), 0


def weigh_on_hub(dataset: str, patterns: list[str]) -> tuple[int, int]:
    """`weigh` for files of a dataset on the hub."""
    with explain_failed_download(dataset, ""):
        files = HfApi().dataset_info(dataset, files_metadata=True).siblings
    wanted = filter_repo_objects(files, allow_patterns=patterns, key=lambda file: file.rfilename)
    sizes = {file.rfilename: file.size or 0 for file in wanted}
    missing = 0
    for name, size in sizes.items():
        cached = try_to_load_from_cache(dataset, name, repo_type="dataset")
        if not isinstance(cached, str):  # not the path of a copy
            missing += size
    return sum(sizes.values()), missing


def check_space(folder: str, write: float, fetch: float) -> str:
    """The free space on the disk of `folder`, in words. Raises ValueError where the bytes to write
    there, or the bytes to fetch into the hub's cache, do not fit.
    """
    cache = existing_parent(HF_HUB_CACHE)
    data = existing_parent(folder)
    if data.stat().st_dev == cache.stat().st_dev:
        write += fetch  # one disk takes both
    for place, needed in ((cache, fetch), (data, write)):
        free = shutil.disk_usage(place).free
        message = f"{free / 1e9:.2f} GB free in {place}"
        if needed > free:
            advice = "free some, or set `data` (shards) or HF_HOME (downloads) to another disk"
            raise ValueError(f"{message}, but {needed / 1e9:.2f} GB are needed: {advice}")
    return message


def existing_parent(folder: str) -> Path:
    """The folder itself or, before it is made, the nearest one above it."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return place


def record_of(row: dict, folder: Path) -> dict:
    """A row of a list or table -> a record, by its columns; its paths are relative to `folder`.

    What does not fit stays as it is: whoever checks the records counts it as bad.
    """
    images = next((row[name] for name in IMAGES if row.get(name)), [])
    if not isinstance(images, list):
        images = [images]
    contents = [bytes_or_path(image, folder) for image in images]
    question = {"from": "human", "value": "<image>"}
    answer = {"from": "gpt", "value": answer_of(row)}
    record = {
        "source": row.get("data_source") or "",
        "image": [content for content in contents if content],
        "conversations": row.get("conversations") or [question, answer],
    }
    name = row.get("id", row.get("__key__"))
    if name is not None:
        record["id"] = str(name)
    return record


def bytes_or_path(image: Any, folder: Path) -> bytes | Path | None:
    """What a row has as an image: {"bytes": ..., "path": ...} in an Image column, bytes, a path."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if not image or isinstance(image, bytes):
        return image
    return folder / str(image)


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
        with naming(file):
            check_end(file)
            table = load_dataset(kind, data_files=str(file), split="train", streaming=True)
            columns = sorted(table.features)
            if not set(columns) & set(ANSWERS):
                raise ValueError(f"columns {columns}; expected one of {ANSWERS} and of {IMAGES}")
            # A column whose type varies from row to row, as a json of urls does, must not be read.
            table = table.select_columns([name for name in columns if name in COLUMNS])
            yield from (record_of(row, file.parent) for row in table.decode(False))


def check_end(file: Path) -> None:
    """ValueError for a tar that was cut off, which `datasets` may not notice."""
    if file.suffix != ".tar":
        return
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 1024))
        end = stream.read()
    if not end or any(end):
        raise ValueError("the file is cut off: a tar ends in zeros. Download it again")


def from_json(kind: str, files: list[Path]) -> Iterator[dict]:
    """LLaVA lists. Images are files relative to a list's folder or, if zips or tars are named too,
    their members of the same name, with or without an archive's own top folder. Records then come
    in the order of the members, those without an image first.
    """
    lists = [file for file in files if file.suffix == ".json"]
    archives = [file for file in files if file.suffix != ".json"]
    if not lists:
        raise ValueError(f"json:{archives[0].name}: name a list, too, a file that ends in .json")
    waiting: dict[Path, list[dict]] = {}  # records by the member that is their image
    for file in lists:
        with naming(file):
            rows = json.loads(file.read_bytes())
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("the file has to be a list of LLaVA records")
        folder = Path() if archives else file.parent
        for row in rows:
            record = record_of(row, folder)
            images = record["image"]
            if not archives or not images:
                yield record
            elif len(images) > 1:
                yield record | {"error": "several images in an archive. Unpack the archive"}
            else:
                waiting.setdefault(images[0], []).append(record)
    yield from from_archives(archives, waiting)
    names = ", ".join(archive.name for archive in archives)
    for name, records in waiting.items():
        error = {"error": f"image {name} is in none of {names}"}
        yield from (record | error for record in records)


def from_archives(archives: list[Path], waiting: dict[Path, list[dict]]) -> Iterator[dict]:
    """The records whose image is a member of an archive; takes them out of `waiting`."""
    from datasets import StreamingDownloadManager

    for archive in archives:
        with naming(archive):
            for member, content in StreamingDownloadManager().iter_archive(str(archive)):
                name = Path(member)
                if name not in waiting:
                    name = Path(*name.parts[1:])  # without the archive's own top folder
                if name not in waiting:
                    continue
                image = content.read(LARGEST + 1)
                if len(image) > LARGEST:  # a few MB of a zip can hold many GB of zeros
                    raise ValueError(f"{member}: more than {LARGEST:,} bytes. Take it out")
                yield from (record | {"image": image} for record in waiting.pop(name))


def from_pdf(kind: str, files: list[Path]) -> Iterator[dict]:
    """Each page of each PDF as an image, and the text on it as the answer."""
    from pypdfium2 import PdfDocument, PdfiumError

    pdfs = [file for file in files if file.suffix.lower() == ".pdf"]
    if not pdfs:
        raise ValueError("found no PDF: give a folder of PDFs, or files whose names end in .pdf")
    for file in pdfs:
        try:
            for number, page in enumerate(PdfDocument(file), 1):
                text = page.get_textpage().get_text_bounded().replace("\r\n", "\n")
                text = text.replace("\x02", "-\n").strip()  # pdfium's mark in a hyphenated word
                record = record_of({"id": f"{file.name}#page={number}", "txt": text}, file.parent)
                record["image"] = partial(draw, page)  # called when the image is needed
                if not text:
                    record["error"] = f"{file}: this page has no text"
                yield record
        except PdfiumError as error:
            yield {"id": file.name, "error": f"{file}: {error}"}


def draw(page: Any) -> bytes:
    """A PDF's page as PNG, its long side 1,344 pixels (pdfium rounds up)."""
    image = page.render(scale=1343.9 / max(page.get_size())).to_pil()
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


READERS = {"json": from_json, "parquet": from_tables, "webdataset": from_tables, "pdf": from_pdf}


def read(kind: str, where: str) -> Iterator[dict]:
    """The records of the files of WHERE, by the reader of their KIND."""
    return READERS[kind](kind, locate(where))
