"""LlavaOnevision folders: ours read by plain transformers, theirs read by us, and what is refused.

Runs in both environments. Float32 on the CPU. `pytest -m parity -s` prints the figures.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peer
import pytest
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from test_parity import documents, noise, talk, whole
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import nanollava
from nanollava.__main__ import run as command
from nanollava.anyres import best_grid, parse_grids
from nanollava.checkpoint import load, save
from nanollava.encoder import ENCODERS, build
from nanollava.evaluate import evaluate
from nanollava.hf import llava_onevision as hf
from nanollava.hf.export import difference
from nanollava.llm import load_llm
from nanollava.model import VLM
from nanollava.prompts import stop_ids
from nanollava.recipe import Recipe
from nanollava.sequence import pack

pytestmark = pytest.mark.parity
GROUPED = replace(peer.TINY, kv_heads=2, tied=False)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; like Llama's it begins every text with <s>, and has no <image>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    ends = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")]
    core.add_special_tokens(ends)
    first = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", first)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def vicuna(folder: Path) -> VLM:
    """A small CLIP before a small Llama, whose vocabulary has no room for <image>."""
    words = llama_tokenizer()
    LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.05,
    ).save_pretrained(folder)
    words.save_pretrained(folder)
    ENCODERS["tiny_clip"] = peer.clip(folder)[0]
    visual = replace(peer.MOSAIC, max_grid="2x2+1x2+1x3+2x1+3x1")
    torch.manual_seed(0)
    return VLM(
        Recipe(
            encoder="tiny_clip",
            encoder_weights="random",
            llm=str(folder),
            llm_weights="random",
            visual=visual,
            template="vicuna_v1",
            precision="fp32",
        )
    )


MAKE = {
    "siglip, tied qwen2": lambda folder: peer.ours(folder, peer.TINY),
    "siglip, untied qwen2": lambda folder: peer.ours(folder, GROUPED),
    "clip, llama": vicuna,
}


@dataclass(frozen=True)
class Case:
    """A model, and the folder that it was written to."""

    model: VLM
    folder: Path


@pytest.fixture(scope="module", params=MAKE)
def case(request, tmp_path_factory):
    """Weights are large, so that answers wander and hang on every position."""
    model = MAKE[request.param](tmp_path_factory.mktemp("llm")).eval()
    with torch.no_grad():
        for p in model.llm.model.layers.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("folder")
    hf.write(model, folder)
    return Case(model, folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The smallest case, for tests that change its files in a copy."""
    model = peer.ours(tmp_path_factory.mktemp("llm")).eval()
    folder = tmp_path_factory.mktemp("folder")
    hf.write(model, folder)
    return Case(model, folder)


@pytest.fixture
def copied(written, tmp_path):
    for file in written.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return Case(written.model, tmp_path)


def same(a: VLM, b: VLM) -> bool:
    """Are all tensors of a and b equal?"""
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in own.items())


def test_a_written_folder_gives_equal_logits_and_comes_back(case):
    apart = difference(case.model, case.folder)
    print(f"ours in transformers: {apart:.1e}")
    assert apart < 1e-5
    back = load(case.folder)
    assert replace(back.recipe, llm="", precision="fp32") == replace(
        case.model.recipe, llm="", encoder_weights="published", llm_weights="published"
    )
    own, other = case.model.state_dict(), back.state_dict()
    assert own.keys() == other.keys()
    for name, x in own.items():
        assert torch.equal(x, other[name][: len(x)]), name
        words = name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight")
        assert len(other[name]) - len(x) == (2 if words and len(x) == 258 else 0), name
        assert (other[name][len(x) :] == x.mean(0)).all()  # never the likeliest word
    apart = difference(back, case.folder)
    print(f"theirs here: {apart:.1e}")
    assert apart < 1e-5


