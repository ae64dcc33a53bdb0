"""Evaluation: what is not done twice, what is, and what cannot be read."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import ROOT

from nanollava.anyres import Visual, open_image
from nanollava.checkpoint import save
from nanollava.evaluate import (
    DIGITS,
    add_line,
    answer_all,
    chance,
    evaluate,
    evaluate_task,
    interval,
    question_scores,
    questions,
    read_lines,
    weights_digest,
)
from nanollava.generate import Assistant, load
from nanollava.metrics import METRICS, f1
from nanollava.model import VLM
from nanollava.prompts import Turn
from nanollava.recipe import Task
from nanollava.sources import import_file

SOURCE = f"{ROOT}/tests/mixed_source.py:mixed"


@pytest.fixture(scope="module")
def trained(tiny_recipe, tmp_path_factory):
    """An assistant with random weights, and its run folder."""
    task = Task(SOURCE, "exact", samples=6, max_new_tokens=3)
    recipe = replace(tiny_recipe, tasks={"nano-mixed": task}, settings={"a": {"max_grid": "base"}})
    torch.manual_seed(0)
    model = VLM(recipe)
    run = tmp_path_factory.mktemp("run")
    save(model, run)
    return Assistant(model), run


def changed(assistant, **keys) -> None:
    assistant.model.recipe = replace(assistant.model.recipe, **keys)


def test_only_what_was_asked_before_is_read_back(trained):
    assistant, run = trained
    first = evaluate(assistant, run)
    assert evaluate(assistant, run) == first and len(read_lines(run / "results.jsonl")) == 1
    changed(assistant, settings={"a": {"max_grid": "3x3"}})  # the same name, another grid
    evaluate(assistant, run)
    task = assistant.model.recipe.tasks["nano-mixed"]
    changed(assistant, tasks={"nano-mixed": replace(task, metric="edit")})
    evaluate(assistant, run)
    rows = read_lines(run / "results.jsonl")
    assert len(rows) == 3 and rows[2]["metric"] == "edit" and rows[0]["n"] == 6


def test_a_key_that_an_old_line_lacks_counts_as_its_default(trained, tmp_path, monkeypatch):
    """A key that is added to Task or Visual later does not orphan older results."""
    assistant, run = Assistant(trained[0].model), tmp_path
    monkeypatch.setattr(assistant.model, "recipe", assistant.model.recipe)  # put back at the end
    changed(assistant, tasks={"nano-old": Task(SOURCE, "exact", samples=4)}, settings={})
    file = run / "results.jsonl"
    evaluate(assistant, run)
    (line,) = read_lines(file)
    del line["keys"]["max_new_tokens"], line["keys"]["split"], line["visual"]["arrange"]
    file.write_text(json.dumps(line) + "\n")
    assert evaluate(assistant, run) == [line] == read_lines(file), "nothing was added"
    for change in ({"max_new_tokens": 3}, {"split": "val"}, {"samples": 3}):
        changed(assistant, tasks={"nano-old": replace(Task(SOURCE, "exact", samples=4), **change)})
        (result,) = evaluate(assistant, run)
        assert result != line and len(read_lines(file)) == 2, change
        file.write_text(json.dumps(line) + "\n")
    changed(assistant, tasks={"nano-old": Task(SOURCE, "exact", samples=4)})
    changed(assistant, visual=replace(assistant.model.recipe.visual, arrange="flat"))
    assert evaluate(assistant, run) != [line]


def as_characters(scores):
    """Scores as result lines had them before they were numbers."""
    return "".join(DIGITS[i] for i in np.rint(63 * np.asarray(scores)).astype(int).ravel())


@pytest.mark.parametrize("metric", ["nano_anls", "nano_f1_yes", "edit"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_scores_are_read_as_numbers_and_as_characters(metric, n):
    """Both forms give a verdict the same array, within half a step of the characters' 64."""
    rng = np.random.default_rng(n)
    scores = rng.integers(0, 2, (n, 2)) if "f1" in metric else rng.random(n)
    new = {"metric": metric, "n": n, "each": np.round(scores, 4).tolist()}
    old = new | {"each": as_characters(scores)}
    new, old = (question_scores(json.loads(json.dumps(line))) for line in (new, old))
    assert new.shape == old.shape == scores.shape and new.dtype == old.dtype == float
    assert np.abs(new - scores).max() <= 0.5e-4 and np.abs(old - new).max() <= 1 / 126 + 1e-4
    if "f1" in metric:
        assert (new == scores).all() and (old == scores).all(), "0 and 1 are exact"
    total = METRICS[metric][1]
    assert total(new) == pytest.approx(total(old), abs=1 / 126)


