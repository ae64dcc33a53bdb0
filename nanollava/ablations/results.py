"""The page of the nano ablations: every row's scores next to the blog's, and every verdict.

    python -m nanollava.ablations.results        # writes recipes/RESULTS.md

Everything below MARK is generated from the lines in recipes/ablations/results/; the introduction
above it is written by hand.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import numpy as np

from nanollava.ablations import verdicts
from nanollava.ablations.rows import BLOG, Row, printed, read_ablation, read_rows
from nanollava.evaluate import read_lines
from nanollava.files import repository_file

RECIPES = repository_file("ablations").parent
PAGE = RECIPES / "RESULTS.md"
MARK = "<!-- generated below this line -->\n\n"


def result_lines(file: Path) -> list[dict]:
    """The result lines of an ablation file."""
    return read_lines(file.parent / "results" / f"{file.stem}.jsonl")


def files() -> list[Path]:
    """The ablation files that have results."""
    return [file for file in sorted((RECIPES / "ablations").glob("*.yaml")) if result_lines(file)]


def judged(file: Path) -> list[verdicts.Verdict]:
    """The verdicts on an ablation's claims, with Holm's p over them."""
    lines = result_lines(file)
    return verdicts.judge([verdicts.measure(x, lines) for x in verdicts.read_claims(file)])


def measured(file: Path) -> dict[str, list[dict]]:
    """Row of an ablation -> its last result line with each seed; only rows that have any."""
    rows = {row: [] for row in read_ablation(file).rows}
    for (row, _), line in sorted(verdicts.latest(result_lines(file)).items()):
        if row in rows:
            rows[row].append(line)
    return {row: lines for row, lines in rows.items() if lines}


def blog_score(row: Row, task: str) -> str:
    """ " (58.8)": what the blog prints for a row in the benchmark that a nano task stands for."""
    scores = printed(row)
    column = BLOG["stands_for"].get(task, "")
    # Some of the blog's tables call ScienceQA's column scienceqa, others scienceqa_img.
    score = scores.get(column, scores.get(column.removesuffix("_img")))
    return "" if score is None else f" ({score})"


def spread(values: list[float]) -> str:
    """Mean and half of the 95% t interval over seeds, in %."""
    mean, low, high, _ = verdicts.interval(values)
    half = f" ±{50 * (high - low):.1f}" if len(values) > 1 else ""
    return f"{100 * mean:.1f}{half}"


def tokens(lines: Sequence[dict]) -> str:
    """Visual tokens per question: the mean over tasks, which is the same for all seeds."""
    return f"{fmean(task['tokens'] for task in lines[0]['tasks'].values()):.0f}"


def seconds(lines: Sequence[dict]) -> str:
    """Mean CPU seconds of the last stage, over seeds whose training was not resumed."""
    known = [x for x in map(verdicts.seconds, lines) if x]
    return f"{fmean(known):.0f}" if known else "-"


def asking(lines: Sequence[dict]) -> str:
    """Mean CPU seconds of the questions of all tasks."""
    return f"{fmean(map(verdicts.asking, lines)):.0f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def row_table(file: Path) -> list[str]:
    """An ablation's rows: scores, visual tokens per question, CPU seconds."""
    rows = read_rows(file)
    results = measured(file)
    tasks = [*next(iter(results.values()))[0]["tasks"]]
    # A labelled row is shown as what it is in nano, with the blog's name in a second column.
    names = ["row", "the blog's row"] if any(row.label for row in rows.values()) else ["row"]
    body = []
    for name, lines in results.items():
        row = rows[name]
        cells = [row.label, name] if row.label else [name, ""]
        cells = [*cells[: len(names)], f"{len(lines)}"]
        for task in tasks:  # a cell such as "54.6 ±1.2 (58.8)": nano's score and the blog's
            scores = [verdicts.value(line, task) for line in lines]
            cells.append(spread(scores) + blog_score(row, task))
        trained = seconds(lines) + blog_score(row, "trained")
        asked = asking(lines) + blog_score(row, "asked")
        body.append([*cells, tokens(lines), trained, asked])
    return markdown([*names, "seeds", *tasks, "tokens", "trained, CPU-s", "asked, CPU-s"], body)


