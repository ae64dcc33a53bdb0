"""The nano sweeps in recipes/ablations/results/, as tables and figures for lessons.

    sweeps.scores("grids")     # rows for plots.bars, with 95% t intervals over seeds
    sweeps.claims("grids")     # the blog's sentences, what was measured, the verdicts

The README's figure: python notebooks/sweeps.py notebooks/figures/frontier.png
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plots
from lab import clock
from pandas.io.formats.style import Styler

from nanollava.ablations import results, verdicts
from nanollava.ablations import rows as rows_of

read_rows, T4 = rows_of.read_rows, rows_of.TABLES["T4"]
ABLATIONS = Path(__file__).parent.parent / "recipes" / "ablations"


def lines(name: str) -> dict[str, list[dict]]:
    """Row of an ablation -> its measurements, one for each seed."""
    return results.measured(ABLATIONS / f"{name}.yaml")


def values(measured: Sequence[dict], metric: str | Sequence[str]) -> list[float]:
    """One number for each seed: a task's score, the mean of several, `loss`, `train` ..."""
    names = [metric] if isinstance(metric, str) else metric
    return [float(np.mean([verdicts.value(x, name) for name in names])) for x in measured]


def spread(measured: Sequence[dict], metric: str | Sequence[str]) -> dict:
    """Mean over seeds and its 95% t interval, within what a score can be."""
    mean, low, high, _ = verdicts.interval(values(measured, metric))
    low, high = max(0.0, low), min(1.0, high)
    return {"score": mean, "low": low, "high": high, "seeds": len(measured)}


def scores(name: str, tasks: Sequence[str] = (), rows: Sequence[str] = ()) -> list[dict]:
    """Rows for `plots.bars` and `plots.beside`: mean over seeds and its 95% t interval."""
    return [
        {
            "setting": row,
            "task": task,
            "chance": measured[0]["tasks"][task]["chance"],
            **spread(measured, task),
        }
        for row, measured in lines(name).items()
        if not rows or row in rows
        for task in tasks or measured[0]["tasks"]
    ]


def typical(measured: Sequence[dict], metric: str) -> float:
    """Geometric mean over seeds of what `train` (CPU seconds) or `flops` has as logarithms."""
    return float(np.exp(np.nanmean(values(measured, metric))))


def work(name: str) -> list[dict]:
    """The last stage of each row: FLOPs as counted from its records, and CPU seconds."""
    return [
        {
            "row": row,
            "seeds": len(measured),
            "flops": typical(measured, "flops"),
            "seconds": typical(measured, "train"),
        }
        for row, measured in lines(name).items()
    ]


def averages(name: str, rows: Sequence[str] = ()) -> list[dict]:
    """Rows for `plots.beside`: the mean of all tasks, over seeds, and its 95% t interval."""
    return [
        {"setting": row, **spread(measured, [*measured[0]["tasks"]])}
        for row, measured in lines(name).items()
        if not rows or row in rows
    ]


def table(name: str, tasks: Sequence[str] = ()) -> Styler:
    """An ablation's rows in %, mean and half of the 95% t interval; tokens; training's seconds."""
    shown = []
    for row, measured in lines(name).items():
        names = tasks or measured[0]["tasks"]
        cells = {t.removeprefix("nano-"): results.spread(values(measured, t)) for t in names}
        cells |= {"tokens": results.tokens(measured), "CPU-s": results.seconds(measured)}
        shown.append({"row": row, "seeds": len(measured), **cells})
    told = f"{name}: nano scores in %" if shown else f"{name}: not measured yet"
    return pd.DataFrame(shown).style.hide(axis="index").set_caption(told)


def claims(*names: str, metrics: Sequence[str] = ()) -> Styler:
    """The blog's sentences about ablations, what nano measured, and the verdicts; with `metrics`,
    those alone that are about one of them.
    """
    shown = [
        {
            "claim": v.claim.title,
            "the blog": v.claim.source,
            "measured": results.difference(v, 2),
            "seeds": len(v.seeds),
            "verdict": v.word,
        }
        for name in names
        for v in results.judged(ABLATIONS / f"{name}.yaml")
        if not metrics or {*v.claim.metric} & {*metrics}
    ]
    left = {"text-align": "left"}
    return pd.DataFrame(shown).style.hide(axis="index").set_properties(**left)


