"""Sources: where records come from. One row each; every row yields LLaVA records.

    {"id": "a-7", "image": bytes | path | [bytes | path, ...] | None, "source": "a",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

Your own data is a Python file: `path: ./my.py:photos` calls `photos(split=, count=, seed=)`, which
yields such records (`recipes/nano/own_source.py` is a whole one). Images stay the bytes they were.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Source:
    """One source: the recipe's keys of it."""

    path: str  # FILE.py:function or json:FILE
    split: str = "train"
    samples: int = 0  # 0: all there are
    prompt: str = ""  # put after <image> in a human turn that has no words


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


def from_function(source: Source, seed: int) -> Iterator[dict]:
    """FILE.py:function, the door for your own data."""
    make = function_of(source.path)
    yield from make(split=source.split, count=source.samples, seed=seed)


def from_json(source: Source, seed: int) -> Iterator[dict]:
    """json:FILE, a LLaVA list of records whose images are paths relative to FILE's folder."""
    file = Path(source.path.removeprefix("json:"))
    for i, row in enumerate(json.loads(file.read_text())):
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        yield {"id": str(row.get("id", i)), "source": row.get("data_source", ""),
               "image": [file.parent / name for name in names],
               "conversations": row.get("conversations")}  # fmt: skip


READERS = {"json": from_json}


def records(source: Source, seed: int) -> Iterator[dict]:
    """At most `samples` records of a source; a bare <image> turn gets the source's prompt."""
    kind = source.path.split(":")[0]
    read = READERS.get(kind, from_function)
    if read is from_function and ".py:" not in source.path:
        raise ValueError(
            f"source path {source.path!r}: write FILE.py:function or one of "
            f"{', '.join(f'{k}:FILE' for k in READERS)}"
        )
    for i, record in enumerate(islice(read(source, seed), source.samples or None)):
        if not isinstance(record, dict):
            raise ValueError(f"{source.path} yielded {record!r:.60}; expected a record (a dict)")
        record.setdefault("id", str(i))
        for turn in record.get("conversations") or () if source.prompt else ():
            if isinstance(turn, dict) and str(turn.get("value")).strip() == "<image>":
                turn["value"] = f"<image>\n{source.prompt}"
        yield record


def images_of(record: dict) -> list[bytes]:
    """A record's images as they are in their files, none for text only; OSError if one is gone."""
    image = record.get("image") or []
    images = image if isinstance(image, (list, tuple)) else [image]
    odd = [type(x).__name__ for x in images if not isinstance(x, (bytes, str, Path))]
    if odd:
        raise ValueError(f"image is {odd[0]}; expected a file's bytes, a path, or a list of them")
    return [x if isinstance(x, bytes) else Path(x).read_bytes() for x in images]
