"""The nano world: true, repeatable, disjoint; its tokenizer loses nothing."""

import hashlib
import io
import json
import random
import string
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nanollava.llm import load_llm
from nanollava.prompts import IGNORE, IMAGE, encode, read_turns
from nanollava.sources import import_file

NANO = Path(__file__).parents[1] / "recipes" / "nano"
world = import_file(str(NANO / "world.py"))
pages = import_file(str(NANO / "pages.py"))
KINDS = tuple(pages.KINDS)
WEIGHTS = json.loads((NANO / "weights/scores.json").read_text())  # a row for each part that ships
PRINTED = ("doc", "sheet", "dense", "chart", "info", "zh")
TASKS = [*PRINTED, "presence", "choice", "motion", "transcribe", "caption"]
MIXES = [
    "short_captions",
    "transcriptions",
    "detailed",
    "documents",
    "chinese",
    "instructions",
    "moving",
    "sheets",
    "web_random",
    "web_top",
    "text_only",
]


def drawn(kind, split, count=150):
    return [pages.layout(random.Random(f"{split} {i}"), kind, split) for i in range(count)]


def pictures(record):
    images = record["image"] if isinstance(record["image"], list) else [record["image"]]
    return [Image.open(io.BytesIO(data)) for data in images]


def test_atlas_has_every_printable_character_whole():
    ink, advances = pages.atlas()
    assert ink.shape == (45, 119, pages.CELL, pages.CELL)
    assert (ink[:, 1:].max((2, 3)) > 50).all()
    assert all(a > 1.5 for row in advances for a in row.values())
    assert ink[..., -1].max() == 0 and ink[:, :, 0].max() == 0, "a glyph is cut by its cell"
    assert len({glyph.tobytes() for glyph in ink.reshape(-1, pages.CELL, pages.CELL)}) > 4400


@pytest.mark.parametrize("name", TASKS + MIXES)
def test_same_arguments_same_records(name):
    source = getattr(world, name)
    first, again = list(source("val", 12, 3)), list(source("val", 12, 3))
    assert first == again
    assert first[:5] == list(source("val", 5, 3)), "a record depends on how many are made"
    assert [r["image"] or r["conversations"] for r in first] != [
        r["image"] or r["conversations"] for r in source("val", 12, 4)
    ]
    assert len({r["id"] for r in first + list(source("test", 12, 3))}) == 24


def test_pixels_are_those_of_version_nano_1():
    for kinds, digest in PIXELS.items():
        shown = [page for kind in kinds for page in drawn(kind, "test", 5)]
        pixels = b"".join(pages.render(page).tobytes() for page in shown)
        assert hashlib.sha256(pixels).hexdigest()[:16] == digest


PIXELS = {
    ("doc", "zh", "dense", "chart", "info", "scene"): "a48ad3bc59f78335",  # of stage 0, too
    ("sheet",): "485a209f079b141c",
}


def test_splits_share_no_fact():
    shown = {
        s: {f"{a} {b}" for kind in PRINTED for p in drawn(kind, s) for a, b in p.facts}
        for s in pages.SHARES
    }
    scenes = {s: {str(p.facts) for p in drawn("scene", s)} for s in pages.SHARES}
    for a, b in combinations(pages.SHARES, 2):
        assert not shown[a] & shown[b] and not scenes[a] & scenes[b]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind):
    for page in drawn(kind, "train", 60) + drawn(kind, "hard", 20):
        facts, rng = dict(page.facts), random.Random(0)
        for form, question, answer, value in world.questions(rng, page, rng):
            if form in PRINTED:
                key = next(k for k in facts if answer.startswith(k + " "))
                assert key in question.lower() and answer == f"{key} {facts[key]}"
                assert value == facts[key] and any(answer in line for line in page.lines())
            if form in ("scene", "eats", "choice"):
                place = next(p for p in facts if p in question.lower())
                assert facts[place] in answer
            if form == "choice":
                options = dict(o.split() for o in zip_options(question))
                assert options[value] == world.EATS[facts[place]]
            if form == "presence":
                asked = next(o for o in pages.OBJECTS if o in question.lower())
                assert (answer == "yes") == (asked in facts.values())
                parts = {w for o in facts.values() for w in o.split()} & set(asked.split())
                assert answer == "yes" or len(parts) == page.hard
            assert answer.endswith(value)


def zip_options(question):
    words = question.split("\n")[1].split()
    return [f"{letter} {food}" for letter, food in zip(words[::2], words[1::2])]


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_drawn_in_its_box_and_nowhere_else(kind):
    for page in drawn(kind, "train", 10):
        whole, item = pages.render(page), page.items.pop()
        changed = np.argwhere((whole != pages.render(page)).any(-1))
        (y0, x0), (y1, x1) = changed.min(0), changed.max(0)
        a, b, c, d = item.box
        assert a - 2 <= x0 <= x1 <= c + 2 and b - 2 <= y0 <= y1 <= d + 3
        assert x1 - x0 > 0.6 * (c - a) and c <= page.size[0] and d <= page.size[1]


