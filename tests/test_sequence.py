"""Sequence: documents end to end; nothing crosses from one to the next, nothing is lost."""

import random
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nanollava.anyres import Visual, layout
from nanollava.prompts import IGNORE, IMAGE, Turn
from nanollava.sequence import Document, Writer, expand, pack, split


def document(ids, labels, source="", layouts=(), views=0, fill=0):
    shown = torch.full((views, 3, 4, 4), fill, dtype=torch.uint8)
    return Document(torch.tensor(ids), torch.tensor(labels), shown, tuple(layouts), source)


@pytest.fixture(scope="module")
def writer(tokenizer):
    visual = Visual("3x3", max_visual_tokens="10T")
    return Writer(tokenizer, visual, 48, 6, "qwen_1_5")


def picture(W, H, color=(200, 30, 40)):
    return Image.new("RGB", (W, H), color)


TURNS = (Turn("user", "<image>\nwhat?", 1), Turn("assistant", "a frame"))


# ---- one document


def test_expand_replaces_each_image_by_its_positions():
    visual = Visual("3x3", max_visual_tokens="10T")
    plans = [layout(size, visual, 48, 6) for size in ((144, 48), (48, 48))]
    n, m = (plan.length for plan in plans)
    assert (n, m) == (36 * 4 + 6, 36 * 2 + 6)
    ids, labels = expand([5, IMAGE, 6, IMAGE, 7], [IGNORE, IGNORE, 6, IGNORE, 7], plans)
    assert ids.tolist() == [5, *[IMAGE] * n, 6, *[IMAGE] * m, 7]
    assert labels.tolist() == [IGNORE] * (n + 1) + [6] + [IGNORE] * m + [7]
    for images in (1, 3):
        with pytest.raises(AssertionError):
            expand([IMAGE] * images, [IGNORE] * images, plans)
    assert expand([], [], [])[0].tolist() == []


def test_writer_joins_text_and_views(writer, tokenizer):
    image = picture(144, 96)
    d = writer(TURNS, [image], name="n", source="s")
    (plan,) = d.layouts
    assert plan.grid == (3, 2) and len(d.views) == 7 and (d.name, d.source) == ("n", "s")
    at = (d.ids == IMAGE).nonzero()[:, 0]
    assert len(at) == plan.length == at[-1] - at[0] + 1
    assert tokenizer.decode(d.ids[at[-1] + 1 :]) == (
        "\nwhat?<|im_end|>\n<|im_start|>assistant\na frame<|im_end|>\n"
    )
    answer = tokenizer("a frame<|im_end|>").input_ids
    assert d.labels[d.labels != IGNORE].tolist() == answer and d.learned == len(answer)
    assert d.views[0, :, 0, 0].tolist() == [200, 30, 40]


def test_several_images_get_a_base_view_each(writer):
    """As the released code: no tiling and no newline where a sample has several images."""
    turns = [Turn("user", "<image> and <image>", 2), Turn("assistant", "two")]
    d = writer(turns, [picture(144, 96), picture(40, 90, (0, 255, 0))])
    assert [p.grid for p in d.layouts] == [(0, 0), (0, 0)] and len(d.views) == 2
    assert [p.length for p in d.layouts] == [36, 36]
    assert d.views[:, :, 5, 5].tolist() == [[200, 30, 40], [0, 255, 0]], "in order of appearance"


def test_answer_ends_where_an_answer_begins(writer):
    question = writer(TURNS[:1], [picture(48, 48)], answer=True)
    whole = writer(TURNS, [picture(48, 48)])
    assert torch.equal(whole.ids[: len(question.ids)], question.ids)
    assert not question.learned


def test_too_long_names_sample_size_tokens_and_limit(tokenizer):
    visual = Visual("3x3", max_visual_tokens="10T")
    size = len(Writer(tokenizer, visual, 48, 6, "qwen_1_5")(TURNS, [picture(144, 96)]).ids)
    assert Writer(tokenizer, visual, 48, 6, "qwen_1_5", max_length=size)(TURNS, [picture(144, 96)])
    less = Writer(tokenizer, visual, 48, 6, "qwen_1_5", max_length=size - 1)
    cut = less(TURNS, [picture(144, 96)], name="page-7", source="a")
    assert len(cut.ids) == len(cut.labels) == size - 1 and len(cut.views) == cut.layouts[0].views
    assert cut.note.startswith(f"sample page-7 has {size} positions")
    assert cut.note.endswith("; the end is cut")
    short = Writer(tokenizer, visual, 48, 6, "qwen_1_5", max_length=200)
    message = (
        rf"sample page-7 has {size} positions \(264 for images of \[\(144, 96\)\] pixels\), "
        "but max_length is 200"
    )
    out = short(TURNS, [picture(144, 96)], name="page-7", source="a")
    assert re.match(message + ".*; the sample is left out", out.note) and out.source == "a"
    assert len(out.ids) == 1 and not out.learned and not out.layouts and not len(out.views)
    wordy = [replace(TURNS[0], text=f"{TURNS[0].text} {'tax ' * 500}"), *TURNS[1:]]
    assert short(wordy, [picture(48, 48)]).note.endswith("left out"), "the answer would go"
    wide = Writer(tokenizer, visual, 48, 6, "qwen_1_5")
    asked = len(wide(TURNS[:1], [picture(144, 96)], answer=True).ids)
    with pytest.raises(ValueError, match=message.replace(str(size), str(asked), 1)):
        short(TURNS[:1], [picture(144, 96)], name="page-7", answer=True)
    with pytest.raises(ValueError, match="sample x"):
        short(TURNS[:1] * 9, [picture(144, 96)] * 9, name="x", answer=True)


