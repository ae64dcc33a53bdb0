"""The plan against what a run really does, and against published figures."""

import json
import re
from dataclasses import replace

import pytest
import torch
from launching import ROOT, command, write_recipe
from peer import stage_documents

from nanollava.cost import forward_flops, rates
from nanollava.data import prepare
from nanollava.extras.plan import Sketch, memory, padding, parts_of, plan, sketches
from nanollava.model import VLM
from nanollava.recipe import Source, Stage, read_recipe
from nanollava.sequence import Writer, pack
from nanollava.train import ComposerVLM


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return read_recipe(write_recipe(tmp_path_factory.mktemp("plan")))


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_tokens_and_flops_are_those_of_the_documents(tiny, name):
    found, real = plan(tiny)[name], stage_documents(VLM(tiny, "random"), name)
    n = len(real)
    assert n == 80 and found["samples"] == n and found["steps"] == (4 if name == "stage1" else 20)
    assert found["positions"] == pytest.approx(sum(len(d.ids) for d in real) / n)
    assert found["views"] == pytest.approx(sum(len(d.views) for d in real) / n)
    assert found["learned"] == pytest.approx(sum(d.learned for d in real) / n)
    model = VLM(tiny, "random")
    model.set_trainable(tiny.stages[name].train)
    flops = ComposerVLM(model, tiny.stages[name]).flops_per_batch(real)
    assert found["flops"] == pytest.approx(flops * found["steps"] * 4 / n)


def test_shards_and_records_tell_the_same(tiny):
    before = plan(tiny)["stage2"]
    prepare(tiny)
    after = plan(tiny)["stage2"]
    assert before.pop("known") and after.pop("known")
    assert {k: after[k] for k in ("positions", "views", "learned", "longest")} == pytest.approx(
        {k: before[k] for k in ("positions", "views", "learned", "longest")}
    )


def kept_bytes(model, packed) -> int:
    """What the backward pass keeps, parameters and the pack itself left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {x.untyped_storage().data_ptr() for x in vars(packed).values() if torch.is_tensor(x)}
    sizes, hold = {}, []

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            hold.append(x)  # or its address would be given away again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(packed).mean()
    return sum(sizes.values())


@pytest.mark.parametrize("train, again", [("projector", False), ("full", False), ("full", True)])
def test_activations_are_those_that_autograd_keeps(train, again):
    """A plain tower and nano's LLM, float32; the convolutional stem is not in the formula."""
    recipe = read_recipe(ROOT / "recipes/nano.yaml", precision="fp32")
    model = VLM(recipe).train()
    model.set_trainable(train)
    model.checkpoint_activations(again)
    model.encoder.math_on_cpu = False  # the math kernel keeps the attention matrix, too
    model.encoder.visual.conv1.requires_grad_(False)
    several = stage_documents(model, "stage2", 12)
    packed = pack(several, model.spec.tile)
    stage = Stage(train=train, checkpoint_activations=again, microbatch_tokens=1, batch_size=1)
    total = {
        "positions": len(packed.ids),
        "views": len(packed.views),
        "learned": packed.learned,
        "longest": len(packed.ids),
    }
    need = memory(recipe, stage, model, total, 1, "fp32")
    kept = kept_bytes(model, packed)
    planned = need["activations"] + need["logits"]
    print(f"{train}, recomputed {again}: kept {kept / 1e6:.1f} MB, planned {planned / 1e6:.1f} MB")
    if again:  # and, later, one block of three as a whole
        model.checkpoint_activations(False)
        assert kept < planned < kept + kept_bytes(model, packed) / 2
    else:
        assert planned == pytest.approx(kept, rel=0.1)


def test_padding_is_what_the_longest_of_eight_costs(monkeypatch):
    short, long = (Sketch(range(n), (), 1) for n in (10, 30))
    assert padding([(short, 1.0)]) == 0
    half = padding([(short, 1.0), (long, 1.0)])  # nearly every eight have a long one
    assert half == pytest.approx(30 / 20 - 1, abs=0.02)


def test_a_sample_costs_what_the_table_of_real_widths_says():
    """(4+1) x 729 visual and 350 text positions, SO400M and Qwen1.5-0.5B: GFLOP forward."""
    recipe = read_recipe(ROOT / "recipes/qwen05b.yaml")
    parts = parts_of(recipe)
    rate = rates(parts)
    writer = Writer(None, recipe.visual, 384, 27, "qwen_1_5")
    lays = writer.layouts([type("Image", (), {"size": (768, 768)})])
    length = lays[0].tokens + 350
    forward = forward_flops(rate, [Sketch(range(length), lays, 170)], 729, True)
    assert length == 3995
    assert forward["encoder"] + forward["stem"] == pytest.approx(3209e9, rel=0.01)
    assert forward["llm"] + forward["attention"] == pytest.approx(3248e9, rel=0.01)
    assert forward["lm_head"] == pytest.approx(53e9, rel=0.01)