def test_a_whole_window_shows_every_line_and_crops_show_parts():
    for kind in PRINTED:
        for page in drawn(kind, "train", 30):
            assert pages.visible(page, (-9, -9, 999, 999)) == page.lines()
            crop = pages.crop(random.Random(0), page)
            text = "".join("".join(pages.visible(page, crop)).split())
            assert text and len(text) < len("".join(page.lines()))


def test_records_are_llava_records():
    whole = {size for size, _ in pages.KINDS.values()}
    crops = {(48, 48), (56, 56), (64, 64)}
    sizes = {"transcriptions": crops} | dict.fromkeys(("web_random", "web_top"), crops | whole)
    for name in TASKS + MIXES[:-1]:
        for record in getattr(world, name)("test", 20, 0):
            talk = [turn["value"] for turn in record["conversations"]]
            shown = pictures(record)
            assert len(shown) == (4 if name in ("moving", "motion") else 1)
            assert "".join(talk).count("<image>") == len(shown)
            assert talk[0].startswith("<image>\n" * len(shown))
            assert len(talk) % 2 == 0 and all(talk)
            assert {image.size for image in shown} <= sizes.get(name, whole)
            if name in TASKS:
                assert len(talk) == 2 and talk[1].endswith(record["answer"])
            if name in TASKS[:9]:
                assert talk[1].split()[-1] == record["answer"]
    assert 4 <= len(next(world.instructions("train", 1, 0))["conversations"]) / 2 <= 9


def test_one_thing_moves_the_way_it_is_said_to():
    for seed in range(60):
        frames, thing, way = pages.frames(random.Random(seed), "train")
        (moves, stands), (last, still) = frames[0].items, frames[-1].items
        assert moves.text == last.text == thing != stands.text and stands.box == still.box
        right, down = last.box[0] - moves.box[0], last.box[1] - moves.box[1]
        assert way == ("right" if right > 0 else "left" if right else "down" if down > 0 else "up")
        assert abs(right) + abs(down) > 60 and right * down == 0
        for frame in frames:  # they never touch
            (a, b, c, d), (e, f, g, h) = (item.box for item in frame.items)
            assert c <= e or g <= a or d <= f or h <= b


def test_the_hard_split_is_the_same_world_under_strokes_and_noise():
    page = drawn("doc", "hard", 1)[0]
    spoiled, page.hard = pages.render(page), False
    changed = (spoiled.astype(int) - pages.render(page)).reshape(-1, 3)
    assert 8 < np.median(np.abs(changed)) * 1.48 < 16  # of noise with a deviation of 12
    assert (np.abs(changed).max(1) > 60).mean() > 0.005  # strokes
    assert (page.items[0].text, page.hard) == (drawn("doc", "hard", 1)[0].items[0].text, False)


def test_handmade_pages_say_what_they_are_asked_for():
    handmade = import_file(str(NANO / "handmade.py")).handmade
    records = list(handmade("test", 99, 0))
    assert len(records) == 10 and len({r["image"] for r in records}) == 10
    for record in records:
        made = NANO / "handmade" / f"{Path(record['id']).stem}.html"
        printed = (made if made.exists() else made.with_name("make.sh")).read_text()
        assert record["answer"] in printed or record["id"] == "scene.png"  # squares have no name
        assert min(pictures(record)[0].size) >= 96


def test_tokenizer_keeps_any_text():
    tokenizer = AutoTokenizer.from_pretrained(NANO / "tokenizer")
    rng = random.Random(0)
    texts = ["<|im_end|> typed", "user\nWhat is the Tax?", "tax 305\nfee 21", "Zürich 中 \r\n\t"]
    texts += ["".join(rng.choices(string.printable + "éß中", k=30)) for _ in range(300)]
    for text in texts:
        out = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        assert tokenizer.decode(out.input_ids) == text
        assert not set(out.input_ids) & set(tokenizer.all_special_ids)
        spans = list(dict.fromkeys(out.offset_mapping))  # the bytes of one character share a span
        assert "".join(text[a:b] for a, b in spans) == text


def test_tokens_are_words_with_their_space_and_single_digits():
    tokenizer = AutoTokenizer.from_pretrained(NANO / "tokenizer")
    for text, n in {
        "tax 305": 4,
        "What is the tax?": 5,
        "RENT 12\n": 4,
        "red star 7": 3,
        "system\nYou are a helpful assistant.": 1,
    }.items():
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == n, text
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_stage_0_speaks_the_templates_of_the_later_stages():
    reading = import_file(str(NANO / "reading.py"))
    rng = random.Random(0)
    record = next(world.instructions("train", 1, 0))
    talk = [turn["value"] for turn in record["conversations"]]
    turns = list(zip([talk[0].removeprefix("<image>\n"), *talk[2::2]], talk[1::2]))
    seen = reading.shown(rng, pages.layout(rng, "doc", "train"), (3, 3))
    ids, labels = encode(reading.TOKENIZER, read_turns(record["conversations"], 1), "qwen_1_5")
    spot = ids.index(IMAGE)
    row, learned = reading.chat(turns, seen)
    assert row == ids[:spot] + seen + ids[spot + 1 :]
    assert [t for t, learn in zip(row, learned) if learn] == [x for x in labels if x != IGNORE]
    crop = next(world.transcriptions("train", 1, 0))["conversations"]
    ids, labels = encode(reading.TOKENIZER, read_turns(crop, 1), "plain")
    assert reading.plain([], crop[1]["value"]) == (ids[1:], [x != IGNORE for x in labels[1:]])