def difference(v: verdicts.Verdict, digits: int = 3) -> str:
    """What was measured about a claim, its 95% interval over seeds, and the unit."""
    if not v.seeds:
        return "-"
    scaled = [v.claim.factor * x for x in (v.mean, v.low, v.high)]
    mean, low, high = (f"{x:.{digits}g}" for x in scaled)
    if len(v.seeds) == 1:
        return f"{mean} {v.claim.unit} (one seed)"
    return f"{mean} [{low}, {high}] {v.claim.unit}"


def rule(v: verdicts.Verdict) -> str:
    """What decides about a claim: Holm's p, or an interval within a margin."""
    margin = f"{v.claim.factor * v.claim.margin:g}"
    if v.claim.holds == "within":
        return f"within ±{margin}"
    if v.claim.holds == "at_most":
        return f"below {margin}"
    return f"p {v.p:.2g}" + (", counted" if v.claim.metric[0] == "flops" else "")


def claim_table(found: Sequence[verdicts.Verdict]) -> list[str]:
    """The verdicts on an ablation's claims; empty without claims."""
    span = "difference [95% over seeds]"
    head = ("claim", "the blog", span, "over questions", "seeds", "test", "verdict")
    body = []
    for v in found:
        # Claims about losses, seconds and FLOPs have no interval over questions: it is nan.
        low, high = (f"{v.claim.factor * x:.3g}" for x in v.questions)
        over_questions = "-" if low == "nan" else f"{low} to {high}"
        cells = (v.claim.title, v.claim.source, difference(v), over_questions)
        body.append([*cells, f"{len(v.seeds)}", rule(v), f"**{v.word}**"])
    return ["", *markdown(head, body)] if body else []


def section(file: Path, found: Sequence[verdicts.Verdict]) -> list[str]:
    """An ablation: the comment that opens its file, its command, its rows and its verdicts."""
    comment = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    about = [line.removeprefix("# ") for line in comment]
    command = f"`python -m nanollava ablate recipes/ablations/{file.name}`"
    head = ["", f"## {file.stem}", "", *about, "", command, ""]
    return head + row_table(file) + claim_table(found)


def trainings() -> str:
    """What was trained, and how far apart the scores lie where two tables trained the same recipe
    with the same seed, each in its own session.
    """
    costs = {}  # (run, losses), that is each training -> CPU seconds
    scores = defaultdict(dict)  # (key, task) -> score by losses
    for file in files():
        for line in result_lines(file):
            losses = tuple(line["losses"])
            costs[line["run"], losses] = verdicts.seconds(line) or 0
            for name, task in line["tasks"].items():
                scores[line["key"], name][losses] = task["score"]
    # The same recipe and seed, yet other losses: another session trained it once more.
    runs = {run for run, _ in costs}
    apart = [100 * np.ptp([*x.values()]) for x in scores.values() if len(x) > 1]
    return (
        f"{len(costs)} last stages were trained in {sum(costs.values()) / 3600:.1f} CPU hours, of"
        f" {len(runs)} recipes and seeds. Where two tables trained the"
        f" same, in two sessions and mostly at two commits, a task's scores lie"
        f" {np.median(apart):.1f} points apart in the median,"
        f" {max(apart):.1f} at most."
    )


def page() -> str:
    """The whole page, its introduction as it is."""
    introduction, _, _ = PAGE.read_text().partition(MARK)
    counts = Counter()
    sections = []
    for file in files():
        found = judged(file)
        counts.update(v.word for v in found)
        sections += section(file, found)
    words = ", ".join(f"{word} {counts[word]}" for word in verdicts.WORDS if counts[word])
    about = f"{trainings()} {counts.total()} claims: {words}."
    return introduction + MARK + "\n".join([about, *sections]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
