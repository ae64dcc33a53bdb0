"""One style for every figure, and the figures that more than one page shows.

    python notebooks/plots.py hero runs/nano notebooks/figures/hero.png
    python notebooks/plots.py scores runs/nano_0 runs/nano_1 runs/nano_2    # a Markdown table

The blog's numbers (blog.json) are drawn hollow, ours filled, intervals as bars; all of it can be
read in grey.
"""

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.patches import Rectangle
from pandas.io.formats.style import Styler
from PIL import Image

import nanollava
from nanollava.anyres import Layout, cut_views, open_image
from nanollava.cost import forward_flops, rates
from nanollava.evaluate import read_lines
from nanollava.prompts import IGNORE, IMAGE, Turn
from nanollava.recipe import with_visual
from nanollava.runs import read_losses
from nanollava.sources import function_of

ROOT = Path(__file__).parent.parent
BLOG = json.loads((ROOT / "nanollava/ablations/blog.json").read_text())
INK, GRID, BASE, RIGHT, WRONG = "#1a1a1a", "#d1495b", "#2e4057", "#2a7f62", "#b3261e"
OURS = ("#2e4057", "#8d99ae", "#d1495b", "#edae49")  # dark and light enough to tell apart in grey
plt.rcParams["font.size"] = 9
plt.rcParams["text.color"] = INK
plt.rcParams["figure.dpi"] = 110
plt.rcParams["savefig.dpi"] = 150
plt.rcParams["savefig.bbox"] = "tight"
plt.rcParams["axes.spines.top"] = plt.rcParams["axes.spines.right"] = False


def blog(table: str, *columns: str, rows: Sequence[int] | None = None) -> Styler:
    """A table of the blog as printed (`columns` and `rows` of it); its section is its caption."""
    keys = BLOG["tables"][table]
    frame = pd.DataFrame(keys["rows"], columns=[*keys["factors"], *keys["metrics"]])
    frame = frame.iloc[list(rows)] if rows is not None else frame
    frame = frame[list(columns)] if columns else frame
    title = f"{table}: {keys['title']} (Section {keys['section']})"
    return frame.style.format(precision=1, na_rep="-").hide(axis="index").set_caption(title)


def picture(axis, image, title: str = "", edge: str = INK) -> None:
    """An image with a thin frame and its title, without axes."""
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    for spine in axis.spines.values():
        spine.set(color=edge, linewidth=1.2, visible=True)


def captioned(found: dict[str, tuple[Image.Image | None, str]], columns: int = 4) -> None:
    """Pictures in rows, each with its title above and its text below; None has no picture."""
    rows = -(-len(found) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 3.4 * rows), squeeze=False)
    for axis, (title, (image, text)) in zip(axes.flat, found.items()):
        picture(axis, image or np.full((48, 48, 3), 235, np.uint8), title)
        axis.set_xlabel(text, fontsize=7, linespacing=1.1)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    axes[0, 0].figure.subplots_adjust(wspace=0.1, hspace=0.55)


def grid_over(axis, image: Image.Image, lay: Layout) -> None:
    """The chosen grid drawn over the image, in the image's own pixels."""
    (a, b), (left, top), (w, h) = lay.grid, lay.offset, lay.fitted
    picture(axis, image, f"{image.width}x{image.height} pixels, grid {a}x{b}")
    for i in range(a):
        for j in range(b):
            sx, sy = image.width / w, image.height / h
            x, y = (i * lay.tile - left) * sx, (j * lay.tile - top) * sy
            axis.add_patch(
                Rectangle((x, y), lay.tile * sx, lay.tile * sy, fill=False, ec=GRID, lw=1.2)
            )
    axis.set(xlim=(-0.02 * image.width, 1.02 * image.width))


def tiles_of(views: np.ndarray, lay: Layout, gap: int = 2) -> np.ndarray:
    """(N, R, R, 3) views -> the tiles in their places with a gap around each."""
    (a, b), tiles = (
        lay.grid,
        np.pad(views[1:], ((0, 0), (gap,) * 2, (gap,) * 2, (0, 0)), constant_values=190),
    )
    rows = tiles.reshape(b, a, *tiles.shape[1:]).transpose(0, 2, 1, 3, 4)  # (b, R, a, R, 3)
    return rows.reshape(b * tiles.shape[1], a * tiles.shape[2], 3)


