"""The page of the nano ablations: every row's scores beside the blog's, and every claim's verdict.

    python -m nanollava.ablations.results        # writes recipes/RESULTS.md

It is read off the lines in recipes/ablations/results/.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanollava.ablations import rows as rows_of
from nanollava.ablations import verdicts
from nanollava.evaluate import read_lines
from nanollava.files import repository_file

RECIPES = repository_file("ablations").parent
STANDS_FOR = {
    "nano-doc": "docvqa",
    "nano-info": "infovqa",
    "nano-chart": "chartqa",
    "nano-presence": "pope",
    "nano-choice": "scienceqa_img",
    "trained": "training_time",
    "asked": "total_inference_time",
}


def results(file: Path) -> Path:
    """Where an ablation's results lie."""
    return file.parent / "results" / f"{file.stem}.jsonl"


def files() -> list[Path]:
    """The ablations of which something is measured."""
    return [f for f in sorted((RECIPES / "ablations").glob("*.yaml")) if read_lines(results(f))]


def judged(file: Path) -> list:
    """The verdicts of an ablation's claims, with Holm's p over them."""
    lines = read_lines(results(file))
    return verdicts.judge([verdicts.measure(c, lines) for c in verdicts.read_claims(file)])


def measured(file: Path) -> dict[str, list[dict]]:
    """Row of an ablation -> its measurements, one for each seed; without those of none."""
    lines = verdicts.latest(read_lines(results(file)))
    rows = {
        row: [x for (other, _), x in sorted(lines.items()) if other == row]
        for row in rows_of.read_ablation(file).rows
    }
    return {row: found for row, found in rows.items() if found}


def printed(row, task: str) -> str:
    """What the blog prints for a row in the benchmark that a nano task stands for."""
    known, key = rows_of.printed(row), STANDS_FOR.get(task, "")
    key = key if key in known else key.removesuffix("_img")
    return f" ({known[key]})" if known.get(key) is not None else ""


def spread(values: list[float]) -> str:
    """Mean and half of the 95% t interval over seeds, in %."""
    mean, low, high, _ = verdicts.interval(values)
    return f"{100 * mean:.1f}" + (f" ±{50 * (high - low):.1f}" if len(values) > 1 else "")


def tokens(found: Sequence[dict]) -> str:
    """Visual tokens a question, over all tasks."""
    each = [task["tokens"] for task in found[0]["tasks"].values()]
    return f"{sum(each) / len(each):.0f}"


def seconds(found: Sequence[dict]) -> str:
    """Mean CPU seconds of the last stage, where one was trained in one go."""
    each = [s for line in found if (s := verdicts.seconds(line))]
    return f"{sum(each) / len(each):.0f}" if each else "-"


def asking(found: Sequence[dict]) -> str:
    """Mean CPU seconds of all tasks' questions."""
    return f"{sum(map(verdicts.asking, found)) / len(found):.0f}"


def table(file: Path) -> list[str]:
    """An ablation's rows: scores, visual tokens a question, CPU seconds of the last stage and of
    the questions.
    """
    rows, known = measured(file), rows_of.read_rows(file)
    tasks = [*next(iter(rows.values()))[0]["tasks"]]
    out = [
        "| row | seeds | " + " | ".join(tasks) + " | tokens | trained, CPU-s | asked, CPU-s |",
        "|---" * (len(tasks) + 5) + "|",
    ]
    for name, mine in rows.items():
        row = known[name]
        cells = [spread([verdicts.value(m, t) for m in mine]) + printed(row, t) for t in tasks]
        cells += [
            tokens(mine),
            seconds(mine) + printed(row, "trained"),
            asking(mine) + printed(row, "asked"),
        ]
        out.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
    return out


def difference(v, digits: int = 3) -> str:
    """What was measured about a claim, its 95% interval over seeds, the unit."""
    mean, low, high = (f"{v.claim.factor * x:.{digits}g}" for x in (v.mean, v.low, v.high))
    each = {0: "-", 1: f"{mean} {v.claim.unit} (one seed)"}
    return each.get(len(v.seeds), f"{mean} [{low}, {high}] {v.claim.unit}")


