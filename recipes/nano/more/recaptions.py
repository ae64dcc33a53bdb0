"""Re-captions of the nano world: what the committed model in demo/nano says about the images that
raw captions go with. `python -m nanollava recaption` does the same for any source and model. Its
shards do not know when that model is trained anew: delete data/*/recaptions-* then.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nanollava.extras import recaption
from nanollava.generate import load
from nanollava.sources import import_file

PROMPT = "Describe the image in detail."  # as the nano model knows it
HERE = Path(__file__).parents[1]
world = import_file(f"{HERE}/world.py")


def recaptions(split: str, count: int, seed: int) -> Iterator[dict]:
    """The images of `short_captions`, described anew; fewer than `count` where some are no good."""
    assistant = load(HERE.parents[1] / "demo/nano")
    found = world.short_captions(split, count, seed)
    while some := [*islice(found, recaption.CHUNK)]:
        kept, _ = recaption.describe(assistant, some, PROMPT, 256, "re-captions")
        for row in kept:
            talk = row["conversations"]
            yield {"id": row["id"], "image": row["image"]["bytes"], "conversations": talk,
                   "source": "recaptions"}  # fmt: skip
