"""What it saves to read an image once for several questions: demo/nano, six questions a page.

    python tests/bench/heads.py

240 questions at 3x3 and 10T, the same answers asserted; one thread, CPU time, in turns.
"""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from contest import Row, race, ratio, told  # noqa: E402

from nanollava.anyres import Visual  # noqa: E402
from nanollava.evaluate import answer_all  # noqa: E402
from nanollava.generate import EMPTY, Assistant, load  # noqa: E402
from nanollava.prompts import Turn  # noqa: E402
from nanollava.sources import import_file  # noqa: E402

WORDS = ("tax", "total", "name", "date", "city", "price")


def main() -> list[Row]:
    """What sharing saves."""
    assistant, world = load(ROOT / "demo/nano"), import_file(f"{ROOT}/recipes/nano/world.py")
    pages = [record["image"] for record in world.doc("test", 40, 0)]
    items = [
        ([Turn("user", f"<image>\nwhat is the {word}?", 1)], [page])
        for page in pages
        for word in WORDS
    ]
    writer = assistant.model.writer(Visual(max_grid="3x3", max_visual_tokens="10T"))
    shared = Assistant.prefill_shared_prefixes

    def answers(way: Callable) -> list:
        Assistant.prefill_shared_prefixes = way
        return answer_all(assistant, writer, items, 16, "questions")

    ways = {"alone": lambda: answers(lambda *_: EMPTY), "shared": lambda: answers(shared)}
    found = race(ways, rounds=3)
    what = f"{len(items)} questions, {len(WORDS)} a page, that read it once"
    return [Row(what, ratio(found, "alone", "shared"), note=told(found))]


if __name__ == "__main__":
    print(*main(), sep="\n")