def test_a_raster_shows_what_stands_where():
    reading = import_file(str(NANO / "reading.py"))
    item = pages.word("tax", 20.0, 30.0, 1, 0)
    page = pages.Page("doc", (96, 96), [item, pages.word("305", 60.0, 30.0, 1, 0)], [])
    rows = [
        reading.raster(random.Random(s), page, (1, 1), (12, 12), (0, 0), reading.LINE)
        for s in range(40)
    ]
    assert all(len(row) == 12 * 13 and row[12::13] == [reading.LINE] * 12 for row in rows)
    tokens = {t for row in rows for t in row[3 * 13 : 3 * 13 + 12]} - {reading.BLANK}
    assert set(reading.ids("tax ")) < tokens
    assert sum(t != reading.BLANK for t in rows[0][: 3 * 13] if t != reading.LINE) == 0


def test_dense_labels_name_the_glyph_at_its_place():
    sight = import_file(str(NANO / "sight.py"))
    page = pages.Page("doc", (48, 48), [pages.word("Tax", 10.0, 20.0, 1, 0)], [])
    glyphs, things = sight.boxes(page)
    stem, halves, words, objects = sight.labels(glyphs, things, np.ones(4), np.zeros(4))
    named = {sight.GLYPHS[halves[spot]]: spot for spot in zip(*map(list, np.nonzero(halves)))}
    assert named == {
        c: (2, int((a + b) / 2 // 4))
        for c, a, b in zip("tax", page.items[0].edges, page.items[0].edges[1:])
    }
    assert {sight.WORDS[w] for w in words.flatten()} == {"", "tax"} and not objects.any()
    moved = sight.labels(glyphs, things, np.ones(4), np.array([14, 0, 14, 0]))[1]
    assert {sight.GLYPHS[c] for c in moved.flatten() if c} == {"a", "x"}


def test_stage_0_packs_rows_that_do_not_see_each_other():
    reading = import_file(str(NANO / "reading.py"))
    rng, model = random.Random(0), reading.build("s").eval()
    rows = [reading.rasters(rng) for _ in range(3)] + [reading.records(rng, 60, 3)]
    alone = torch.stack([reading.learn(model, [row])[0] for row in rows])
    learned = torch.tensor([sum(marks) for _, marks in rows])
    together = (alone * learned).sum() / learned.sum()
    assert torch.allclose(reading.learn(model, rows)[0], together)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model waits for its threads rather than for sums
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [name[-1] for name in WEIGHTS if name.startswith("llm_")])
def test_shipped_weights_see_and_look_up(one_thread, size):
    sight, reading = (import_file(str(NANO / f"{name}.py")) for name in ("sight", "reading"))
    weights, tokenizer = NANO / "weights", (NANO / "tokenizer" / "tokenizer.json").read_text()
    assert (weights / f"llm_{size}" / "tokenizer.json").read_text() == tokenizer
    assert json.loads(tokenizer) == json.loads(reading.TOKENIZER.backend_tokenizer.to_str())
    llm = load_llm(str(weights / f"llm_{size}"))
    found = reading.ceilings(llm, 10)
    least = {"s": 0.6, "m": 0.8, "l": 0.8}[size]  # S answers .79 to .8 of choice and info
    assert all(found[task]["text"] > least for task in ("doc", "chart", "info", "scene", "choice"))
    assert all(found[task]["raster"] > 0.4 for task in ("doc", "chart", "info", "scene"))
    model = sight.Sight(f"nano_{size}")  # no heads are shipped: features must tell glyphs apart
    model.encoder.visual.load_state_dict(load_file(weights / f"encoder_{size}.safetensors"))
    views, _, halves, *_ = sight.Windows(random.Random(0), 60, "test").batch(1600, 1)
    with torch.no_grad():
        seen, left = model.encoder(views).flatten(0, 1), halves[:, :, ::2].flatten()
    digit = (left > 26) & (left < 37)  # digits in left halves
    x, y = seen[digit], F.one_hot(left[digit] - 27, 10).float()
    half = len(x) // 2
    probe = torch.linalg.lstsq(x[:half], y[:half], driver="gelsd").solution
    assert (x[half:] @ probe).argmax(1).eq(y[half:].argmax(1)).float().mean() > 0.85
