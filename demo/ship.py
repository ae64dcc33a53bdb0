"""Make a run small enough to ship: the model alone, in half precision, without machine paths.

python demo/ship.py runs/nano demo/nano
"""

import sys
from dataclasses import replace

from nanollava.checkpoint import load, save


def ship(run: str, out: str) -> None:
    """Write a run's model to a folder that `nanollava.load` opens."""
    model = load(run)
    unneeded = {"sources": {}, "stages": {}, "tasks": {}, "settings": {}, "reference": ""}
    parts = {"encoder_weights": "random", "llm": "beside this file", "run": out, "data": "data"}
    model.recipe = replace(model.recipe, **unneeded, **parts)
    save(model.half(), out)


if __name__ == "__main__":
    ship(*sys.argv[1:])
