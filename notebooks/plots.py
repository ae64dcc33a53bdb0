"""One style for every figure, and the figures that more than one page shows.

python notebooks/plots.py hero runs/nano notebooks/figures/hero.png
python notebooks/plots.py scores runs/nano_0 runs/nano_1 runs/nano_2    # prints a Markdown table
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

ROOT = Path(__file__).parent.parent
INK, GRID, BASE, RIGHT, WRONG = "#1a1a1a", "#d1495b", "#2e4057", "#2a7f62", "#b3261e"
plt.rcParams["font.size"] = 9
plt.rcParams["text.color"] = INK
plt.rcParams["figure.dpi"] = 150
plt.rcParams["savefig.bbox"] = "tight"


def picture(axis, image, title: str = "", edge: str = INK) -> None:
    """An image with a thin frame and its title, without axes."""
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    for spine in axis.spines.values():
        spine.set(color=edge, linewidth=1.2)


def grid_over(axis, image: Image.Image, lay) -> None:
    """The chosen grid drawn over the image, in the image's own pixels."""
    (a, b), (left, top), (w, h) = lay.grid, lay.offset, lay.fitted
    picture(axis, image, f"{image.width}x{image.height} pixels, grid {a}x{b}")
    sx, sy = image.width / w, image.height / h
    for i in range(a):
        for j in range(b):
            x, y = (i * lay.tile - left) * sx, (j * lay.tile - top) * sy
            axis.add_patch(
                Rectangle((x, y), lay.tile * sx, lay.tile * sy, fill=False, ec=GRID, lw=1.2)
            )


def hero(run: str, out: str, seed: int = 3) -> None:
    """A page, its base view, its tiles, its tokens, and the answer with and without tiles."""
    import nanollava
    from nanollava.anyres import cut_views, open_image
    from nanollava.sources import function_of

    llava = nanollava.load(run)
    make = function_of(f"{ROOT}/recipes/nano/world.py:doc")
    record = list(make(split="test", count=seed + 1, seed=7))[seed]
    image, question = open_image(record["image"]), record["conversations"][0]["value"]
    question = question.replace("<image>\n", "")
    answers = {g: llava.chat(image, question, max_grid=g) for g in ("base", "3x3")}
    llava.chat(image, question)
    (lay,) = llava.seen.document.layouts
    views = cut_views(image, lay).permute(0, 2, 3, 1).numpy()
    a, b = lay.grid

    figure = plt.figure(figsize=(10, 2.9))
    columns = figure.add_gridspec(1, 4, width_ratios=[1.1, 0.75, 1.1, 1.5], wspace=0.12)
    grid_over(figure.add_subplot(columns[0]), image, lay)
    picture(figure.add_subplot(columns[1]), views[0], "base view: 48x48", BASE)
    gap = np.pad(views[1:], ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    tiles = gap.reshape(b, a, *gap.shape[1:]).transpose(0, 2, 1, 3, 4)  # (b, R, a, R, 3)
    tiles = tiles.reshape(b * gap.shape[1], a * gap.shape[2], 3)
    picture(figure.add_subplot(columns[2]), tiles, f"{a * b} tiles: 48x48 each", "white")
    axis = figure.add_subplot(columns[3])
    axis.axis("off")
    T = llava.model.row.side**2
    axis.text(0, 0.93, f"({a}x{b} + 1) x {T} = {lay.tokens} visual tokens", weight="bold")
    axis.text(0, 0.74, question, style="italic")
    for y, (grid, name) in zip((0.52, 0.22), (("base", "base view alone"), ("3x3", "with tiles"))):
        right = answers[grid].split()[-1:] == [record["answer"]]
        axis.text(0, y, f"{name}:", color=INK)
        verdict, colour = ("right", RIGHT) if right else ("wrong", WRONG)
        axis.text(0, y - 0.13, f"{answers[grid]}  ({verdict})", color=colour, fontsize=12)
    figure.savefig(out)


def scores(*runs: str) -> None:
    """Print the scores of runs with several seeds: their mean in %, and the lowest and highest."""
    from nanollava.evaluate import read_results

    rows = [row for run in runs for row in read_results(Path(run))]
    tasks, settings = ({row[key]: None for row in rows} for key in ("task", "setting"))
    print("| task (metric) | chance | " + " | ".join(settings) + " |")
    print("|---" * (len(settings) + 2) + "|")
    for task in tasks:
        mine = [row for row in rows if row["task"] == task]
        cells = [
            f"{task} ({mine[0]['metric']})",
            f"{100 * np.mean([r['chance'] for r in mine]):.0f}",
        ]
        for setting in settings:
            found = [100 * row["score"] for row in mine if row["setting"] == setting]
            spread = f" [{min(found):.1f}, {max(found):.1f}]" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.1f}{spread}" if found else "-")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