def curves(name: str, rows: Sequence[str] = (), window: int = 10) -> None:
    """Losses of the last stage by row: the mean over seeds of means of `window` steps."""
    if not (found := lines(name)):
        print(f"{name}: not measured yet")
        return
    _, axis = plt.subplots(figsize=(5.2, 2.6))
    for i, (row, measured) in enumerate(found.items()):
        if rows and row not in rows:
            continue
        loss = np.mean([x["losses"] for x in measured], axis=0)
        mean = np.convolve(loss, np.ones(window) / window, "valid")
        style = ("-", "--", ":")[i // 4 % 3]
        axis.plot(np.arange(len(mean)) + window, mean, style, color=plots.OURS[i % 4], label=row)
    axis.set(xlabel="step", ylabel="loss, mean over seeds", title=name)
    if axis.lines:  # none before the first results
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def frontier(
    metric: Sequence[str] = ("nano-doc", "nano-sheet", "nano-dense", "nano-info"),
) -> None:
    """Score over tokens and over time: ours by grid (filled), the blog's T4 (hollow)."""
    found, grids = lines("frontier"), {}
    for row, measured in found.items():
        grids.setdefault(row.split(",")[0], []).append(measured)
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9))
    for i, (grid, rows) in enumerate(grids.items()):
        score = [100 * np.mean(values(measured, metric)) for measured in rows]
        tokens = [np.mean([m[0]["tasks"][t]["tokens"] for t in metric]) for m in rows]
        seconds = [typical(measured, "train") for measured in rows]
        style = {"color": plots.OURS[i % 4], "marker": "os^Dv"[i], "label": f"nano, grid {grid}"}
        axes[0].plot(tokens, score, **style)
        axes[1].plot(seconds, score, **style)
    blog = [dict(zip([*T4["factors"], *T4["metrics"]], row)) for row in T4["rows"]]
    for (grid, rows), mark in zip(by(blog, "max_grids").items(), "s^Dv"):
        hours = [clock(row["training_time"]) for row in rows]
        score = [np.mean([row[key] for key in ("docvqa", "chartqa", "infovqa")]) for row in rows]
        axes[2].plot(hours, score, mark + "-", mfc="white", color=plots.INK, label=f"blog, {grid}")
    axes[0].set(xlabel="visual tokens a question", ylabel="reading, %", title="nano: tokens")
    axes[1].set(xlabel="CPU seconds of stage 2", title="nano: time")
    axes[2].set(xlabel="hours", title="blog (T4): DocVQA, ChartQA, InfoVQA")
    handles = [h for axis in axes[1:] for h in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.tight_layout()


ALL = (
    "nano-doc",
    "nano-sheet",
    "nano-dense",
    "nano-info",
    "nano-chart",
    "nano-presence",
    "nano-choice",
)
FIGURE_2 = {  # series: (ablation, its rows by amount, marker and line, colour)
    "stage 1.5, re-captions": (
        "stage1_5_data",
        ("118K (ReCap)", "558K (ReCap)", "3M (ReCap)"),
        "o-",
        plots.GRID,
    ),
    "stage 1.5, raw captions": (
        "stage1_5_data",
        ("COCO118K", "BLIP558K", "CC3M"),
        "o--",
        plots.BASE,
    ),
    "stage 1, public raw captions": ("stage1_data", ("558K", "CC3M", "CC12M"), "s-", plots.INK),
    "stage 1, web, top quality": (
        "stage1_data",
        tuple(f"Web {n}, top quality" for n in ("0.6M", "3M", "12M")),
        "s--",
        plots.OURS[1],
    ),
    "stage 1, web, random": (
        "stage1_data",
        tuple(f"Web {n}, random" for n in ("0.6M", "3M", "12M")),
        "s:",
        plots.OURS[3],
    ),
}


def figure_2(metric: Sequence[str] = ALL) -> None:
    """The blog's Figure 2, average score over amount of data: the blog's from T11 and T12 (hollow),
    ours (filled, 95% t intervals over seeds) where measured. The amounts are the blog's.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9))
    for name, (ablation, rows, style, colour) in FIGURE_2.items():
        known, found = read_rows(ABLATIONS / f"{ablation}.yaml"), lines(ablation)
        blog = [rows_of.printed(known[row])["avg"] for row in rows]
        axes[0].plot([*map(amount, rows)], blog, style, mfc="white", color=colour, label=name)
        done = [row for row in rows if row in found]
        each = [verdicts.interval(values(found[row], metric)) for row in done]
        mean, low = (np.array([100 * x[i] for x in each]) for i in (0, 1))
        bars = np.where(np.isfinite(low), mean - low, 0)  # one seed has no interval
        axes[1].errorbar([*map(amount, done)], mean, bars, fmt=style, color=colour, capsize=3)
    if base := lines("stage1_5_data").get("none"):
        axes[1].axhline(100 * np.mean(values(base, metric)), color=plots.INK, lw=0.8, ls="-.")
    baseline = rows_of.printed(read_rows(ABLATIONS / "stage1_5_data.yaml")["none"])["avg"]
    axes[0].axhline(baseline, color=plots.INK, lw=0.8, ls="-.", label="no stage 1.5 (T12)")
    measured = lines("stage1_data") or lines("stage1_5_data")
    for axis, title in zip(axes, ("blog (T11, T12)", "nano" if measured else "nano: not run yet")):
        axis.set(
            xscale="log",
            xlim=(9e4, 1.6e7),
            title=title,
            ylabel="average, %",
            xlabel="samples, as the blog counts",
        )
    figure.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.tight_layout()


def amount(name: str) -> float:
    """'BLIP558K' -> 558000.0, 'Web 0.6M, random' -> 600000.0: the samples in a row's name."""
    number, unit = re.search(r"(\d[\d.]*)([KM])", name).groups()
    return float(number) * {"K": 1e3, "M": 1e6}[unit]


def by(rows: Sequence[dict], key: str) -> dict[str, list[dict]]:
    """Rows grouped by a key."""
    out: dict[str, list[dict]] = {}
    for row in rows:
        out.setdefault(row[key], []).append(row)
    return out


if __name__ == "__main__":
    frontier()
    plt.savefig(sys.argv[1])