def views(image: Image.Image, lay: Layout, axes=None) -> None:
    """An image under its grid, its base view and its tiles, in three axes."""
    if axes is None:
        axes = plt.subplots(1, 3 if lay.grid[0] else 2, figsize=(8, 2.6))[1]
    cut, (a, b), R = cut_views(image, lay).permute(0, 2, 3, 1).numpy(), lay.grid, lay.tile
    grid_over(axes[0], image, lay)
    picture(axes[1], cut[0], f"base view: {R}x{R}", BASE)
    if a:
        picture(axes[2], tiles_of(cut, lay), f"{a * b} tiles: {R}x{R} each", "white")


def hero(run: str, out: str, number: int = 1) -> None:
    """A page, its base view, its tiles, its tokens, and the answer with and without tiles."""
    llava = nanollava.load(run)
    make = function_of(f"{ROOT}/recipes/nano/world.py:doc")
    *_, record = make(split="test", count=number + 1, seed=7)
    image, question = open_image(record["image"]), record["conversations"][0]["value"]
    question = question.replace("<image>\n", "")
    answers = {g: llava.chat(image, question, max_grid=g) for g in ("base", "3x3")}
    llava.chat(image, question)
    (lay,) = llava.seen.document.layouts
    figure = plt.figure(figsize=(10, 2.9))
    columns = figure.add_gridspec(1, 4, width_ratios=[1.1, 0.75, 1.1, 1.5], wspace=0.12)
    *axes, axis = (figure.add_subplot(column) for column in columns)
    views(image, lay, axes)
    axis.axis("off")
    formula = f"({lay.grid[0]}x{lay.grid[1]} + 1) x {llava.model.spec.side**2}"
    axis.text(0, 0.93, f"{formula} = {lay.tokens} visual tokens", weight="bold")
    axis.text(0, 0.74, question, style="italic")
    for y, (grid, name) in zip((0.52, 0.22), (("base", "base view alone"), ("3x3", "with tiles"))):
        right = answers[grid].split()[-1:] == [record["answer"]]
        axis.text(0, y, f"{name}:", color=INK)
        verdict, colour = ("right", RIGHT) if right else ("wrong", WRONG)
        axis.text(0, y - 0.13, f"{answers[grid]}  ({verdict})", color=colour, fontsize=12)
    figure.savefig(out)


def figure_1(images: Sequence[Image.Image], kinds: dict[str, Sequence[Layout]]) -> None:
    """The blog's Figure 1: each coloured square is a feature map that is encoded by itself."""
    shape = len(kinds), 2 * len(images)
    figure, axes = plt.subplots(*shape, figsize=(2 * shape[1], 2.3 * shape[0]), squeeze=False)
    for row, (name, layouts) in zip(axes, kinds.items()):
        for i, (image, lay) in enumerate(zip(images, layouts, strict=True)):
            (a, b), (axis, squares) = lay.grid, row[2 * i : 2 * i + 2]
            grid_over(axis, image, lay)
            colours = plt.cm.viridis(np.linspace(0.1, 0.9, a * b)).reshape(b, a, 4)
            squares.imshow(colours, extent=(0, a, b, 0))
            squares.add_patch(Rectangle((-1.4, 0), 1, 1, color=GRID))
            squares.set(xlim=(-1.5, a + 0.1), ylim=(b + 0.1, -0.1), aspect="equal")
            squares.axis("off")
            squares.set_title(f"{name}:\n{a} x {b} + 1 maps", fontsize=9)
    figure.tight_layout()


def budget(model, image: Image.Image, grid: str, tau: str, most: int = 900) -> None:
    """One image under a grid and a budget: where its tokens lie, and what a question about it
    costs, in millions of FLOPs forward (the axis ends at `most`).
    """
    visual = with_visual(model.recipe, {"max_grid": grid, "max_visual_tokens": tau}).visual
    turn = Turn("user", "<image>\nWhat is the tax?", 1)
    document = model.writer(visual)([turn], [image], answer=True)
    (lay,), T = document.layouts, model.spec.side**2
    _, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), width_ratios=(1, 1.6))
    grid_over(axes[0], image, lay)
    if lay.grid[0]:
        rows, columns = lay.raster
        x = (np.arange(columns) + 0.5) * image.width / columns
        y = (np.arange(rows) + 0.5) * image.height / rows
        axes[0].plot(*(xy.ravel() for xy in np.meshgrid(x, y)), ".", color=BASE, ms=2)
    cost = forward_flops(rates(model), [document], T, visual.pool_after_projector)
    parts = {
        "encoder": cost["encoder"] + cost["stem"],
        "projector": cost["projector"] + cost["projector_2"],
        "LLM": cost["llm"] + cost["attention"],
    }
    axes[1].barh(list(parts), [n / 1e6 for n in parts.values()], color=OURS[:3])
    axes[1].set(xlim=(0, most), xlabel="million FLOPs")
    axes[1].set_title(f"{lay.views} views x {T} features -> {lay.tokens} tokens", fontsize=9)
    axes[0].figure.tight_layout()


