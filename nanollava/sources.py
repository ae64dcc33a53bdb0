"""Sources: where records come from. Every source yields LLaVA records.

    {"id": "a-7", "image": bytes | path | [bytes | path, ...] | None, "source": "a",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

A source's path is either KIND:WHERE, files of one of KINDS here or on the hub (extras/readers.py),
or FILE.py:function for data of your own: `path: ./my.py:photos` calls `photos(split=, count=,
seed=)`. `recipes/nano/own_source.py` is a complete example. Images keep their original bytes.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from nanollava.extras import readers
from nanollava.extras.user_files import function_of, import_file

__all__ = ["files_here", "function_of", "images_of", "import_file", "records"]
KINDS = ("json", "parquet", "webdataset", "pdf")


def files_here(path: str) -> list[Path]:
    """The local files that a source's content depends on: FILE.py and its neighbours, or the
    source's own files. Files on the hub are not listed.
    """
    kind, _, where = path.partition(":")
    if kind in KINDS:
        return [] if where.startswith("hf://") else readers.locate(where)
    file = Path(path.rpartition(":")[0])
    return sorted(file.parent.glob("*.py")) if file.suffix == ".py" else []


def open_source(source: Any, seed: int) -> Iterator[dict]:
    """The records of a recipe's Source as its reader or function yields them."""
    kind, _, where = source.path.partition(":")
    if kind in KINDS:
        return readers.read(kind, where)
    if ".py:" in source.path:
        function = function_of(source.path)
        return function(split=source.split, count=source.samples, seed=seed)
    kinds = ", ".join(f"{name}:FILE" for name in KINDS)
    near = "".join(f" Did you mean {name}:?" for name in get_close_matches(kind, KINDS, 1))
    raise ValueError(
        f"source path {source.path!r} is neither FILE.py:function nor one of {kinds}.{near}"
    )


def records(source: Any, seed: int) -> Iterator[dict]:
    """At most `samples` records of a recipe's Source; a human turn that is only <image> gets the
    source's prompt.
    """
    prompt = source.prompt
    if not prompt and source.path.startswith("pdf:"):
        prompt = "Read the text in the image."
    for i, record in enumerate(islice(open_source(source, seed), source.samples or None)):
        if not isinstance(record, dict):
            raise ValueError(f"{source.path} yielded {record!r:.60}; expected a record, a dict")
        record.setdefault("id", str(i))
        if prompt:
            add_prompt(record, prompt)
        yield record


def add_prompt(record: dict, prompt: str) -> None:
    """Put `prompt` after <image> in each human turn that has no words of its own."""
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, (list, tuple)) else ():
        if isinstance(turn, dict) and str(turn.get("value")).strip() == "<image>":
            turn["value"] = f"<image>\n{prompt}"


def images_of(record: dict) -> list[bytes]:
    """The bytes of a record's image files; empty for a record of text only.

    Raises ValueError or OSError for an image that is missing or was found to be damaged.
    """
    if "error" in record:
        raise ValueError(record["error"])
    image = record.get("image") or []
    images = image if isinstance(image, (list, tuple)) else [image]
    images = [x() if callable(x) else x for x in images]  # a PDF's page is drawn when it is needed
    for x in images:
        if not isinstance(x, (bytes, str, Path)):
            kind = type(x).__name__
            raise ValueError(f"image is {kind}; expected a file's bytes, a path, or a list of them")
    return [x if isinstance(x, bytes) else Path(x).read_bytes() for x in images]