def test_a_result_holds_its_scores_as_numbers(trained):
    assistant, _ = trained
    visual = assistant.model.recipe.visual
    task = Task(SOURCE, "edit", samples=6, max_new_tokens=3)
    result = json.loads(json.dumps(evaluate_task(assistant, "nano-mixed", task, visual)))
    assert len(result["each"]) == result["n"] == 6
    assert result["each"] == [round(score, 4) for score in result["each"]]
    assert question_scores(result).mean() == pytest.approx(result["score"], abs=1e-4)
    result = evaluate_task(assistant, "nano-mixed", replace(task, metric="f1_yes"), visual)
    assert len(result["each"]) == 6 and {len(pair) for pair in result["each"]} == {2}
    assert f1(question_scores(result)) == result["score"]


def test_committed_lines_are_still_read():
    """Those of the ablations, which were measured when scores were characters."""
    forms = set()
    for line in read_lines(ROOT / "recipes/ablations/results/lifting.jsonl"):
        for task in line["tasks"].values():
            scores = question_scores(task)
            assert len(scores) == task["n"] >= 500 and 0 <= scores.min() <= scores.max() <= 1
            total = METRICS[task["metric"]][1]
            assert total(scores) == pytest.approx(task["score"], abs=0.008)
            forms.add((type(task["each"]), scores.ndim))
    assert (str, 1) in forms and (str, 2) in forms


def test_half_a_line_is_left_out(trained, tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps({"task": "a"}) + '\n{"task": "b", "sc')
    assert read_lines(tmp_path / "results.jsonl") == [{"task": "a"}]


def test_unknown_task_names_those_there_are(trained):
    assistant, run = trained
    with pytest.raises(ValueError, match=r"unknown tasks \['nano-mixd'\].*nano-mixed"):
        evaluate(assistant, run, ["nano-mixd"])


def test_an_unreadable_image_counts_as_wrong_and_is_named(trained, monkeypatch, capsys):
    assistant, run = trained
    task = Task(SOURCE, "exact", samples=9)
    items = [(t, [b"broken"] if images else [], r) for t, images, r in questions(task, 0)]
    monkeypatch.setattr("nanollava.evaluate.questions", lambda *_: items)
    changed(assistant, tasks={"nano-broken": task}, settings={})
    (row,) = evaluate(assistant, run)
    told = capsys.readouterr().out
    assert row["n"] == 9 and told.count("counted as wrong") == sum(bool(x[1]) for x in items) > 0