def losses(run: str | Path) -> None:
    """The training curves of a run: every step, and the mean of ten."""
    rows = [row for row in read_losses(run) if row["source"] == "all"]
    names = list(dict.fromkeys(row["stage"] for row in rows))
    _, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 2.2), squeeze=False)
    for axis, name in zip(axes[0], names):
        loss = np.array([float(row["loss"]) for row in rows if row["stage"] == name])
        axis.plot(loss, color=OURS[1], lw=0.7)
        n = min(10, len(loss))
        mean = np.convolve(loss, np.ones(n) / n, "valid")
        axis.plot(np.arange(len(mean)) + n - 1, mean, color=OURS[0])
        axis.set(title=f"{name}: loss", xlabel="step", ylim=(0, None))


def band(reference: str | Path, run: str | Path = "") -> None:
    """The losses between which several runs of a recipe lie (its `reference`), stage by stage, and
    those of `run` as means of ten steps, if it is there.
    """
    known = pd.read_csv(reference)
    rows = pd.DataFrame([row for row in read_losses(run) if row["source"] == "all"])
    names = list(known.stage.unique())
    _, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 2.2), squeeze=False)
    for axis, name in zip(axes[0], names):
        mine = known[known.stage == name]
        axis.fill_between(mine.step, mine.low, mine.high, color=OURS[1], lw=0)
        axis.set(title=f"{name}: loss", xlabel="step", ylim=(0, None))
        if len(rows):
            loss = rows[rows.stage == name].loss.astype(float)
            axis.plot(range(1, len(loss) + 1), loss.rolling(10, 1).mean(), color=OURS[0])


def scaling() -> None:
    """The blog's averages over the size of the LLM (T1), and over the size and the visual tokens of
    the vision encoder (T3); one scale of scores for all.
    """
    llm, encoder = (
        pd.DataFrame(t["rows"], columns=[*t["factors"], *t["metrics"]])
        for t in (BLOG["tables"]["T1"], BLOG["tables"]["T3"])
    )
    billions = llm.llm.str.extract(r"([\d.]+)B$")[0].astype(float)
    tokens = encoder.visual_tokens.str.split("*").str[0].astype(int)
    names = [f"{n} at {r}" for n, r in zip(encoder.vision_encoder, encoder.resolution)]
    _, axes = plt.subplots(1, 3, figsize=(9, 2.7), sharey=True)
    hollow = {"mfc": "white", "color": INK, "ls": ""}
    axes[0].plot(billions, llm.avg, "o", **hollow)
    sizes = encoder.model_size.str[:-1].astype(float)
    for name, mark, size, T, score in zip(names, "osD^vP", sizes, tokens, encoder.avg):
        axes[1].plot(size, score, mark, label=name, **hollow)
        axes[2].plot(T, score, mark, **hollow)
    for axis, title in zip(axes, ("LLM (T1)", "vision encoder (T3)")):
        axis.set(xscale="log", xlim=(0.2, 200), xlabel=f"{title}, billion parameters")
    axes[2].set(xticks=sorted({*tokens}), xlabel="tokens a view (T3)")
    axes[0].set_ylabel("the blog's average, %")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(2.25, 1))


