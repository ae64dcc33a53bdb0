"""Packed rows equal separate documents, and both equal transformers' LlavaOnevision.

Runs in both environments. Float32 on the CPU. `pytest -m parity -s` prints the figures.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import peer
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from nanollava import generate
from nanollava.anyres import Visual, layout
from nanollava.cost import forward_flops, rates, step_flops
from nanollava.encoder import build
from nanollava.extras.why import attention
from nanollava.generate import Assistant
from nanollava.hf import llava_onevision as hf
from nanollava.llm import load_tokenizer
from nanollava.model import TRAIN, VLM
from nanollava.prompts import Turn, encode
from nanollava.recipe import with_visual
from nanollava.sequence import Document, pack

pytestmark = pytest.mark.parity
# Float32 itself: gradients of q and k are small differences of large numbers (3e-7 to 1.4e-6 seen).
WORST = 3e-6
SIZES = {"tied": peer.TINY, "grouped, untied": replace(peer.TINY, kv_heads=2, tied=False)}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of (W, H) in which no two places look the same."""
    w, h = size
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def talk(*texts: str, image: bool = True) -> list[Turn]:
    """Questions and answers in turn, the first one about an image."""
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [Turn("user", f"<image>\n{texts[0]}", 1), *turns[1:]] if image else turns


def documents(model: VLM) -> list[Document]:
    """Grids 3x2 (a raster that is shrunk), 1x1, 1x3 (odd padding); two turns; no image."""
    write = model.writer()
    return [
        write(talk("what is it?", "a page"), [noise((224, 140), 1)]),
        write(talk("and this", "x"), [noise((60, 75), 2)]),
        write(talk("no picture", "none to see", image=False), []),
        write(talk("read", "12", "again", "12, as I said"), [noise((58, 200), 3)]),
    ]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Distance of two gradients over their length, and the worst parameter's largest difference
    over its largest gradient."""
    assert found.keys() == expected.keys()
    minus = {n: found[n] - g for n, g in expected.items()}
    worst = max((minus[n].abs().max() / g.abs().max()).item() for n, g in expected.items())
    far, long = (torch.cat([x.flatten() for x in g.values()]).norm() for g in (minus, expected))
    return (far / long).item(), worst


def logits(model: VLM, run: Callable[[], object]) -> torch.Tensor:
    """What the lm_head gives while `run` runs, float[K, vocabulary]."""
    seen = []
    hook = model.llm.lm_head.register_forward_hook(lambda *x: seen.append(x[2].detach()))
    run()
    hook.remove()
    return torch.cat(seen)


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    """Our model and the peer with the same weights."""
    folder = tmp_path_factory.mktemp("parity")
    model = peer.ours(folder, SIZES[request.param])
    return model, peer.peer_of(model)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return peer.ours(tmp_path_factory.mktemp("parity"))


def test_packed_equals_one_at_a_time(pair):
    model, _ = pair
    all_of_them = documents(model)
    packed = pack(all_of_them, model.spec.tile)
    assert len({d.layouts[0].grid for d in all_of_them if d.layouts}) == 3
    loss = model(packed).mean()
    packed_gradients = gradients(model, loss)
    rows = [model(pack([d], model.spec.tile)) for d in all_of_them]
    alone = torch.cat(rows).mean()
    whole, worst = apart(packed_gradients, gradients(model, alone))
    print(f"packed, alone: loss {abs(loss - alone):.1e}, gradients {whole:.1e}, worst {worst:.1e}")
    assert abs(loss - alone) < 1e-6
    assert whole < 1e-6 and worst < WORST


def test_first_step_equals_llava_onevision(pair):
    model, other = pair
    all_of_them = documents(model)
    loss = model(pack(all_of_them, model.spec.tile)).mean()
    theirs = other(**peer.batch(model, all_of_them)).loss
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for name, g in gradients(other, theirs).items():
        place = hf.part(name, expected[hf.our_name(name, model.spec)])
        place.copy_(g.view_as(place))
    whole, worst = apart(gradients(model, loss), expected)
    print(f"ours, peer: loss {abs(loss - theirs):.1e}, gradients {whole:.1e}, worst {worst:.1e}")
    assert abs(loss - theirs) < 2e-6
    assert whole < 1e-6 and worst < WORST


def test_padding_is_cut_as_in_the_peer(pair):
    """Float32 hides nothing here: another unpadding, newline or order is another length or loss."""
    model, other = pair
    for size in ((75, 75), (400, 75), (75, 300), (151, 149), (31, 220), (230, 64)):
        document = model.writer()(talk("what is it?", "a page"), [noise(size)])
        with torch.no_grad():
            loss = model(pack([document], model.spec.tile)).mean()
            theirs = other(**peer.batch(model, [document])).loss
        assert abs(loss - theirs) < 2e-6, size


def test_clip_features_are_the_last_but_one_layer_without_the_class_token(tmp_path):
    torch.manual_seed(0)
    row, theirs = peer.clip(tmp_path)
    encoder = build(row, "random").eval()
    peer.copy_clip(encoder.visual, theirs, row)
    views = torch.randint(0, 256, (2, 3, row.tile, row.tile), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (row.mean, row.std))
    pixels = (views / 255 - mean) / std
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = encoder(views)
    assert features.shape == (2, row.side**2, row.width)
    assert (features - expected).abs().max() < 1e-5
    encoder(views).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())  # nothing is left over


def test_documents_do_not_see_each_other(model):
    before = documents(model)
    after = [*before]
    after[1] = replace(after[1], ids=after[1].ids.clone(), views=255 - after[1].views)
    after[1].ids[-9] = 7
    packs = [pack(d, model.spec.tile) for d in (before, after)]
    others = packs[0].owner != 1
    with torch.no_grad():
        a, b = (logits(model, partial(model, p)) for p in packs)
        assert (a - b)[others].abs().max() <= 1e-6
        assert (a - b)[~others].abs().max() > 1e-3
        try:
            recipe, model.recipe = model.recipe, replace(model.recipe, isolate_documents=False)
            a, b = (logits(model, partial(model, p)) for p in packs)
        finally:
            model.recipe = recipe
    assert (a - b)[packs[0].owner > 1].abs().max() > 1e-4
    assert (a - b)[packs[0].owner == 0].abs().max() <= 1e-6  # it comes first


def peer_answers(model: VLM, other, prompts: list[Document], room: int) -> list[list[int]]:
    """What the peer's `generate` writes after a left-padded batch, without the end of turn."""
    out = peer.write(other, peer.batch(model, prompts, left=True), room)
    stop = other.generation_config.eos_token_id
    return [ids[: [*ids, stop].index(stop)] for ids in out]


