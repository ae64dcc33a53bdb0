"""Sources: where records come from. Every source yields LLaVA records.

    {"id": "a-7", "image": bytes | path | [bytes | path, ...] | None, "source": "a",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

A path is KIND:WHERE, one of KINDS and files here or on the hub (`recipes/tools/readers.py`). Your
own data is a Python file: `path: ./my.py:photos` calls `photos(split=, count=, seed=)`
(`recipes/nano/own_source.py` is a whole one). Images stay the bytes that they were.
"""

import importlib.util
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("json", "parquet", "webdataset", "pdf")
TOOLS = Path(__file__).parents[1] / "recipes" / "tools"  # what stands beside the model's path


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
        own = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")
               and getattr(v, "__module__", "") == module.__name__]  # fmt: skip
        raise ValueError(f"{file} has no function {name!r}; it has {', '.join(own)}")
    return getattr(module, name)


def tool(name: str) -> ModuleType:
    """A file of recipes/tools, by its name."""
    return import_file(f"{TOOLS / name}.py")


def files_here(path: str) -> list[Path]:
    """What a source depends on here: FILE.py and its neighbours, or its files but the hub's."""
    kind, _, where = path.partition(":")
    if kind in KINDS:
        return [] if where.startswith("hf://") else tool("readers").locate(where)
    file = Path(path.rpartition(":")[0])
    return sorted(file.parent.glob("*.py")) if file.suffix == ".py" else []


def records(source: Any, seed: int) -> Iterator[dict]:
    """At most `samples` records of a recipe's Source; a bare <image> turn gets its prompt."""
    kind, _, where = source.path.partition(":")
    if kind in KINDS:
        found = tool("readers").read(kind, where)
    elif ".py:" in source.path:
        make = function_of(source.path)
        found = make(split=source.split, count=source.samples, seed=seed)
    else:
        doors = f"FILE.py:function or one of {', '.join(f'{name}:FILE' for name in KINDS)}"
        near = "".join(f"; did you mean {name}:?" for name in get_close_matches(kind, KINDS, 1))
        raise ValueError(f"source path {source.path!r}: write {doors}{near}")
    prompt = source.prompt or ("Read the text in the image." if kind == "pdf" else "")
    for i, record in enumerate(islice(found, source.samples or None)):
        if not isinstance(record, dict):
            raise ValueError(f"{source.path} yielded {record!r:.60}; expected a record (a dict)")
        record.setdefault("id", str(i))
        turns = record.get("conversations") if prompt else ()
        for turn in turns if isinstance(turns, (list, tuple)) else ():
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
