"""Sources: where records come from. Every source yields LLaVA records.

    {"id": "a-7", "image": bytes | path | [bytes | path, ...] | None, "source": "a",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}, ...]}

A source's path is either KIND:WHERE, files of one of KINDS here or on the hub (extras/readers.py),
or FILE.py:function for data of your own: `path: ./my.py:photos` calls `photos(split=, count=,
seed=)`. `recipes/nano/own_source.py` is a complete example. Images keep their original bytes.
"""

import builtins
import hashlib
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from nanollava.extras import readers

KINDS = ("json", "parquet", "webdataset", "pdf")
USER_PACKAGE = "nanollava_user_"  # and a hash: the package that stands for a user's folder


def import_file(path: str | Path) -> ModuleType:
    """Import a user's FILE.py, which may import the other files of its folder.

    Each folder is a package of its own, so that two users' files of one name, or a user's and ours,
    never take each other's place. Raises FileNotFoundError where there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file. In a recipe, begin local paths with ./")
    file = file.resolve()
    name = f"{package_of(file.parent)}.{file.stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, file, loader=UserLoader(name, str(file)))
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # the next call must not find half a module
            raise
    return sys.modules[name]


def package_of(folder: Path) -> str:
    """The name of the package that stands for a folder; it is made at the first call."""
    name = USER_PACKAGE + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return name


class UserLoader(SourceFileLoader):
    """Runs a user's file with an `import` that looks into the file's own folder first."""

    def exec_module(self, module: ModuleType) -> None:
        own_import = partial(import_neighbour, module.__name__.partition(".")[0])
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": own_import}
        super().exec_module(module)


class UserFinder(MetaPathFinder):
    """Finds the modules below a user's folder, so that UserLoader runs them too."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(USER_PACKAGE) or path is None:
            return None
        found = (FileFinder(place, (UserLoader, [".py"])).find_spec(name) for place in path)
        return next((spec for spec in found if spec is not None), None)


sys.meta_path.append(UserFinder)


def import_neighbour(
    package: str, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level=0
) -> ModuleType:
    """`__import__` for a user's file: `import pages` means the pages.py beside it, if there is one.

    As in a Python script, a neighbour comes before any installed package. Only this package's own
    name stays ours.
    """
    top = name.partition(".")[0]
    if level or top == "nanollava" or find_spec(f"{package}.{top}") is None:
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
    # Without a fromlist, `import a.b` binds a; `__import__` has returned the folder's package.
    return module if fromlist else sys.modules[f"{package}.{top}"]


def function_of(path: str) -> Any:
    """'FILE.py:function' -> the function; raises ValueError, listing the file's own functions."""
    file, _, name = path.rpartition(":")
    module = import_file(file)
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value)
            and not key.startswith("_")
            and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(f"{file} has no function {name!r}. It has {', '.join(own) or 'none'}")
    return getattr(module, name)


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