def our_answers(model: VLM, prompts: list[Document], room: int) -> list[list[int]]:
    steps = list(Assistant(model).stream(prompts, room))
    return [[t for t in column if t is not None] for column in zip(*steps, strict=True)]


def whole(text: str) -> str:
    """Without half a character at the end, where a random model stops."""
    return text.rstrip("\ufffd")


@pytest.fixture(scope="module", params=SIZES)
def speakers(request, tmp_path_factory):
    """A pair with large weights, whose answers wander and hang on every position."""
    model = peer.ours(tmp_path_factory.mktemp("speak"), SIZES[request.param]).eval()
    with torch.no_grad():
        for p in model.llm.model.layers.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model, peer.peer_of(model)


def prompts(model: VLM) -> list[Document]:
    """Four questions of different lengths on different grids, one without an image."""
    write = model.writer()
    return [
        write(talk("what is it?"), [noise((224, 140), 1)], answer=True),
        write(talk("and this, then?"), [noise((60, 75), 2)], answer=True),
        write(talk("no picture", image=False), [], answer=True),
        write(talk("read", "12", "again"), [noise((58, 200), 3)], answer=True),
    ]


def test_generation_equals_the_peer(speakers, monkeypatch):
    model, other = speakers
    asked = prompts(model)
    free = our_answers(model, asked, 24)
    assert len({t for ids in free for t in ids}) > 30  # no answer that repeats one token
    assert free == [our_answers(model, [d], 24)[0] for d in asked]
    assert free == [peer_answers(model, other, [d], 24)[0] for d in asked]
    soon = free[0][5]  # a token that ends the first answer early and leaves another going
    monkeypatch.setattr(generate, "stop_ids", lambda *_: [soon])
    monkeypatch.setattr(other.generation_config, "eos_token_id", soon)
    short = our_answers(model, asked, 24)
    assert short == peer_answers(model, other, asked, 24)
    assert len(short[0]) <= 5 and max(map(len, short)) > 5
    decode = model.tokenizer.batch_decode
    answers = [text for text, _ in Assistant(model).answer(asked, 24)]
    assert answers == decode(short, skip_special_tokens=True)


