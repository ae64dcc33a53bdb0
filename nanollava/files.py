"""Files: what to do where a download fails or a disk is full, and none half written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PACKAGE = Path(__file__).parent
# The hub's own errors and, by their parents, those of the HTTP library, which changes by version.
NETWORK = (OSError, RuntimeError, HfHubHTTPError, *HfHubHTTPError.__bases__)


@contextmanager
def write_atomically(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` when that is done: nobody reads half of it."""
    half = file.with_name(f"{file.name}.half")
    yield half
    os.replace(half, file)


@contextmanager
def explain_full_disk(folder: Path, half: str = "") -> Iterator[None]:
    """Tell in one line that the disk is full, whatever a library raises then; deletes `half`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", 0) != errno.ENOSPC and shutil.disk_usage(folder).free > 2**20:
            raise
        shutil.rmtree(half, ignore_errors=True)  # others need room, too
        told = f"no space left in {folder}: make room, run it again"
        raise OSError(errno.ENOSPC, told) from error


@contextmanager
def explain_failed_download(what: str, key: str) -> Iterator[None]:
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
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise FileNotFoundError(f"{what} could not be had: {reason}; {door}") from error


def load_tensors(file: str | Path) -> dict[str, Tensor]:
    """A safetensors file; raises ValueError for half of one."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error


def repository_file(name: str) -> Path:
    """A file or folder of recipes/ that commands need; an installed package has its own copy."""
    installed, checkout = PACKAGE / "recipes" / name, PACKAGE.parent / "recipes" / name
    return installed if installed.exists() else checkout
