"""Films of the nano world: several frames a question, each one base view. (Here, and not in the
world's folder, because a file more there is another content of all its sources.)

`films`: four scenes, and whether a thing is in one of them, asked as of a single picture: a model
that has seen single pictures alone can know what is wanted.
"""

from collections.abc import Iterator
from pathlib import Path

from nanollava.sources import import_file

world = import_file(f"{Path(__file__).parents[1]}/world.py")
pages = world.pages


def films(split: str, count: int, seed: int) -> Iterator[dict]:
    """An evaluation source: is the thing in any of four frames?"""
    for name, rng in world._drawn("films", split, count, seed):
        frames = [pages.layout(rng, "scene", split) for _ in range(4)]
        shown = {thing for page in frames for _, thing in page.facts}
        there = rng.random() < 0.5
        thing = rng.choice(sorted(shown) if there else sorted({*pages.OBJECTS} - shown))
        answer = "yes" if there else "no"
        turn = (world.ask(None, "presence", world.a_(thing)), answer)
        yield world._record(name, [world.png(page) for page in frames], [turn], answer=answer)