def test_chat_equals_the_peer_and_reuses_the_image(speakers):
    model, other = speakers
    image, first, second = noise((224, 140), 1), "what is it?", "what is the tax?"
    asked = (talk(first), talk(second), talk(first, "a page", second))
    prompts = [model.writer()(turns, [image], answer=True) for turns in asked]
    wanted = [peer_answers(model, other, [d], 24)[0] for d in prompts]
    decoded = model.tokenizer.batch_decode(wanted, skip_special_tokens=True)
    expected, assistant = [whole(text) for text in decoded], Assistant(model)

    def chat(*args) -> str:
        return whole(assistant.chat(*args, max_new_tokens=24))

    assert chat(image, first) == expected[0]
    assert assistant.seen.reused == 0
    assert chat(image, second) == expected[1]
    plan = layout(image.size, model.recipe.visual, model.spec.tile, model.spec.side)
    assert plan.length < assistant.seen.reused < len(assistant.seen.document.ids)
    history = [(first, "a page")]
    assert chat(image, second, history) == expected[2]
    assert chat(image, second, history) == expected[2]
    assert assistant.seen.reused == len(assistant.seen.document.ids) - 1  # the same question again
    pieces = assistant.chat(image, first, max_new_tokens=24, stream=True)
    assert whole("".join(pieces)) == expected[0]
    assert chat(noise(image.size, 9), first) != expected[0]
    assert assistant.seen.reused == 0


def test_reused_keys_and_values_change_no_logit(speakers):
    """A token that sees one position too few among 200 may still say the same."""
    model, _ = speakers
    image, assistant = noise((224, 140), 1), Assistant(model)
    assistant.chat(image, "what is it?", max_new_tokens=8)
    ask = partial(Assistant.chat, images=image, text="what is the tax?", max_new_tokens=8)
    warm, cold = (logits(model, partial(ask, x)) for x in (assistant, Assistant(model)))
    assert assistant.seen.reused > 100
    assert (warm - cold).abs().max() <= 1e-5 * cold.abs().max()


OTHER = {  # every visual key away from what the tests' model has
    "max_grid": "2x2",
    "lift": 5,
    "max_visual_tokens": "5T",
    "budget": "per_view",
    "pooling": "average",
    "pool_stride": 2,
    "pool_after_projector": False,
    "arrange": "flat",
}


@pytest.mark.parametrize("key", [f.name for f in fields(Visual)])
def test_a_visual_key_that_changes_between_two_questions_is_followed(speakers, key):
    """What the first question left is used again only where the second would compute the same."""
    model, _ = speakers
    image, base = noise((224, 140), 1), replace(model.recipe.visual, budget="per_view")
    start = {"budget": "per_view", "max_visual_tokens": "6T"} if key != "budget" else {}
    assert OTHER[key] != start.get(key, getattr(base if start else model.recipe.visual, key))
    ask = partial(Assistant.chat, images=image, text="what is it?", max_new_tokens=4)
    assistant = Assistant(model)
    ask(assistant, **start)
    changed = start | {key: OTHER[key]}
    warm, cold = (logits(model, partial(ask, x, **changed)) for x in (assistant, Assistant(model)))
    assert (warm - cold).abs().max() <= 1e-5 * cold.abs().max()
    together = [
        model.writer(with_visual(model.recipe, keys).visual)(talk(text), [image], answer=True)
        for keys in (start, changed)
        for text in ("what is it?", "what is the tax?")
    ]
    assert Assistant(model).answer(together, 4) == [
        Assistant(model).answer([document], 4)[0] for document in together
    ]


@torch.no_grad()
def test_where_an_answer_looked_equals_eager_attention(speakers):
    model, _ = speakers
    assistant, eager = Assistant(model), deepcopy(model.llm)
    assistant.chat(noise((224, 140), 1), "what is it?", max_new_tokens=6)
    seen = assistant.seen
    ids = torch.cat([seen.document.ids, torch.tensor(seen.written)])
    row = pack([replace(seen.document, ids=ids, labels=ids)], model.spec.tile)
    eager.set_attn_implementation("eager")
    layers = eager.model(
        inputs_embeds=model.embed(row), position_ids=row.positions, output_attentions=True
    ).attentions  # (1, H, S, S) each
    start, looks = len(seen.document.ids), torch.stack(layers).mean((0, 1, 2))
    expected, found = (
        looks[start - 1 : -1, :start].mean(0),
        attention(model, seen.document, seen.written),
    )
    assert (found - expected).abs().max() <= 1e-6 and 0.5 < found.sum() < 1


