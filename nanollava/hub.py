"""The hub: what to do where a download fails, and whether it would fit on the disk."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

# The hub's own errors and, by their parents, those of the HTTP library, which changes by version.
NETWORK = (OSError, RuntimeError, HfHubHTTPError, *HfHubHTTPError.__bases__)


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
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise FileNotFoundError(f"{what} could not be had: {reason}; {door}") from error


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