def bars(rows: Sequence[dict], against: str = "task", by: str = "setting") -> None:
    """Scores with their 95% intervals, in %: groups `against`, one bar for each `by`; a line marks
    what chance gives.
    """
    groups = list(dict.fromkeys(row[against] for row in rows))
    names = list(dict.fromkeys(row[by] for row in rows))
    _, axis = plt.subplots(figsize=(1.2 + 1.1 * len(groups), 2.6))
    for i, name in enumerate(names):
        mine = [row for row in rows if row[by] == name]
        x = [
            groups.index(row[against]) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            for row in mine
        ]
        score, low, high = (
            np.array([100 * row[key] for row in mine]) for key in ("score", "low", "high")
        )
        hatch = "////" if i >= 4 else None  # four colours, then the same ones hatched
        axis.bar(x, score, 0.75 / len(names), color=OURS[i % 4], hatch=hatch, label=name)
        axis.errorbar(
            x, score, [score - low, high - score], fmt="none", ecolor=INK, lw=1, capsize=2
        )
        chance = [100 * row["chance"] for row in mine]
        axis.hlines(
            chance,
            np.array(x) - 0.4 / len(names),
            np.array(x) + 0.4 / len(names),
            color=INK,
            ls=":",
        )
    axis.set(xticks=range(len(groups)), ylabel="score, %", ylim=(0, 105))
    axis.set_xticklabels([str(g).removeprefix("nano-") for g in groups], rotation=30, ha="right")
    if rows:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def beside(blog: dict[str, float], ours: Sequence[dict], names: tuple[str, str]) -> None:
    """The blog's scores (hollow) and ours (filled, with intervals) over the same settings: two
    panels, since the numbers themselves cannot be compared.
    """
    _, axes = plt.subplots(1, 2, figsize=(6.4, 2.3))
    axes[0].plot(list(blog), list(blog.values()), "o-", mfc="white", color=INK)
    score, low, high = (
        np.array([100 * row[key] for row in ours]) for key in ("score", "low", "high")
    )
    x = [row["setting"] for row in ours]
    axes[1].errorbar(x, score, [score - low, high - score], fmt="o-", color=OURS[0], capsize=3)
    if not ours:
        axes[1].set(xticks=[], yticks=[])
        axes[1].text(0.5, 0.5, "not measured yet", ha="center", transform=axes[1].transAxes)
    for axis, name in zip(axes, names):
        axis.set_title(name, fontsize=9)
        axis.tick_params(axis="x", labelrotation=20)
        axis.margins(x=0.15)


def hours(rows: Sequence[dict], title: str) -> None:
    """Relative training time by row: the blog's (hollow), ours as planned, packed and padded."""
    _, axis = plt.subplots(figsize=(6.4, 0.4 * len(rows) + 0.7))
    names, y = [row["row"] for row in rows], range(len(rows))
    axis.barh(y, [row["packed"] for row in rows], 0.5, color=OURS[0], label="planned, packed")
    axis.plot([row["padded"] for row in rows], y, "D", color=OURS[2], label="planned, padded")
    axis.plot([row["blog"] for row in rows], y, "o", mfc="white", color=INK, label="blog")
    axis.set_yticks(y, names)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def label_mask(tokenizer, ids: Sequence[int], labels: Sequence[int]) -> HTML:
    """A document's text: what is learned in bold on green, each image as one box."""
    shown, last = [], None
    for token, label in zip(map(int, ids), map(int, labels)):
        if token == IMAGE:
            shown += [
                "" if last == IMAGE else "<span style='border:1px solid'>&nbsp;image&nbsp;</span>"
            ]
        else:
            text = escape(tokenizer.decode([token])).replace("\n", "&#8629;<br>")
            bold = "background:#bfe3d0;color:#1a1a1a;font-weight:bold"
            shown.append(text if label == IGNORE else f"<span style='{bold}'>{text}</span>")
        last = token
    return HTML(f"<div style='font-family:monospace'>{''.join(shown)}</div>")


def scores(*runs: str) -> None:
    """Print the scores of runs with several seeds: their mean in %, and the lowest and highest."""
    rows = [row for run in runs for row in read_lines(Path(run, "results.jsonl"))]
    tasks, settings = ({row[key]: None for row in rows} for key in ("task", "setting"))
    print("| task (metric) | chance | " + " | ".join(settings) + " |")
    print("|---" * (len(settings) + 2) + "|")
    for task in tasks:
        mine = [row for row in rows if row["task"] == task]
        chance = np.mean([row["chance"] for row in mine])
        cells = [f"{task} ({mine[0]['metric']})", f"{100 * chance:.0f}"]
        for setting in settings:
            found = [100 * row["score"] for row in mine if row["setting"] == setting]
            spread = f" [{min(found):.1f}, {max(found):.1f}]" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.1f}{spread}" if found else "-")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