def test_no_supervised_token_names_the_sample(writer):
    with pytest.raises(ValueError, match="sample a-9: no supervised token"):
        writer(TURNS[:1], [picture(48, 48)], name="a-9")
    writer(TURNS[:1], [picture(48, 48)], name="a-9", answer=True)


# ---- packs


def test_pack_by_hand():
    """Two documents: positions restart, hidden state i predicts token i + 1 of its own document."""
    a = document([10, 11, 12, 13], [10, IGNORE, 12, 13], "a")
    b = document([20, 21, 22], [20, 21, IGNORE], "b")
    p = pack([a, b], 4)
    assert p.ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert p.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert p.predict.tolist() == [1, 2, 4], "a document's first token is never predicted"
    assert p.targets.tolist() == [12, 13, 21]
    assert p.owner.tolist() == [0, 0, 1]
    assert (p.lengths, p.sources) == ((4, 3), ("a", "b"))
    assert (a.learned, b.learned) == (2, 1)


def test_pack_keeps_images_in_order():
    visual = Visual("base")
    plan = layout((9, 9), visual, 4, 2)
    a = document([1, *[IMAGE] * 4, 2], [IGNORE] * 5 + [2], layouts=[plan], views=1, fill=7)
    b = document([*[IMAGE] * 4, 3], [IGNORE] * 4 + [3], layouts=[plan], views=1, fill=9)
    p = pack([a, document([5, 6], [IGNORE, 6]), b], 4)
    assert p.visual.tolist() == [1, 2, 3, 4, 8, 9, 10, 11]
    assert p.ids.tolist() == [1, 0, 0, 0, 0, 2, 5, 6, 0, 0, 0, 0, 3]
    assert p.views[:, 0, 0, 0].tolist() == [7, 9] and p.layouts == (plan, plan)
    assert p.owner.tolist() == [0, 1, 2] and p.targets.tolist() == [2, 6, 3]


def random_documents(rng, count, most=50):
    out = []
    for i in range(count):
        n = rng.randint(1, most)
        ids = [rng.randint(1, 99) for _ in range(n)]
        labels = [t if rng.random() < 0.4 else IGNORE for t in ids]
        out.append(document(ids, labels, str(i)))
    return out


def test_pack_equals_a_plain_loop():
    rng = random.Random(0)
    for _ in range(50):
        documents = random_documents(rng, rng.randint(1, 6), 12)
        p, start, expected = pack(documents, 4), 0, []
        for k, d in enumerate(documents):
            for i in range(len(d.ids) - 1):
                if d.labels[i + 1] != IGNORE:
                    expected.append((start + i, int(d.ids[i + 1]), k))
            start += len(d.ids)
        assert list(zip(p.predict.tolist(), p.targets.tolist(), p.owner.tolist())) == expected
        assert p.ids[p.predict + 1].equal(p.targets)
        assert sum(d.learned for d in documents) == len(expected)
        assert p.positions[0].eq(0).sum() == len(documents)


def test_pack_of_nothing_is_one_silent_position():
    p = pack([], 4)
    assert p.ids.tolist() == [0] and p.positions.tolist() == [[0]] and p.lengths == (1,)
    assert len(p.predict) == len(p.targets) == len(p.owner) == len(p.visual) == 0
    assert p.views.shape == (0, 3, 4, 4) and p.sources == ("",)


def test_pack_moves_and_copies():
    p = pack([document([1, 2], [1, 2], views=1)], 4)
    assert deepcopy(p) is p
    moved = p.to("meta")
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert moved.lengths == p.lengths and p.ids.device.type == "cpu"


# ---- splitting a batch


def lengths(packs):
    return [[len(d.ids) for d in group] for group in packs]


def test_split_by_hand():
    """First-fit decreasing: the longest first, each into the first pack with room."""
    documents = [document([1] * n, [1] * n) for n in (4, 8, 1, 4, 2, 1)]
    assert lengths(split(documents, 10)) == [[8, 2], [4, 4, 1, 1]]
    assert lengths(split(documents, 8)) == [[8], [4, 4], [2, 1, 1]]
    assert lengths(split(documents, 4)) == [[8], [4], [4], [2, 1, 1]], "oversize goes alone"
    assert split([], 10) == []


def test_split_loses_nothing_and_keeps_the_budget():
    rng = random.Random(1)
    for _ in range(200):
        documents, budget = random_documents(rng, rng.randint(0, 30)), rng.randint(1, 70)
        packs = split(documents, budget)
        assert sorted(d.source for g in packs for d in g) == sorted(d.source for d in documents)
        for group in packs:
            total = sum(len(d.ids) for d in group)
            assert total <= budget or len(group) == 1
        sums = [sum(row) for row in lengths(packs)]
        assert all(a + b > budget for i, a in enumerate(sums) for b in sums[:i]), "two would fit"


def test_pack_keeps_every_images_layout():
    """A document of two images beside one of one: three layouts, in their order."""
    plans = [layout(size, Visual("base"), 4, 2) for size in ((9, 9), (8, 8), (7, 7))]
    two = document([*[IMAGE] * 8, 3], [IGNORE] * 8 + [3], layouts=plans[:2], views=2)
    one = document([*[IMAGE] * 4, 3], [IGNORE] * 4 + [3], layouts=plans[2:], views=1)
    assert pack([two, one], 4).layouts == tuple(plans)
