"""PERFORMANCE C1, C2: image -> base view and tiles, against transformers' fast processor.

    python tests/bench/preprocess.py

Ten sizes, grids up to 6x6, R = 384: from a PIL image, and from the bytes of a JPEG file. Ours are
uint8 (the device normalises them); the peer's float32 are turned back to compare: both resize with
bicubic antialiasing, the peer's padded canvas included.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import matplotlib
import torch
from PIL import Image
from transformers import LlavaOnevisionImageProcessorFast, logging

sys.path.insert(0, str(Path(__file__).parent))
from contest import Row, race, ratio  # noqa: E402

from nanollava.anyres import Visual, cut_views, layout, open_image, parse_grids  # noqa: E402

R, SIDE = 384, 27
logging.set_verbosity_error()
SIZES = [
    (320, 240),
    (640, 480),
    (480, 640),
    (800, 600),
    (1024, 768),
    (768, 1366),
    (1920, 1080),
    (1654, 2339),
    (3000, 1000),
    (4000, 3000),
]
PHOTO = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")
VISUAL = Visual("6x6", max_visual_tokens="37T")


def ours(image: Image.Image) -> torch.Tensor:
    """uint8[N, 3, R, R]."""
    return cut_views(image, layout(image.size, VISUAL, R, SIDE))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The peer's normalised views against ours: at most 2/255 off, 0.05/255 on average."""
    error = ((a + 1) * 127.5 - b).abs()
    return a.shape == b.shape and float(error.max()) <= 2 and float(error.mean()) <= 0.05


def compare(image: Image.Image, theirs: Callable[[Image.Image], torch.Tensor]) -> list[float]:
    """How many times as fast ours is, from pixels and from the bytes of a file."""
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    data = file.getvalue()
    pixels = {"peer": lambda: theirs(image), "ours": lambda: ours(image)}
    files = {
        "peer": lambda: theirs(Image.open(io.BytesIO(data)).convert("RGB")),
        "ours": lambda: ours(open_image(data)),
    }
    return [ratio(race(ways, same), "peer", "ours") for ways in (pixels, files)]


def main() -> list[Row]:
    """The rows of C1 and C2."""
    pinpoints = [[b * R, a * R] for a, b in parse_grids(VISUAL.max_grid)]
    process = LlavaOnevisionImageProcessorFast(
        size={"height": R, "width": R},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=pinpoints,
    )
    whole, found = Image.open(PHOTO).convert("RGB"), []
    for size in SIZES:
        image = whole.resize(size, Image.BICUBIC)
        found.append(compare(image, lambda x: process(x, return_tensors="pt")["pixel_values"][0]))
        print("{}x{}: {:.2f}x from pixels, {:.2f}x from a JPEG".format(*size, *found[-1]))
    pixels, files = zip(*found, strict=True)
    return [
        Row("C1 PIL image -> views", geometric_mean(pixels), "x", 2.5),
        Row("C1 the least of ten sizes", min(pixels), "x", 1.2),
        Row(
            "C2 JPEG bytes -> views",
            geometric_mean(files),
            "x",
            1.8,
            note=f"least {min(files):.2f}x",
        ),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
