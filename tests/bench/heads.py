"""What it saves to read an image once for several questions: demo/nano, six questions a page.

    python tests/bench/heads.py

240 questions at 3x3 and 10T, the same answers asserted; one thread, CPU time, in turns.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from nanollava.anyres import Visual  # noqa: E402
from nanollava.evaluate import answer_all  # noqa: E402
from nanollava.generate import Assistant, load  # noqa: E402
from nanollava.prompts import Turn  # noqa: E402
from nanollava.sources import import_file  # noqa: E402

WORDS = ("tax", "total", "name", "date", "city", "price")


def main() -> None:
    """Print both times."""
    torch.set_num_threads(1)
    assistant, world = load(ROOT / "demo/nano"), import_file(f"{ROOT}/recipes/nano/world.py")
    pages = [record["image"] for record in world.doc("test", 40, 0)]
    items = [([Turn("user", f"<image>\nwhat is the {word}?", 1)], [page])
             for page in pages for word in WORDS]  # fmt: skip
    writer = assistant.model.writer(Visual(max_grid="3x3", max_visual_tokens="10T"))
    ways = {"alone": lambda *_: None, "shared": Assistant._read_heads}
    took, said = {name: [] for name in ways}, {}
    for _ in range(3):
        for name, way in ways.items():
            Assistant._read_heads, start = way, time.process_time()
            said[name] = answer_all(assistant, writer, items, 16, name)
            took[name].append(time.process_time() - start)
    assert said["alone"] == said["shared"], "the answers differ"
    for name, times in took.items():
        print(f"{name}: {median(times):.2f} CPU s for {len(items)} questions")


if __name__ == "__main__":
    main()