def test_views_and_tokens_equal_the_processor(model):
    """Through the processor's public door, on a few hundred sizes of every shape."""
    row, visual, process = model.spec, model.recipe.visual, peer.processor(model)
    sizes = np.random.default_rng(0).integers(20, 400, (240, 2)).tolist()
    sizes += [(400, 20), (20, 400), (75, 75), (150, 75), (151, 149), (375, 75), (391, 10)]
    for size in map(tuple, sizes):
        found = process(images=Image.new("RGB", size), text="<image>", return_tensors="pt")
        plan = layout(size, visual, row.tile, row.side)
        image = model.tokenizer.convert_tokens_to_ids("<image>")
        assert (found["input_ids"] == image).sum() == plan.length, size
        assert found["pixel_values"].shape[1] == plan.views, size


def test_a_folder_keeps_its_own_tokenizer(tmp_path):
    """transformers 5 would cut words as Qwen2 does, config.json being Qwen2's."""
    peer.qwen2(peer.TINY).save_pretrained(tmp_path)
    folder = Path(__file__).parents[1] / "recipes" / "nano" / "tokenizer"
    alone = PreTrainedTokenizerFast.from_pretrained(str(folder))
    alone.save_pretrained(tmp_path)
    beside = load_tokenizer(str(tmp_path))
    turns = talk("What is the tax of 305?\n\nthe  é <|im_end|>", "12")
    assert encode(beside, turns, "qwen_1_5") == encode(alone, turns, "qwen_1_5")
    assert len(alone("tax 305", add_special_tokens=False)["input_ids"]) == 4


@pytest.mark.parametrize("train", ["projector", "projector+llm", "full"])
@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_counted_flops_are_the_useful_ones(model, train, after):
    visual = replace(model.recipe.visual, pool_after_projector=after)
    model.recipe = replace(model.recipe, visual=visual)
    model.set_trainable(train)
    all_of_them = documents(model)
    packed = pack(all_of_them, model.spec.tile)
    counted = peer.count(lambda: model(packed).mean().backward())
    forward = forward_flops(rates(model), all_of_them, model.spec.side**2, after)
    useful = step_flops(forward, TRAIN[train])
    print(f"{train}: counted {counted:,}, useful {useful:,}, {counted / useful - 1:+.2%}")
    assert abs(counted / useful - 1) < 0.01


@pytest.mark.parametrize("name,waste,gain", [("2x2", 0.15, 1.25), ("6x6", 0.37, 1.6)])
def test_a_step_computes_less_than_the_padded_peer(tmp_path, monkeypatch, name, waste, gain):
    """Target C4, counted at the "quarter" size without computing anything."""
    model = peer.bench_model(tmp_path, name)
    four = peer.bench_documents(model, name)
    lengths = [len(d.ids) for d in four]
    assert abs(1 - sum(lengths) / (4 * max(lengths)) - waste) < 0.01
    forward = forward_flops(rates(model), four, model.spec.side**2, after=True)
    mine = step_flops(forward, TRAIN["full"])  # exact: see above
    views, other = sum(len(d.views) for d in four), peer.peer_of(model, "meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # "meta" has none
    theirs = peer.count(lambda: peer.padded_step(other, views, 4, max(lengths)))
    print(f"{name}: ours {mine / 1e12:.3f} TFLOP, peer {theirs / 1e12:.3f}: {theirs / mine:.2f}x")
    assert theirs >= gain * mine


def test_the_padded_peer_is_counted_as_it_runs(model, monkeypatch):
    """The part-by-part step on "meta" against a whole one, at a size that can be run."""
    all_of_them = documents(model)
    inputs, other = peer.batch(model, all_of_them), peer.peer_of(model)
    ran = peer.count(lambda: other(**inputs).loss.backward())
    views, shape = sum(len(d.views) for d in all_of_them), inputs["input_ids"].shape
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    parts = peer.count(lambda: peer.padded_step(peer.peer_of(model, "meta"), views, *shape))
    assert abs(parts / ran - 1) < 1e-3
