"""What comes from the Hugging Face hub, and what to do where it cannot be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError


@contextmanager
def fetching(what: str, key: str) -> Iterator[None]:
    """Turn a failed download of `what` into advice: which `key` of the recipe takes a local copy.

    Raises FileNotFoundError.
    """
    try:
        yield
    except (OSError, RuntimeError, HfHubHTTPError) as error:
        door = (
            f"its owner asks for consent: accept the terms at huggingface.co/{what.split(':')[0]}, "
            "then `hf auth login`"
            if isinstance(error, GatedRepoError)
            else "without a network, fetch it where there is one and give the copy's path as "
            f"{key}, or set HF_HOME to a cache that has it"
        )
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{what} could not be had: {reason:.200}; {door}") from error
