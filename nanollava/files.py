"""Files: written whole or not at all, and plain advice when a download fails or a disk is full."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PACKAGE = Path(__file__).parent
# The hub's own errors and their parents, which are those of the HTTP library. Which library that is
# depends on the version of huggingface_hub, so its errors cannot be imported by name here.
NETWORK = (OSError, RuntimeError, HfHubHTTPError, *HfHubHTTPError.__bases__)


@contextmanager
def write_atomically(file: Path) -> Iterator[Path]:
    """Yield a path to write to; it is renamed to `file` at the end, so nobody reads half a file."""
    half = file.with_name(f"{file.name}.half")
    yield half
    os.replace(half, file)  # not reached after an error: `file` stays as it was


@contextmanager
def explain_full_disk(folder: Path, half: str = "") -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one OSError; deletes the folder `half`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors and torch report a full disk without its errno: look at the disk itself.
        if getattr(error, "errno", 0) != errno.ENOSPC and shutil.disk_usage(folder).free > 2**20:
            raise
        shutil.rmtree(half, ignore_errors=True)  # other programs on this disk need space, too
        message = f"no space left in {folder}. Free some and run it again"
        raise OSError(errno.ENOSPC, message) from error


@contextmanager
def explain_failed_download(what: str, key: str) -> Iterator[None]:
    """Turn a failed download of `what` into a FileNotFoundError with advice.

    `key` is the recipe's key that takes a local copy instead.
    """
    try:
        yield
    except NETWORK as error:
        # A local path that does not exist, or a full disk: neither is about the network.
        if type(error) is FileNotFoundError or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        # The first sentence of the first line; the rest repeats addresses and request numbers.
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise FileNotFoundError(
            f"{what} cannot be downloaded: {reason}. Look at huggingface.co/{what.split(':')[0]}: "
            "it may have a new name, or you must accept its terms (and run `hf auth login`). "
            f"Without a network, give a copy's path as {key}, or set HF_HOME to a cache that has it"
        ) from error


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ValueError for a damaged one."""
    try:
        return load_file(file)
    except SafetensorError as error:
        problem = f"{file} is not a whole safetensors file ({error})"
        raise ValueError(f"{problem}; copy it again") from error


def repository_file(name: str) -> Path:
    """A file or folder of recipes/ that commands need; an installed package has its own copy."""
    installed = PACKAGE / "recipes" / name
    return installed if installed.exists() else PACKAGE.parent / "recipes" / name


def weights_digest(folder: Path) -> str:
    """A hash of the weights in a folder, whether they are in one file or in several."""
    digest = hashlib.sha256()
    # Sorted, because a folder has no order of its own.
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            hashlib.file_digest(weights, lambda: digest)  # goes on with this digest
    return digest.hexdigest()[:12]


def read_lines(file: Path) -> list[dict]:
    """The objects of a .jsonl file; a line that was torn by a kill is skipped."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def add_line(file: Path, line: dict) -> None:
    """Append an object to a .jsonl file, on a line of its own even after a torn one."""
    with file.open("ab+") as out:
        # Half a line that a kill left behind is closed first, or this line would be lost with it.
        out.seek(-min(1, out.tell()), os.SEEK_END)
        is_torn = out.read() not in (b"", b"\n")
        out.write(("\n" * is_torn + json.dumps(line) + "\n").encode())
