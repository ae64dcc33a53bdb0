"""Metrics: cases by hand, and independent versions of each definition on random strings."""

import random

import numpy as np
import pytest

from nanollava.metrics import METRICS, anls, edit, exact, f1, facts, relaxed, said_yes


def levenshtein(a, b):
    """Plain dynamic programming."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def strings(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        a = "".join(rng.choice("abC 1\n") for _ in range(rng.randint(0, 9)))
        b = "".join(rng.choice("abC 1\n") for _ in range(rng.randint(0, 9)))
        yield (a, b) if rng.random() < 0.5 else (a, a[:-1] + rng.choice("aB 1"))


def test_anls_by_hand():
    assert anls("Tax  305", "tax 305 ") == 1
    assert anls("abcd", "abce") == 0.75
    assert anls("ab", "ac") == 0.5, "one half still counts"
    assert anls("abcde", "abxyz") == anls("a" * 49 + "b" * 51, "a" * 49 + "c" * 51) == 0
    assert anls("", "") == 1 and anls("", "a") == anls("a", "") == 0
    assert anls("abc", "a   bc") == 1 - 1 / 6, "the length is that of the longer text as written"


def test_anls_equals_lmms_evals_definition():
    for p, r in strings(2000):
        g, d = " ".join(r.strip().lower().split()), " ".join(p.strip().lower().split())
        length = max(len(r.upper()), len(p.upper()))
        score = 1 - (levenshtein(g, d) / length if length else 0)
        assert anls(p, r) == pytest.approx(0 if score < 0.5 else score), (p, r)


def test_relaxed_by_hand():
    assert relaxed("105", "100") == relaxed("95", "100") == relaxed(" 100 ", "100") == 1
    assert relaxed("105.1", "100") == relaxed("94.9", "100") == 0
    assert relaxed("-105", "-100") == 1 and relaxed("-100", "100") == 0
    assert relaxed("50%", "0.5") == relaxed("0.5", "50%") == relaxed("52%", "50%") == 1
    assert relaxed("50", "50%") == relaxed("50%", "50") == 0
    assert relaxed("0", "0") == 1 and relaxed("0.0", "0") == relaxed("0.01", "0") == 0
    assert (
        relaxed("Cat", "cat") == 1 and relaxed("cat ", "cat") == 0 and relaxed("cats", "cat") == 0
    )
    assert relaxed("5", "cat") == 0
    assert relaxed("", "5") == 0 and relaxed("5%%", "5") == 0


def test_relaxed_equals_chartqas_definition():
    def number(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    rng = random.Random(0)
    for _ in range(2000):
        r = rng.choice(["cat", "7", "12.5", "40%", "-3", "250", "1"])
        x = number(r)
        p = f"{x * rng.uniform(0.9, 1.1):.4g}" if x is not None and rng.random() < 0.8 else "Cat"
        p += rng.choice(["", "", "%"])
        a, b = number(p), number(r)
        same = abs(a - b) / abs(b) <= 0.05 if a is not None and b else p.lower() == r.lower()
        assert relaxed(p, r) == same, (p, r)


def test_edit_by_hand():
    assert edit("abc", "abc") == 0.75, "the closed form takes one edit for the root"
    assert edit("ABC ", "abc") == 0.75
    assert edit("abd", "abc") == 0.5 and edit("", "abc") == 0 and edit("x" * 50, "abc") == 0
    assert edit("", "") == 0
    for p, r in strings(1000, seed=1):
        n, r = levenshtein(p.lower().strip(), r.strip()), r.strip()
        assert edit(p, r) == edit(p, f" {r}") == pytest.approx(max(0, 1 - (1 + n) / (len(r) + 1)))


def test_facts_by_hand():
    reference = "Tax 305\n\n fee 12 \nsum 7"
    assert facts("a page: TAX 305 and fee 12", reference) == pytest.approx(2 / 3)
    assert facts("tax 305, fee 12, sum 7", reference) == 1
    assert facts("", reference) == facts("anything", "") == facts("tax 30 5", reference) == 0


def test_exact_and_last_word():
    assert exact(" Yes", "yes ") == 1 and exact("yes.", "yes") == 0
    nano = METRICS["nano_exact"][0]
    assert nano("answer B", "b") == nano("B", "B") == 1 and nano("", "B") == nano("B c", "B") == 0
    assert METRICS["nano_anls"][0]("tax 305", "305") == 1
    assert METRICS["nano_relaxed"][0]("tax 104", "100") == 1
    assert METRICS["nano_relaxed"][0]("100 tax", "100") == 0


def test_f1_by_hand():
    """hits 2, said 3, true 4: precision 2/3, recall 1/2, F1 4/7."""
    answers = ["yes", "Yes ", "yes", "no", "?", "no"]
    truth = ["yes", "yes", "no", "yes", "yes", "no"]
    table = np.array([said_yes(p, r) for p, r in zip(answers, truth)])
    assert table[:, 0].sum() == 3 and table[:, 1].sum() == 4
    assert f1(table) == pytest.approx(4 / 7)
    assert f1(np.zeros((3, 2))) == 0
    assert METRICS["nano_f1_yes"][0]("a cat yes", "yes") == (1, 1)


def test_f1_equals_precision_and_recall():
    rng = np.random.default_rng(0)
    for _ in range(200):
        t = rng.integers(0, 2, (7, 2)).astype(float)
        hits = (t[:, 0] * t[:, 1]).sum()
        p, r = hits / max(t[:, 0].sum(), 1), hits / max(t[:, 1].sum(), 1)
        assert f1(t) == pytest.approx(2 * p * r / (p + r) if hits else 0)


def test_every_metric_is_perfect_on_the_truth():
    """And worse on a wrong answer; the sums are means, or F1 where POPE has it."""
    for name, (score, total) in METRICS.items():
        right, wrong = ("yes", "no") if "yes" in name else ("305", "17")
        rows = np.array([score(right, right)] * 3, dtype=float)
        best = total(rows)
        assert best == (pytest.approx(0.75) if name == "edit" else 1)
        assert total(np.array([score(wrong, right)] * 3, dtype=float)) < best
        mixed = np.array([score(right, right), score(wrong, right)], dtype=float)
        assert total(mixed) == pytest.approx(2 / 3 if "f1" in name else best / 2)