def fits(name, **keys) -> dict:
    recipe = read_recipe(ROOT / f"recipes/{name}.yaml")
    return plan(replace(recipe, shard=keys.pop("shard", recipe.shard)), **keys)


def test_what_does_not_fit_names_the_key_to_change():
    small = fits("qwen05b", device="4090")["stage2"]
    assert "stages.stage2.checkpoint_activations=true" in small["change"]
    large = fits("blog/qwen_72b", device="h100", devices=8)["stage2"]
    assert "times as many devices" in large["change"] and "shard=true" not in large["change"]
    whole = fits("blog/qwen_7b", device="h100", devices=8, shard=False)["stage2"]
    assert whole["change"].startswith("shard=true and at least")
    assert not fits("blog/qwen_7b", device="h100", devices=8)["stage2"]["change"]


def machines(text: str) -> int:
    """How many processes a recipe's header starts."""
    head = text.split("\nbase:")[0]
    found = re.search(r"--world_size (\d+)", head) or re.search(r"composer -n (\d+) recipes", head)
    return int(found[1]) if found and "on one GPU:" not in head else 1


@pytest.mark.parametrize(
    "name",
    [
        "qwen05b",
        "qwen05b_release",
        "clip_l_336_vicuna7b",
        *(f"blog/{f.stem}" for f in sorted((ROOT / "recipes/blog").glob("*.yaml"))),
    ],
)
def test_every_stage_of_a_recipe_fits_where_its_header_starts_it(name):
    count = machines((ROOT / f"recipes/{name}.yaml").read_text())
    for stage, found in fits(name, devices=count).items():
        assert not found["change"], (stage, found["memory"], found["change"])


def test_sources_that_cannot_be_looked_at_are_assumed_and_said_so():
    recipe = read_recipe(ROOT / "recipes/qwen05b.yaml")
    found = plan(recipe)["stage2"]
    assert found["known"] == {"llava_next_779k": "assumed"}
    assert found["samples"] == 779_289 and found["steps"] == 779_289 // 64
    bare = replace(recipe.sources["blip558k"], assume=type(recipe.sources["blip558k"].assume)())
    recipe = replace(recipe, sources={"blip558k": bare})
    with pytest.raises(
        ValueError, match="sources.blip558k has neither shards nor `assume.sizes`: run prepare"
    ):
        sketches(recipe, "blip558k", None)


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ({"640": 1.0}, "640: 1.0"),
        ({"0x480": 1.0}, "0x480: 1.0"),
        ({"640x480": 70.0}, "640x480: 70.0"),
        ({"none": 0.0}, "none: 0.0"),
    ],
)
def test_assumptions_that_mean_nothing_are_refused(sizes, given):
    recipe = read_recipe(ROOT / "recipes/qwen05b.yaml")
    source = recipe.sources["blip558k"]
    wrong = replace(source, assume=replace(source.assume, sizes=sizes))
    recipe = replace(recipe, sources={"blip558k": wrong})
    message = (
        f"sources.blip558k.assume.sizes has {given}. Give .* such as 640x480: 0.7 or none: 0.3"
    )
    with pytest.raises(ValueError, match=message):
        sketches(recipe, "blip558k", None)


def test_a_source_of_unknown_size_or_without_records_is_named(tmp_path, tiny):
    own = tmp_path / "own.py"
    own.write_text("def some(**_):\n    yield {'id': 'a', 'image': [b'?'], 'conversations': []}\n")
    sources = {"mine": Source(f"{own}:some")}
    with pytest.raises(
        ValueError, match="sources.mine has an unknown number.*: set `samples` or `expected`"
    ):
        sketches(replace(tiny, sources=sources), "mine", None)
    sources = {"mine": Source(f"{own}:some", samples=1)}
    recipe = replace(tiny, sources=sources)
    with pytest.raises(ValueError, match="sources.mine: none of its first records can be read"):
        sketches(recipe, "mine", VLM(recipe, "random").writer(recipe.visual))


@pytest.mark.parametrize("keys", [{"device": "tpu"}, {"devices": 0}, {"share": 0.0}])
def test_impossible_machines_are_refused(tiny, keys):
    with pytest.raises(ValueError, match="give 1 or more of h200.*share above 0"):
        plan(tiny, **keys)


def test_the_command_prints_a_table_or_json(tmp_path):
    printed = command("-m", "nanollava", "plan", ROOT / "recipes/nano.yaml")
    assert "padding would add" in printed and "stage1_5" in printed
    stages = json.loads(command("-m", "nanollava", "plan", ROOT / "recipes/nano.yaml", "--json"))
    assert list(stages) == ["stage1", "stage1_5", "stage2"] and stages["stage2"]["flops"] > 1e12
