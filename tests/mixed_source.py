"""A source for the training tests: text-only records and pictures of several shapes."""

import io
import random

import numpy as np
from PIL import Image

SIZES = ((48, 48), (96, 96), (150, 60), (60, 150), (192, 192))


def mixed(split: str, count: int, seed: int):
    """`count` records, 60% of them without an image."""
    rng = random.Random(f"{split}{seed}")
    for i in range(count):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        answer = {"from": "gpt", "value": " ".join([str(a)] * rng.randint(1, 12))}
        if rng.random() < 0.6:
            image, question = None, f"say {a} and {b}" * rng.randint(1, 9)
        else:
            pixels = np.full((*rng.choice(SIZES)[::-1], 3), (a * 2, b * 2, 99), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            image, question = file.getvalue(), "<image>\nwhat is the value?"
        yield {
            "id": f"{split}-{i}",
            "image": image,
            "source": "mixed",
            "conversations": [{"from": "human", "value": question}, answer],
        }
