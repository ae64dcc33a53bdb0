"""The blog's LLMs: sizes without a network, and folders of exactly the published forms."""

import inspect
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, modeling_utils

from nanollava.checkpoint import to_bf16
from nanollava.encoder import ENCODERS
from nanollava.llm import LLMS, config_of, load_llm, load_tokenizer, packed_attention
from nanollava.model import VLM
from nanollava.prompts import Turn, encode
from nanollava.recipe import Recipe
from nanollava.sequence import pack

# Parameters of the published checkpoints.
SIZES = {
    "Qwen/Qwen1.5-0.5B-Chat": 463_987_712,
    "Qwen/Qwen1.5-1.8B-Chat": 1_836_828_672,
    "Qwen/Qwen1.5-4B-Chat": 3_950_369_280,
    "Qwen/Qwen1.5-7B-Chat": 7_721_324_544,
    "Qwen/Qwen1.5-14B-Chat": 14_167_290_880,
    "Qwen/Qwen1.5-32B-Chat": 32_512_218_112,
    "Qwen/Qwen1.5-72B-Chat": 72_287_920_128,
    "Qwen/Qwen1.5-110B-Chat": 111_209_914_368,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
}


@pytest.mark.parametrize("name", LLMS)
def test_the_blogs_llms_are_known_without_a_network(name):
    with torch.device("meta"):
        model = load_llm(name, "random")
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert config_of(name, random=True).rope_theta == {
        "Qwen/Qwen1.5-4B-Chat": 5e6,
        "lmsys/vicuna-7b-v1.5": 1e4,
    }.get(name, 1e6)


@pytest.fixture
def vicuna(tmp_path):
    """A small Llama as LMSYS publishes Vicuna: tokenizer.model and pytorch_model.bin, no more."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = "A chat between a curious user and an artificial intelligence assistant. USER: what is"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{words} it? ASSISTANT: a page 1 2 3 \n"] * 50),
        pad_id=-1,
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    os.remove(tmp_path / "tokenizer.vocab")
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    torch.save(LlamaForCausalLM(config).state_dict(), tmp_path / "pytorch_model.bin")
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    return tmp_path


def test_vicunas_files_are_read_and_its_answers_learned(vicuna):
    tokenizer = load_tokenizer(str(vicuna))
    turns = [Turn("user", "what is it?"), Turn("assistant", "a page")]
    ids, labels = encode(tokenizer, turns, "vicuna_v1", "answers")
    text = tokenizer.decode(ids)
    assert "USER: what is it? ASSISTANT: a page</s>" in text
    learned = tokenizer.decode([i for i in labels if i >= 0])
    assert learned.strip() == "a page</s>"
    model = load_llm(str(vicuna))
    stored = torch.load(vicuna / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())


def test_a_pickle_with_code_is_not_run(vicuna, capfd):
    class Bomb:
        def __reduce__(self):
            return print, ("it ran",)

    torch.save({"model.embed_tokens.weight": Bomb()}, vicuna / "pytorch_model.bin")
    with pytest.raises((OSError, pickle.UnpicklingError)):
        load_llm(str(vicuna))
    assert "it ran" not in capfd.readouterr().out


def test_a_config_cannot_name_code_of_the_hub(vicuna, monkeypatch):
    """CVE-2026-4372 of transformers before 5.3: attention kernels that a config.json asks for."""
    asked, file = [], vicuna / "config.json"
    keys = json.loads(file.read_text()) | {"_attn_implementation_internal": "someone/kernels"}
    file.write_text(json.dumps(keys))
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_utils, "load_and_register_kernel", asked.append)
    for weights in ("random", "published"):
        assert load_llm(str(vicuna), weights).config._attn_implementation == "packed"
    assert not asked


@pytest.mark.parametrize("encoder", ["nano_m", "clip_l_336", "eva_8b_448"])
def test_without_a_network_it_is_said_what_to_copy_where(encoder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    row = ENCODERS[encoder]
    if row.hub:  # as small as its file's name is
        small = replace(row, width=64, blocks=1, heads=2)
        monkeypatch.setitem(ENCODERS, encoder, small)
    kept = "random" if row.stem else "published"
    told = "Qwen1.5-0.5B-Chat.*as llm" if row.stem else f"{row.published}.*as encoder_weights"
    with pytest.raises(FileNotFoundError, match=f"{told}, or set HF_HOME"):
        VLM(Recipe(encoder=encoder, encoder_weights=kept))


@pytest.mark.parity
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_rotary_tables_stay_float32_when_weights_are_cast(tmp_path, kind):
    """As on a GPU. Rounded tables are wrong only at long range: 8,000 positions are looked at."""
    config = kind(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32768,
    )
    config.save_pretrained(tmp_path)
    cast, whole = load_llm(str(tmp_path), "random"), load_llm(str(tmp_path), "random")
    to_bf16(cast)
    assert all(p.dtype == torch.bfloat16 for p in cast.parameters())
    buffers = dict(whole.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in cast.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, buffers[name]), name
    places = torch.tensor([[0, 1, 4000, 8000]])
    x = torch.zeros(1, 4, 128)
    for mine, expected in zip(
        cast.model.rotary_emb(x, places), whole.model.rotary_emb(x, places), strict=True
    ):
        assert torch.equal(mine, expected)


@pytest.mark.parity
def test_our_attentions_keywords_are_not_transformers_own(tiny_model):
    """Ours pass through its decoder as unknown keywords. In 5.24 it took `cache` for its own."""
    ours = {"documents", "packed_cache", "packed_watch"}
    assert ours <= inspect.signature(packed_attention).parameters.keys()
    decoder = tiny_model.llm.model
    for module in (tiny_model.llm, decoder, decoder.layers[0], decoder.layers[0].self_attn):
        theirs = inspect.signature(type(module).forward).parameters
        assert not ours & theirs.keys(), type(module)


@pytest.mark.parity
@pytest.mark.parametrize("images", [[], [Image.new("RGB", (48, 48))]], ids=["text", "base view"])
def test_a_pack_without_tiles_has_a_gradient_for_every_parameter(tiny_recipe, images):
    """Otherwise DDP waits for it. It is zero where the loss does not depend on the parameter."""
    model = VLM(replace(tiny_recipe, visual=replace(tiny_recipe.visual, max_grid="base")))
    turns = [Turn("user", "<image>\n" * len(images) + "what?", len(images))]
    model(pack([model.writer()([*turns, Turn("assistant", "12")], images)], 48)).mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None]
    assert not grads["newline"].any() and grads["llm.model.norm.weight"].any()
    assert any(g.any() for n, g in grads.items() if n.startswith("encoder")) == bool(images)
