"""Sources: where records come from. Every source yields LLaVA records.

    {"id": "a-7", "image": bytes | path | [bytes | path, ...] | None, "source": "a",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

A path is KIND:WHERE, a row of READERS and files here or on the hub (`hub.py` says how they are
written). Your own data is a Python file: `path: ./my.py:photos` calls `photos(split=, count=,
seed=)` (`recipes/nano/own_source.py` is a whole one). Images stay the bytes that they were.
"""

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from nanollava.hub import HUB, locate, reading

IMAGES = ("image", "jpg", "jpeg", "png", "webp")  # columns, of which a row fills one
ANSWERS = ("conversations", "ground_truth", "txt")  # LLaVA, SynthDOG, captions: a row has one


def import_file(path: str) -> ModuleType:
    """Import FILE.py by its path, with the other files of its folder importable."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file (in a recipe, begin local paths with ./)")
    name = f"nanollava_door_{file.stem}"
    if name not in sys.modules or sys.modules[name].__file__ != str(file):
        spec = importlib.util.spec_from_file_location(name, file)
        sys.path.insert(0, str(file.parent))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]  # half a module must not be found by the next call
            raise
        finally:
            sys.path.remove(str(file.parent))
    return sys.modules[name]


def function_of(path: str):
    """'FILE.py:function' -> the function; the error lists what the file has instead."""
    file, _, name = path.rpartition(":")
    module = import_file(file)
    if not hasattr(module, name):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise ValueError(f"{file} has no function {name!r}; it has {', '.join(known)}")
    return getattr(module, name)


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
            if kind == "webdataset" and end.seek(-1024, 2) and any(end.read()):
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
    waiting: dict[Path, list[dict]] = {}
    for file in (file for file in files if file.suffix == ".json"):
        with reading(file):
            rows = json.loads(file.read_bytes())
            if not all(isinstance(row, dict) for row in rows):
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
                image = content.read() if name in waiting else b""
                yield from (record | {"image": image} for record in waiting.pop(name, ()))
    for name, lost in waiting.items():
        error = f"image {name} is in none of {', '.join(box.name for box in boxes)}"
        yield from (record | {"error": error} for record in lost)


def from_pdf(kind: str, files: list[Path]) -> Iterator[dict]:
    """Each page of each PDF as an image, and the text that it holds as the answer."""
    from pypdfium2 import PdfDocument, PdfiumError

    for file in (file for file in files if file.suffix.lower() == ".pdf"):
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


def files_here(path: str) -> list[Path]:
    """What a source depends on here: FILE.py and its neighbours, or its files but the hub's."""
    kind, _, where = path.partition(":")
    if kind in READERS:
        return [] if where.startswith(HUB) else locate(where)
    file = Path(path.rpartition(":")[0])
    return sorted(file.parent.glob("*.py")) if file.suffix == ".py" else []


def records(source: Any, seed: int) -> Iterator[dict]:
    """At most `samples` records of a recipe's Source; a bare <image> turn gets its prompt."""
    kind, _, where = source.path.partition(":")
    if kind in READERS:
        found = READERS[kind](kind, locate(where))
    elif ".py:" in source.path:
        make = function_of(source.path)
        found = make(split=source.split, count=source.samples, seed=seed)
    else:
        doors = f"FILE.py:function or one of {', '.join(f'{name}:FILE' for name in READERS)}"
        near = "".join(f"; did you mean {name}:?" for name in get_close_matches(kind, READERS, 1))
        raise ValueError(f"source path {source.path!r}: write {doors}{near}")
    prompt = source.prompt or ("Read the text in the image." if kind == "pdf" else "")
    for i, record in enumerate(islice(found, source.samples or None)):
        if not isinstance(record, dict):
            raise ValueError(f"{source.path} yielded {record!r:.60}; expected a record (a dict)")
        record.setdefault("id", str(i))
        for turn in record.get("conversations") or () if prompt else ():
            if isinstance(turn, dict) and str(turn.get("value")).strip() == "<image>":
                turn["value"] = f"<image>\n{prompt}"
        yield record


def images_of(record: dict) -> list[bytes]:
    """A record's images as they are in their files, none for text only.

    Raises ValueError or OSError for what is not there or was found to be wrong.
    """
    if "error" in record:
        raise ValueError(record["error"])
    image = record.get("image") or []
    images = image if isinstance(image, (list, tuple)) else [image]
    images = [x() if callable(x) else x for x in images]  # a page is drawn when it is wanted
    odd = [type(x).__name__ for x in images if not isinstance(x, (bytes, str, Path))]
    if odd:
        raise ValueError(f"image is {odd[0]}; expected a file's bytes, a path, or a list of them")
    return [x if isinstance(x, bytes) else Path(x).read_bytes() for x in images]