def told(v) -> str:
    """A claim's line."""
    factor = v.claim.factor
    asked = (
        "-"
        if v.questions[0] != v.questions[0]
        else "{:.3g} to {:.3g}".format(*(factor * x for x in v.questions))
    )
    rule = {
        "within": f"within ±{factor * v.claim.margin:g}",
        "at_most": f"below {factor * v.claim.margin:g}",
    }.get(v.claim.holds, f"p {v.p:.2g}" + (", counted" if v.claim.metric[0] == "flops" else ""))
    return (
        f"| {v.claim.title} | {v.claim.source} | {difference(v)} | {asked} | {len(v.seeds)}"
        f" | {rule} | **{v.word}** |"
    )


OPENING = """# What the nano ablations show

Made by `python -m nanollava.ablations.results` from the lines in `recipes/ablations/results/`.
**Nano is not the blog**: models of a million parameters on drawn pages; they can show a
mechanism and its direction.

Scores in %, with half of the 95% t interval over seeds; in brackets what the blog prints for the
benchmark that the task stands for. Tokens: visual tokens a question. CPU-s: of the last stage and
of all questions, each on one thread of a machine with other work, which at times made them three to
four times as many: claims about seconds compare rows of one seed, which ran in one session; do not
compare seeds or tables. In brackets the blog's time.

A claim is a sentence of the blog or what one of its tables prints, the rows that could show it and
the smallest difference that matters, written into the ablation's file before its runs, or with what
was known by then. Differences of scores are in points, those of CPU seconds and of FLOPs (of the
last stage, counted as `plan` does: only its pages differ by seed) are of logarithms, those of
losses in nats. A seed changes the order of stages 1, 1.5 and 2, the records and the questions.

- **same direction**, **opposite**: over three seeds or more, Holm's p over the table's claims of a
  difference is below 0.05, and the difference is as large as matters. A claim of hardly any
  difference ("within", "below") shows where its whole 95% interval, not adjusted for the number of
  claims, is inside the margin, and is contradicted where all of it is outside.
- **not resolved**: neither. The interval is wide, or the difference too small to matter.
- **waits for seeds**: fewer than three.

"Over questions" is what other questions could have said about the same models.
"""
HEAD = (
    "claim",
    "the blog",
    "difference [95% over seeds]",
    "over questions",
    "seeds",
    "test",
    "verdict",
)


def section(file: Path, found: list) -> list[str]:
    """An ablation: what it is, its command, its rows, its verdicts."""
    about = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        about.append(line.removeprefix("# "))
    command = f"`python -m nanollava ablate recipes/ablations/{file.name}`"
    claims = [told(v) for v in found]
    claims = ["", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *claims] if claims else []
    return ["", f"## {file.stem}", "", *about, "", command, "", *table(file), *claims]


def trainings() -> str:
    """What was trained, and how far the scores of a recipe and seed lie apart that two tables
    trained, each in its session.
    """
    lines = [line for file in files() for line in read_lines(results(file))]
    cost = {(line["run"], *line["losses"]): verdicts.seconds(line) or 0 for line in lines}
    asked: dict[tuple, dict] = {}
    for line in lines:
        for name, task in line["tasks"].items():
            asked.setdefault((line["key"], name), {})[tuple(line["losses"])] = task["score"]
    apart = [100 * np.ptp([*each.values()]) for each in asked.values() if len(each) > 1]
    return (
        f"{len(cost)} last stages were trained in {sum(cost.values()) / 3600:.1f} CPU hours, of"
        f" {len({run for run, *_ in cost})} recipes and seeds. Where two tables trained the"
        f" same, in two sessions and mostly at two commits, a task's scores lie"
        f" {np.median(apart):.1f} points apart in the median,"
        f" {max(apart):.1f} at most."
    )


def page() -> str:
    """All of it."""
    found = {file: judged(file) for file in files()}
    counts = Counter(v.word for each in found.values() for v in each)
    words = ", ".join(f"{word} {counts[word]}" for word in verdicts.WORDS if counts[word])
    about = f"{trainings()} {counts.total()} claims: {words}."
    sections = [line for file, each in found.items() for line in section(file, each)]
    return "\n".join([OPENING, about, *sections]) + "\n"


if __name__ == "__main__":
    (RECIPES / "RESULTS.md").write_text(page())
