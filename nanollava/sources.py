"""Sources: where records come from. Every source yields LLaVA records.

    {"id": "a-7", "image": bytes | path | [bytes | path, ...] | None, "source": "a",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

The path of a source has one of two forms. KIND:WHERE names files, here or on the hub, in one of the
formats of KINDS (extras/readers.py). FILE.py:function is for data of your own: `path:
./my.py:photos` calls `photos(split=..., count=..., seed=...)`, which yields records;
`recipes/nano/own_source.py` is a complete example. Images keep their original bytes.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from nanollava.extras import readers

# `import_file` is for a user's file that needs another one by its path.
from nanollava.extras.user_files import function_of, import_file  # noqa: F401
from nanollava.recipe import Source

KINDS = tuple(readers.READERS)


def files_here(path: str) -> list[Path]:
    """The local files that a source's content depends on: FILE.py and the Python files next to it,
    or the source's own files. Files on the hub are not listed.
    """
    kind, _, where = path.partition(":")
    if kind in KINDS:
        return [] if where.startswith("hf://") else readers.locate(where)
    # FILE.py may import any of its neighbours: a change in one of them changes the source.
    file = Path(path.rpartition(":")[0])
    return sorted(file.parent.glob("*.py")) if file.suffix == ".py" else []


def open_source(source: Source, seed: int) -> Iterator[dict]:
    """The records of a source as its reader or function yields them."""
    kind, _, where = source.path.partition(":")
    if kind in KINDS:
        return readers.read(kind, where)
    # A generator may take `count` as a hint: `records` stops it after that many.
    if ".py:" in source.path:
        return function_of(source.path)(split=source.split, count=source.samples, seed=seed)
    kinds = ", ".join(f"{name}:FILE" for name in KINDS)
    near = "".join(f"; did you mean {name}:?" for name in get_close_matches(kind, KINDS, 1))
    raise ValueError(f"{source.path!r}: write FILE.py:function or one of {kinds}{near}")


def records(source: Source, seed: int) -> Iterator[dict]:
    """The first `source.samples` records of a source, or all of them.

    A human turn that is only <image> gets the source's prompt.
    """
    # A page of a PDF comes without a question, and its answer is the page's text.
    default = "Read the text in the image." if source.path.startswith("pdf:") else ""
    prompt = source.prompt or default
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
    # A malformed conversation is left as it is: the check of each record reports it.
    for turn in turns if isinstance(turns, (list, tuple)) else ():
        if isinstance(turn, dict) and str(turn.get("value")).strip() == "<image>":
            turn["value"] = f"<image>\n{prompt}"


def images_of(record: dict) -> list[bytes]:
    """The bytes of a record's image files; empty for a record of text only.

    Raises ValueError or OSError for an image that is missing, and for a record that its reader
    found to be damaged.
    """
    if "error" in record:
        raise ValueError(record["error"])
    # `image` is missing for records of text only; otherwise it is one image or a list of images.
    image = record.get("image") or []
    images = image if isinstance(image, (list, tuple)) else [image]
    return [image_bytes(image) for image in images]


def image_bytes(image: object) -> bytes:
    """The bytes of one image file, given as bytes, as a path, or as a function that makes them."""
    if callable(image):
        image = image()  # a page of a PDF is drawn only when it is needed
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    raise ValueError(f"image is {type(image).__name__}; give bytes, a path, or a list of them")
