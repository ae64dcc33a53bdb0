"""A source of your own, whole: `path: ./own_source.py:squares` in a recipe's mix.

Yield records; images stay the bytes that they are (PNG, JPEG, WebP, ...), a list of them for
several pictures, None for text alone. One `<image>` in the conversation for each picture.
"""

import io
from collections.abc import Iterator

from PIL import Image


def squares(split: str, count: int, seed: int) -> Iterator[dict]:
    """Plain pictures in `count` colours, each with one question."""
    for i in range(count):
        name = ("red", "green", "blue")[(i + seed) % 3]
        Image.new("RGB", (96, 96), name).save(file := io.BytesIO(), "PNG")
        yield {
            "id": f"squares-{split}-{i}",
            "image": file.getvalue(),
            "source": "squares",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour is this?"},
                {"from": "gpt", "value": name},
            ],
        }