def test_questions_on_the_same_images_read_them_once(monkeypatch):
    """The answers are those to each question alone; the images go through the model once."""
    assistant, shown = load(ROOT / "demo/nano"), []
    see = assistant.model.see

    def watched(views, layouts):
        shown.append(len(layouts))
        return see(views, layouts)

    monkeypatch.setattr(assistant.model, "see", watched)
    world = import_file(f"{ROOT}/recipes/nano/world.py")
    drawn = [*world.doc("test", 3, 0)]
    pages = [open_image(record["image"]) for record in drawn]
    one, two, three = (r["conversations"][0]["value"].split("\n")[-1] for r in drawn)
    asked = [
        ([0], one),
        ([1], two),
        ([0], "what is it?"),
        ([1, 2], three),
        ([1, 2], two),
        ([1], two),
    ]
    writer = assistant.model.writer(Visual(max_grid="3x3", max_visual_tokens="5T"))
    documents = [
        writer(
            [Turn("user", "<image>\n" * len(of) + text, len(of))],
            [pages[i] for i in of],
            answer=True,
        )
        for of, text in asked
    ]
    together = assistant.answer(documents, 7)
    assert shown == [4], "two images alone, and two together"
    assert together == [assistant.answer([d], 7)[0] for d in documents]
    assert len({text for text, _ in together}) > 2, "all alike would prove nothing"
    shown.clear()
    monkeypatch.setattr("nanollava.evaluate.BATCH", 1)  # one each, as with many tokens an image
    turns = [[Turn("user", "<image>\n" * len(of) + text, len(of))] for of, text in asked]
    images = [[drawn[i]["image"] for i in of] for of, _ in asked]
    items = [*zip(turns, images, strict=True)]
    found = answer_all(assistant, writer, items, 7, "alone")
    assert [(a.text, a.cut) for a in found] == together and sorted(shown) == [1, 1, 2]
    kept = assistant.batch_cache
    assert kept.ids == kept.cache.buffers == {}, "nothing is kept"
    plain = writer([Turn("user", "no image", 0)], [], answer=True)
    mixed = assistant.answer([documents[0], documents[2], plain], 7)
    assert mixed[:2] == [together[0], together[2]] and mixed[2] == assistant.answer([plain], 7)[0]


def test_settings_change_what_is_computed(trained):
    """Pooling and order follow the setting, not the recipe that the model was trained with."""
    from PIL import Image

    from nanollava.sequence import pack

    model = trained[0].model
    image = Image.effect_noise((150, 100), 90).convert("RGB")
    turn = [Turn("user", "<image>\nwhat?", 1)]
    for keys in ({"pooling": "average"}, {"arrange": "flat"}, {"pool_after_projector": False}):
        visual = Visual(max_grid="3x3", max_visual_tokens="5T", **keys)
        document = model.writer(visual)(turn, [image], answer=True)
        row = pack([document], 48)
        seen = model.see(row.views, row.layouts)
        recipe = replace(model.recipe, visual=visual)
        twin = VLM(recipe)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(seen, twin.see(row.views, row.layouts))
        plain = replace(row.layouts[0], pooling="bilinear", pool_after_projector=True)
        other = model.see(row.views, (plain,)) if "arrange" not in keys else None
        assert other is None or not torch.allclose(seen, other)


def test_interval_holds_the_mean_and_narrows_with_questions():
    rows = np.random.default_rng(0).random(400)
    low, high = interval(rows, np.mean)
    few = interval(rows[:40], np.mean)
    assert low < rows.mean() < high and high - low < few[1] - few[0]
    assert interval(np.ones(9), np.mean) == (1.0, 1.0)


def test_an_empty_pack_has_a_gradient_for_every_parameter(tiny_recipe, tmp_path, tokenizer):
    """Else DDP waits for the parameters of a rank that has nothing to do; lm_head untied."""
    from conftest import llm_folder

    from nanollava.sequence import pack

    llm = llm_folder(tmp_path, tokenizer, tie_word_embeddings=False)
    model = VLM(replace(tiny_recipe, llm=llm))
    loss = model(pack([], 48)).mean()
    loss.backward()
    assert loss == 0 and not [n for n, p in model.named_parameters() if p.grad is None]


def test_chance_is_what_shuffled_answers_score():
    """Four equally frequent letters: one in four; one answer to everything: always right."""
    assert abs(chance(list("ABCD") * 100, "exact") - 0.25) < 0.03
    assert chance(["yes"] * 5, "exact") == 1.0


def test_a_line_after_half_a_line_is_whole(tmp_path):
    file = tmp_path / "results.jsonl"
    add_line(file, {"task": "a"})
    file.write_text(file.read_text() + '{"task": "b", "sc')  # killed here
    add_line(file, {"task": "c"})
    assert read_lines(file) == [{"task": "a"}, {"task": "c"}]


def test_weights_are_told_apart_in_one_file_or_several(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"one")
    one = weights_digest(tmp_path)
    assert one == hashlib.sha256(b"one").hexdigest()[:12]
    (tmp_path / "b.safetensors").write_bytes(b"two")
    assert weights_digest(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()[:12]
