"""Ten pages that the nano world did not draw, with questions as somebody typed them.

`path: ./nano/handmade.py:handmade` in a recipe's tasks. `handmade/make.sh` prints nine from HTML
with Chromium, in Liberation faces, and draws one with ImageMagick as a JPEG.
"""

from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("handmade")
ASKED = {  # page: question, true last word of an answer
    "invoice.png": ("how much tax do I have to pay?", "305"),
    "table.png": ("Which gate is it?", "36"),
    "dark.png": ("what is the shop number", "903"),
    "serif.png": ("Please tell me the loan.", "750"),
    "mono.png": ("give me the ward", "531"),
    "chart.png": ("What's the value of the fund bar?", "64"),
    "scene.png": ("What do you see at the middle right?", "square"),
    "list.png": ("which number is next to the red circle?", "317"),
    "big.png": ("can you read the item?", "275"),
    "magick.jpg": ("Read me the mile number", "680"),
}


def handmade(split: str, count: int, seed: int) -> Iterator[dict]:
    """The ten pages, the same in every split and for every seed."""
    for name, (question, answer) in list(ASKED.items())[:count]:
        yield {
            "id": name,
            "image": (FOLDER / name).read_bytes(),
            "source": "handmade",
            "answer": answer,
            "conversations": [
                {"from": "human", "value": "<image>\n" + question},
                {"from": "gpt", "value": answer},
            ],
        }
