"""Files: here or on the Hugging Face hub, and what to do where one cannot be had.

WHERE is a file, a folder (all below it), a glob, or files of a dataset on the hub,
`hf://datasets/ORG/NAME/PATTERN`. `+` joins further ones, relative to the first one's folder or to
the dataset; one that begins with a slash is here all the same.
"""

import errno
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

HUB = "hf://datasets/"
# The hub's own errors and, by their parents, those of the HTTP library, which changes by version.
NETWORK = (OSError, RuntimeError, HfHubHTTPError, *HfHubHTTPError.__bases__)
BROKEN = (OSError, ValueError, EOFError, RuntimeError, zlib.error, tarfile.TarError,
          zipfile.BadZipFile)  # fmt: skip


@contextmanager
def fetching(what: str, key: str) -> Iterator[None]:
    """Turn a failed download of `what` into advice: which `key` of the recipe takes a local copy.

    Raises FileNotFoundError; that of a local path and a full disk's OSError stay as they are.
    """
    try:
        yield
    except NETWORK as error:
        if type(error) is FileNotFoundError or getattr(error, "errno", None) == errno.ENOSPC:
            raise  # a local path, or the disk
        door = (
            f"look at huggingface.co/{what.split(':')[0]}: it may have another name now, or ask "
            "for consent (accept its terms there, then `hf auth login`)"
            if isinstance(error, RepositoryNotFoundError)  # a gated one is such an error, too
            else "without a network, fetch it where there is one and give the copy's path as "
            f"{key}, or set HF_HOME to a cache that has it"
        )
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{what} could not be had: {reason:.200}; {door}") from error


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
    org, name, *rest = first.removeprefix(HUB).split("/")
    return f"{org}/{name}", ["/".join(rest), *others]


def locate(where: str) -> list[Path]:
    """The files of WHERE, each pattern's by name; the hub's are fetched or found in its cache.

    Where the hub is out of reach its cache is taken as it is, even if files are missing there.
    """
    (dataset, patterns), root, files = split_where(where), Path(), []
    if dataset:
        with fetching(f"datasets/{dataset}: {' + '.join(patterns)}", "its source's KIND:./path"):
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
        with fetching(dataset, ""):
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