def test_answers_equal_those_of_generate(case):
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(case.folder).eval()
    process, llava = AutoProcessor.from_pretrained(case.folder), nanollava.load(case.folder, "cpu")
    llava.model.recipe = replace(llava.model.recipe, precision="fp32")
    recipe, written = llava.model.recipe, set()
    assert theirs.generation_config.eos_token_id == stop_ids(process.tokenizer, recipe.template)
    for size, question in (((224, 140), "what is it?"), ((58, 200), "and this, then?")):
        image = noise(size)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = process.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = process(images=image, text=prompt, return_tensors="pt")
        out = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = process.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert whole(llava.chat(image, question, max_new_tokens=24)) == whole(answer)
        written |= {*llava.seen.written}
    assert len(written) > 15  # no answers that repeat one token


def test_whole_conversations_are_written_as_here(case):
    """Every turn, and one <s> whether the template or the tokenizer writes it."""
    process = AutoProcessor.from_pretrained(case.folder)
    said = ("what is it?", "a page", "and now?", "nothing", "so?")
    roles = ("user", "assistant")
    messages = [
        {"role": roles[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(said)
    ]
    image = {"role": "user", "content": [{"type": "image"}, *messages[0]["content"]]}
    prompt = process.apply_chat_template([image, *messages[1:4]])
    size = (224, 140)
    found = process(images=noise(size), text=prompt, return_tensors="pt")["input_ids"][0]
    expected = case.model.writer()(talk(*said[:4]), [noise(size)]).ids
    pictures = theirs_image(case.folder)
    assert found.tolist() == expected.masked_fill(expected < 0, pictures).tolist()
    asked = process.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = case.model.writer()(talk(*said, image=False), [], answer=True)
    assert asked["input_ids"][0].tolist() == expected.ids.tolist()

    with pytest.raises(TemplateError, match="the system prompt is fixed"):
        process.apply_chat_template([{**messages[0], "role": "system"}, *messages])


def theirs_image(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["image_token_index"]


def test_no_path_of_this_machine_is_written(case):
    for file in case.folder.iterdir():
        assert case.model.recipe.llm.encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["siglip, -1", "siglip, -2 with a head", "clip, -2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_that_transformers_made_gives_equal_logits(kind, tied, tmp_path):
    """Random weights of a config, of which we keep the blocks below the feature layer."""
    if kind == "clip, -2":
        row = ENCODERS["tiny_clip"] = peer.clip(tmp_path)[0]
        vision = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
    else:
        row = ENCODERS["tiny"] = peer.tower(peer.TINY, tmp_path)
        vision = {"model_type": "siglip_vision_model", "vision_use_head": "head" in kind}
    more = 0 if "-1" in kind else 1
    vision |= {
        "hidden_size": row.width,
        "num_hidden_layers": row.blocks + more,
        "num_attention_heads": 4,
        "image_size": row.tile,
        "patch_size": row.patch,
        "intermediate_size": int(row.width * (4 if "clip" in kind else 3.7362)),
    }
    words = peer.tokenizer()
    torch.manual_seed(0)
    theirs = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=peer.qwen2(replace(peer.TINY, tied=tied)).to_dict(),
            vision_feature_layer=-1 - more,
            vision_aspect_ratio="anyres_max_4",
            vision_feature_select_strategy="default" if "clip" in kind else "full",
            image_grid_pinpoints=[
                [b * row.tile, a * row.tile] for b in (1, 2, 3) for a in (1, 2, 3)
            ],
            image_token_index=words.convert_tokens_to_ids("<image>"),
            video_token_index=263,
            tie_word_embeddings=tied,
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.recipe.visual == replace(peer.MOSAIC, max_visual_tokens="(4+1)T")
    for document in documents(model):
        inputs = peer.batch(model, [document])
        inputs.pop("labels")
        with torch.no_grad():
            expected = theirs(**inputs).logits[0]
            row = pack([document], model.spec.tile)
            hidden = model.read(model.embed(row), row.positions, list(row.lengths))
            apart = (model.llm.lm_head(hidden) - expected).abs().max()
        print(f"{kind}: {apart:.1e}")
        assert apart < 1e-5


OLDER = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.", ""),
    (r"^vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
)
NEWER = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
)
NEWEST = (*NEWER, (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."))


@pytest.mark.parametrize("spelling", [OLDER, NEWER, NEWEST])
def test_names_of_all_times_are_read(spelling, case, tmp_path):
    for file in case.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for pattern, new in spelling:
            name = re.sub(pattern, new, name)
        state[name] = tensor
    assert ("language_model.model.norm.weight" in state) == (spelling is OLDER)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same(load(tmp_path), load(case.folder))


def test_tied_words_win_over_a_second_copy(copied):
    file = copied.folder / "model.safetensors"
    state = load_file(file)
    words = next(x for n, x in state.items() if n.endswith("embed_tokens.weight"))
    save_file(state | {"lm_head.weight": 0 * words}, file, metadata={"format": "pt"})
    assert same(load(copied.folder), copied.model)


def test_shards_are_read(case, tmp_path):
    for file in case.folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(case.folder)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    assert same(load(tmp_path), load(case.folder))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load(tmp_path)


@pytest.mark.parametrize(
    "key,value,needed",
    [
        ("visual.budget", "per_view", "'mosaic'"),
        ("visual.arrange", "flat", "'raster'"),
        ("visual.pooling", "average", "'bilinear'"),
        ("visual.pool_stride", 2, "1"),
        ("visual.lift", 2, "0"),
        ("visual.pool_after_projector", False, "True"),
        ("visual.max_grid", "base", "'tiles"),
        ("visual.max_visual_tokens", "1T", "'2T"),
        ("visual.max_visual_tokens", "130", "'2T"),
        ("projector_norm", True, "False"),
        ("template", "plain", "'qwen_1_5"),
        ("encoder", "nano_s", r"\['clip_l_224'"),
        ("encoder", "eva02_e_224", r"\['clip_l_224'"),
        ("encoder", "eva_8b_448", r"\['clip_l_224'"),
    ],
)
def test_what_llava_onevision_cannot_be_is_named(key, value, needed, written, tmp_path):
    model, recipe = written.model, written.model.recipe
    part = key.removeprefix("visual.")
    visual = replace(recipe.visual, **{part: value}) if part != key else recipe.visual
    changed = replace(recipe, visual=visual, **({} if part != key else {key: value}))
    try:
        model.recipe, model.spec = changed, ENCODERS[changed.encoder]
        told = f"{re.escape(f'{key} is {value!r}')}; expected {needed}"
        with pytest.raises(ValueError, match=told):
            hf.write(model, tmp_path / "out")
    finally:
        model.recipe, model.spec = recipe, ENCODERS[recipe.encoder]
    assert not (tmp_path / "out").exists()


def edit(folder: Path, key: str, value) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    inner = config
    *path, last = key.split(".")
    for step in path:
        inner = inner[step]
    inner[last] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "key,value,needed",
    [
        ("model_type", "llava_next", "'llava_onevision'"),
        ("model_type", "qwen2", "'llava_onevision'"),
        ("vision_config.hidden_act", "gelu", "'gelu_pytorch_tanh'"),
        ("vision_config.image_size", 74, "75"),
        ("vision_config.patch_size", 16, "14"),
        ("vision_config.hidden_size", 1024, "48"),
        ("vision_feature_layer", -2, "-1"),
        ("vision_feature_layer", [-1, -2], "-1"),
        ("vision_config.num_hidden_layers", 3, "-2"),
        ("vision_config.num_hidden_layers", 1, "0"),
        ("vision_feature_select_strategy", "default", "'full'"),
        ("vision_config.num_attention_heads", 8, "4"),
        ("vision_config.intermediate_size", 180, "179"),
        ("vision_config.layer_norm_eps", 1e-5, "1e-06"),
        ("image_grid_pinpoints", [[80, 150]], "'multiples of 75'"),
        ("image_grid_pinpoints", [], "'multiples of 75'"),
        ("vision_aspect_ratio", "pad", "'anyres_max_"),
    ],
)
def test_what_no_recipe_can_say_is_named(key, value, needed, copied):
    edit(copied.folder, key, value)
    name, given = key.split(".")[-1], value
    if name == "num_hidden_layers":
        name, given = "vision_feature_layer", -1
    told = (
        "has no recipe.yaml, so it was read as a LlavaOnevision folder: "
        f"{name} is {re.escape(repr(given))}; expected {needed}"
    )
    with pytest.raises(ValueError, match=told):
        load(copied.folder)


@pytest.mark.parametrize(
    "key,value",
    [
        ("image_mean", [0.48, 0.46, 0.41]),
        ("image_std", [0.27, 0.26, 0.28]),
        ("resample", 2),
    ],
)
def test_other_pixels_are_named(key, value, copied):
    file = copied.folder / "preprocessor_config.json"  # in transformers 5 a part of another
    file = file if file.is_file() else copied.folder / "processor_config.json"
    config = json.loads(file.read_text())
    config.get("image_processor", config)[key] = value
    file.write_text(json.dumps(config))
    told = f"{file.name}: {key} is {re.escape(repr(value))}; expected"
    with pytest.raises(ValueError, match=told):
        load(copied.folder)


def test_another_connector_is_named(copied):
    edit(copied.folder, "projector_hidden_act", "silu")
    with pytest.raises(ValueError, match="connector: 'silu' is unknown. Choose from relu, gelu"):
        load(copied.folder)


def test_a_tokenizer_without_a_known_chat_format_is_named(copied):
    words = PreTrainedTokenizerFast(tokenizer_object=peer.tokenizer().backend_tokenizer)
    words.save_pretrained(copied.folder)
    with pytest.raises(ValueError, match="special tokens is .*expected 'those of qwen_1_5 or"):
        load(copied.folder)


@pytest.mark.parametrize(
    "damage,told",
    [
        (
            lambda s, n: s.pop(n),
            r"has \[\], but .* needs .*'encoder.visual.trunk.blocks.1.mlp.fc1.bias', \(179,\)",
        ),
        (
            lambda s, n: s.update({n: s[n][1:]}),
            r"has .*blocks.1.mlp.fc1.bias', \(178,\).* needs .*fc1.bias', \(179,\)",
        ),
        (lambda s, n: s.update(odd=s[n].clone()), r"has \[\('odd', \(179,\)\)\], .* needs \[\]"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(damage, told, copied):
    file = copied.folder / "model.safetensors"
    state = load_file(file)
    damage(state, next(n for n in state if n.endswith("layers.1.mlp.fc1.bias")))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=told):
        load(copied.folder)


def test_half_a_file_and_no_file_are_told(copied):
    file = copied.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(copied.folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load(copied.folder)
    (copied.folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors, .* Train first"):
        load(copied.folder)


def nudge(folder: Path) -> None:
    """Change one number of the last block."""
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if n.endswith("layers.1.mlp.down_proj.weight"))
    state[name][0, 0] += 0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_other_number_is_a_difference(copied):
    assert difference(copied.model, copied.folder) < 1e-5
    nudge(copied.folder)
    assert difference(copied.model, copied.folder) > 1e-4


def test_other_tokens_are_told_apart(copied):
    file = copied.folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<image>\\n", "<image>"))
    n = len(copied.model.writer()(talk("What is it?"), [noise((187, 112))], answer=True).ids)
    told = rf"is {n - 1} tokens, the first \d+ as expected; expected {n} tokens"
    with pytest.raises(ValueError, match=told):
        difference(copied.model, copied.folder)


@pytest.fixture(scope="module")
def run(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(written.model, folder)
    return folder


def test_export_writes_a_folder_and_tells_the_difference(run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    command(["export", str(run), str(out)])
    told = re.search(r"differ by (\S+) at most", capsys.readouterr().out)
    assert float(told[1]) < 1e-5
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    assert same(load(out), load(run))
    with pytest.raises(SystemExit, match="out is not empty"):
        command(["export", str(run), str(out)])


def test_export_refuses_and_leaves_nothing(run, tmp_path, monkeypatch):
    write = hf.write
    monkeypatch.setattr(hf, "write", lambda *x: (write(*x), nudge(Path(x[1]))))
    with pytest.raises(SystemExit, match=r"logits differ by \S+e[-+]\d+, limit 1e-4"):
        command(["export", str(run), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_what_comes_after_works_with_the_folder(written, tmp_path, capsys):
    noise((224, 140)).save(tmp_path / "page.png")
    command(["chat", str(written.folder), str(tmp_path / "page.png"), "what?", "--max-grid", "2x2"])
    assert "saw 224x140 pixels as grid 2x2 + base view" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no tasks"):
        evaluate(nanollava.load(written.folder, "cpu"), written.folder)
    assert load_llm(str(written.folder), "random").config.model_type == "qwen2"
    with pytest.raises(ValueError, match="is a llava_onevision, not an LLM alone"):
        load_llm(str(written.folder))


@pytest.mark.parametrize("text", ["6x6", "1x1", "2x3", "2x2..2x2", "1x2+2x1", "2x1+1x2+2x2"])
def test_grids_keep_their_meaning_and_their_name(text):
    assert hf.name_grids(list(parse_grids(text))) == text


def test_the_order_of_a_whole_rectangle_decides_nothing():
    """transformers' folders count rows first, we columns."""
    theirs = [(a, b) for b in range(1, 7) for a in range(1, 7)]
    assert hf.name_grids(theirs) == "6x6" and tuple(theirs) != parse_grids("6x6")
    sizes = np.random.default_rng(0).integers(20, 3000, (2000, 2)).tolist()
    sizes += [(a * n, b * n) for a in range(1, 7) for b in range(1, 7) for n in (10, 192, 384, 900)]
    for size in sizes:
        assert best_grid(tuple(size), 384, theirs) == best_grid(
            tuple(size), 384, parse_grids("6x6")
        )


def test_published_configs_are_known():
    config = LlavaOnevisionConfig()  # its defaults are those of llava-onevision-qwen2
    assert hf.find_encoder(config) == "so400m_384"
    tower = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        num_hidden_layers=24,
        intermediate_size=4096,
        num_attention_heads=16,
    )
    config = LlavaOnevisionConfig(
        vision_config=tower, vision_feature_layer=-2, vision_feature_select_strategy="default"
    )
    assert hf.find_encoder(config) == "clip_l_336"


@pytest.mark.parametrize("name", ["clip_l_224", "clip_l_336", "so400m_384"])
def test_each_published_tower_is_transformers_by_name_shape_and_activation(name, tmp_path):
    peer.qwen2(peer.TINY).save_pretrained(tmp_path)
    peer.tokenizer().save_pretrained(tmp_path)
    model = peer.ours(tmp_path)
    model.tokenizer.add_tokens(["<video>"])
    with torch.device("meta"):
        model.spec = ENCODERS[name]
        model.encoder = build(model.spec, "random")
        theirs = LlavaOnevisionForConditionalGeneration(hf.to_config(model, model.tokenizer))
    mine = {n: p for n, p in model.named_parameters() if n.startswith("encoder.")}
    found = {}
    for their, p in theirs.named_parameters():
        ours = hf.our_name(their, model.spec)
        if ours.startswith("encoder."):
            assert hf.part(their, mine[ours]).numel() == p.numel(), their
            found[ours] = found.get(ours, 0) + p.numel()
    assert found == {n: p.numel() for n, p in mine.items()}
    x = torch.linspace(-5, 5, 1000)
    tower = theirs.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    for block, layer in zip(model.encoder.blocks, layers, strict=True):
        act = block.mlp.act if model.spec.tanh else block.mlp.gelu
        assert (act(x) - layer.mlp.activation_fn(x)).abs().max() < 1e-6
        assert block.attn.num_heads == layer.self_attn.num_heads
        norm = block.norm1 if model.spec.tanh else block.ln_1
        assert norm.eps == layer.layer_norm1.eps
