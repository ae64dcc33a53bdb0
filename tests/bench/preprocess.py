"""PERFORMANCE C1, C2: image -> base view and tiles, against transformers' fast processor.

    python tests/bench/preprocess.py

Ten sizes, grids up to 6x6, R = 384: from a PIL image, and from the bytes of a JPEG file. Ours are
uint8 (the device normalises them); the peer's float32 are turned back to compare: both resize with
bicubic antialiasing, the peer's padded canvas included.
"""

import io
import sys
from math import exp, log
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from transformers import LlavaOnevisionImageProcessorFast, logging

sys.path.insert(0, str(Path(__file__).parent))
from contest import Row, race, ratio  # noqa: E402

from nanollava.anyres import Visual, cut_views, layout, open_image, parse_grids  # noqa: E402

R, SIDE = 384, 27
logging.set_verbosity_error()
SIZES = [(320, 240), (640, 480), (480, 640), (800, 600), (1024, 768), (768, 1366), (1920, 1080),
         (1654, 2339), (3000, 1000), (4000, 3000)]  # fmt: skip
PHOTO = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")
VISUAL = Visual("6x6", max_visual_tokens="37T")


def mean(ratios: list[float]) -> float:
    """Their geometric mean."""
    return exp(sum(map(log, ratios)) / len(ratios))


def main() -> list[Row]:
    """The rows of C1 and C2."""
    pinpoints = [[b * R, a * R] for a, b in parse_grids(VISUAL.max_grid)]
    process = LlavaOnevisionImageProcessorFast(
        size={"height": R, "width": R}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip

    def theirs(image: Image.Image) -> torch.Tensor:
        return process(images=image, return_tensors="pt")["pixel_values"][0]

    def ours(image: Image.Image) -> torch.Tensor:
        return cut_views(image, layout(image.size, VISUAL, R, SIDE))

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        error = ((a + 1) * 127.5 - b).abs()
        return a.shape == b.shape and float(error.max()) <= 2 and float(error.mean()) <= 0.05

    whole, pixels, files = Image.open(PHOTO).convert("RGB"), [], []
    for size in SIZES:
        image = whole.resize(size, Image.BICUBIC)
        image.save(file := io.BytesIO(), "JPEG", quality=90)
        data = file.getvalue()
        found = race({"peer": lambda: theirs(image), "ours": lambda: ours(image)}, same)
        pixels.append(ratio(found, "peer", "ours"))
        read = {"peer": lambda: theirs(Image.open(io.BytesIO(data)).convert("RGB")),
                "ours": lambda: ours(open_image(data))}  # fmt: skip
        files.append(ratio(race(read, same), "peer", "ours"))
        print(f"{size[0]}x{size[1]}: {pixels[-1]:.2f}x from pixels, {files[-1]:.2f}x from a JPEG")
    low, high = np.min(pixels), np.max(pixels)
    return [
        Row("C1 PIL image -> views", mean(pixels), "x", 2.5, note=f"{low:.2f} to {high:.2f}"),
        Row("C1 the least of ten sizes", low, "x", 1.2),
        Row("C2 JPEG bytes -> views", mean(files), "x", 1.8, note=f"least {min(files):.2f}"),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
