"""LlavaOnevision folders of transformers, read and written.

    keys, state = read("llava-onevision-qwen2-0.5b-ov-hf")  # recipe keys; our names -> tensors
    write(model, "out")  # plain transformers opens it; `export` compares the logits

LlavaOnevision is the released code's model: `budget: mosaic` and all that goes with it. It and
ours agree on questions about one image; of several it pads each to a square and adds a newline.
"""

import json
import re
from copy import deepcopy
from pathlib import Path
from string import Template
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nanollava.anyres import Visual, parse_budget, parse_grids
from nanollava.encoder import ENCODERS, EncoderSpec, build
from nanollava.files import load_tensors
from nanollava.llm import load_tokenizer
from nanollava.prompts import PLACEHOLDER, TEMPLATES, stop_ids

# A tensor in transformers, in the older or the newer spelling | in ours.
NAMES = (
    (r"^image_newline", "newline"),
    (r"^multi_modal_projector\.linear_1", "projector.0"),
    (r"^multi_modal_projector\.linear_2", "projector.2"),
    (r"^(language_model\.)?lm_head", "llm.lm_head"),
    (r"^language_model\.(model\.)?", "llm.model."),
)
# In a vision tower of transformers | in timm's SigLIP | in open_clip's CLIP.
TOWER = (
    (r"^vision_tower\.(vision_model\.)?", "encoder.visual.trunk.", "encoder.visual."),
    (r"embeddings\.class_embedding", "cls_token", "class_embedding"),
    (r"embeddings\.patch_embedding", "patch_embed.proj", "conv1"),
    (r"embeddings\.position_embedding\.weight", "pos_embed", "positional_embedding"),
    (r"pre_layrnorm", "norm_pre", "ln_pre"),
    (r"encoder\.layers", "blocks", "transformer.resblocks"),
    (r"layer_norm", "norm", "ln_"),
    (r"self_attn\.[qkv]_proj\.", "attn.qkv.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.fc2", "mlp.c_proj"),
)
CHAT = Template(
    "{{ $start }}{% for message in messages %}{% set asked = message['role'] == 'user' %}"
    "{{ $user if asked else $assistant if message['role'] == 'assistant' else raise_exception("
    "'roles are user and assistant; the system prompt is fixed') }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ $after if asked else $end }}{% endfor %}{{ $ask if add_generation_prompt else '' }}"
)


def need(able: bool, key: str, given: Any, expected: Any) -> None:
    """Raises ValueError with the other three unless `able`."""
    if not able:
        raise ValueError(f"{key} is {given!r}; expected {expected!r}")


def tower(spec: EncoderSpec) -> dict[str, Any]:
    """An encoder in words of config.json; empty where LlavaOnevision has no such tower."""
    if not (spec.tanh or "quickgelu" in spec.open_clip):  # neither SigLIP, which has tanh, nor CLIP
        return {}
    return {
        "model_type": "siglip_vision_model" if spec.tanh else "clip_vision_model",
        "image_size": spec.tile,
        "patch_size": spec.patch,
        "hidden_size": spec.width,
        "hidden_act": "gelu_pytorch_tanh" if spec.tanh else "quick_gelu",
        "vision_feature_select_strategy": "full" if spec.tanh else "default",  # no class token
    }


def sizes(block: nn.Module) -> dict[str, Any]:
    """What a block of an encoder says in words of config.json."""
    return {
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": len(next(block.mlp.parameters())),
        "layer_norm_eps": next(m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)),
    }


def our_name(name: str, spec: EncoderSpec) -> str:
    """The tensor of ours that holds one of theirs; q, k and v of a vision tower share one.

    Empty for what nothing uses: blocks after the feature layer, the norm after them, the head.
    """
    name = name.removeprefix("model.")
    vision, block = name.startswith("vision_tower."), re.search(r"layers\.(\d+)", name)
    late = block and int(block[1]) >= spec.blocks
    if vision and (late or re.search(r"post_layernorm|\.head\.", name)):
        return ""
    for theirs, *ours in TOWER if vision else NAMES:
        name = re.sub(theirs, ours[0 if spec.tanh else -1], name)
    return name


def third(name: str) -> int | None:
    """Which third of ours a tensor of theirs is; None for the whole."""
    found = re.search(r"vision_tower.*self_attn\.([qkv])_proj", name)
    return "qkv".index(found[1]) if found else None


def part(name: str, whole: Tensor) -> Tensor:
    """The share of our tensor that a tensor of theirs holds."""
    return whole if third(name) is None else whole.chunk(3)[third(name)]


@torch.no_grad()
def copy(mine: dict[str, Tensor], theirs: nn.Module, spec: EncoderSpec) -> None:
    """Our tensors into transformers' model; rows beyond ours are new words."""
    for name, p in theirs.named_parameters():
        if ours := our_name(name, spec):
            whole = part(name, mine[ours]).reshape(-1, *p.shape[1:])  # timm has pos_embed[1, T, C]
            p[: len(whole)] = whole
            p[len(whole) :] = whole.mean(0)  # the mean word is never the likeliest


def name_grids(grids: list[tuple[int, int]]) -> str:
    """The `max_grid` that means these; in a whole rectangle their order decides nothing."""
    last = "{}x{}".format(*max(grids))
    if {*parse_grids(last)} == {*grids}:
        return last
    return "+".join("{}x{}".format(*grid) for grid in grids) if grids[1:] else f"{last}..{last}"


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LlavaOnevision folder -> the recipe's keys, and its tensors under our names.

    Raises ValueError, naming the key of config.json, for what no recipe can say.
    """
    folder = Path(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind, there = config.model_type, f"{folder}, which has no recipe.yaml: "
    need(kind == "llava_onevision", f"{there}model_type", kind, "llava_onevision")
    encoder, ratio = find_encoder(config, there), config.vision_aspect_ratio
    R, pinpoints = ENCODERS[encoder].tile, config.image_grid_pinpoints  # H, W
    whole = pinpoints and not any(side % R for pair in pinpoints for side in pair)
    need(whole, f"{there}image_grid_pinpoints", pinpoints, f"multiples of {R}")
    number = re.fullmatch(r"anyres_max_([1-9]\d*)", ratio)
    need(number, f"{there}vision_aspect_ratio", ratio, "anyres_max_9 or another number")
    words = load_tokenizer(str(folder)).all_special_tokens
    fit = [n for n, form in TEMPLATES.items() if form.specials and {*form.specials} <= {*words}]
    need(fit, f"{folder}: special tokens", words, "those of qwen_1_5 or vicuna_v1")
    visual = {
        "max_grid": name_grids([(w // R, h // R) for h, w in pinpoints]),
        "max_visual_tokens": f"({number[1]}+1)T",
        "budget": "mosaic",
    }
    keys = {
        "encoder": encoder,
        "connector": config.projector_hidden_act,
        "llm": str(folder),
        "template": fit[0],
        "visual": visual,
    }
    check_pixels(folder, ENCODERS[encoder])
    state = read_tensors(folder, ENCODERS[encoder])
    if config.get_text_config().tie_word_embeddings:
        state.pop("llm.lm_head.weight", None)  # some folders hold it twice
    return keys, state


def find_encoder(config: transformers.LlavaOnevisionConfig, there: str) -> str:
    """The encoder with that tower and feature layer; ValueError says what the nearest one has."""
    above = ("vision_feature_layer", "vision_feature_select_strategy")
    given = config.vision_config.to_dict() | {key: getattr(config, key) for key in above}
    layers = given["num_hidden_layers"]  # their layer -1 is the output of the last of these blocks
    known = {
        name: tower(spec) | {"vision_feature_layer": spec.blocks - layers - 1}
        for name, spec in ENCODERS.items()
        if tower(spec)
    }
    name = max(known, key=lambda n: sum(given.get(k) == v for k, v in known[n].items()))
    with torch.device("meta"):
        block = build(ENCODERS[name], "random").blocks[0]
    for key, value in (known[name] | sizes(block)).items():
        need(given.get(key) == value, f"{there}{key}", given.get(key), value)
    return name


def check_pixels(folder: Path, spec: EncoderSpec) -> None:
    """Raises ValueError where a folder's images are not prepared as the encoder's spec says."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        given = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        given = given.get("image_processor", given)  # transformers 5 has all in one file
        for key, value in (("image_mean", spec.mean), ("image_std", spec.std), ("resample", (3,))):
            found = given.get(key, value)  # 3: bicubic
            near = torch.allclose(torch.tensor(found).float(), torch.tensor(value).float())
            need(near, f"{folder / name}: {key}", found, value)


def read_tensors(folder: Path, spec: EncoderSpec) -> dict[str, Tensor]:
    """The tensors of all files under our names."""
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = {*json.loads(index.read_text())["weight_map"].values()}
    theirs = {name: x for file in files for name, x in load_tensors(folder / file).items()}
    state: dict[str, Tensor] = {}
    for name in sorted(theirs, key=lambda n: third(n) or 0):  # q, then k, then v
        if ours := our_name(name, spec):
            x = theirs[name][None] if ours.endswith("pos_embed") else theirs[name]
            state[ours] = torch.cat([state[ours], x]) if ours in state else x
    return state


def check(recipe: Any, spec: EncoderSpec) -> None:
    """Raises ValueError, naming the key of the recipe, for what LlavaOnevision cannot be."""
    visual, T = recipe.visual, spec.side**2
    for key, value in vars(Visual(budget="mosaic")).items():
        if key not in ("max_grid", "max_visual_tokens"):
            need(getattr(visual, key) == value, f"visual.{key}", getattr(visual, key), value)
    tau, tokens = parse_budget(visual.max_visual_tokens, T), visual.max_visual_tokens
    need(tau % T == 0 and tau > T, "visual.max_visual_tokens", tokens, "2T, 3T or more")
    need(visual.max_grid != "base", "visual.max_grid", "base", "tiles, as in 5grids")
    need(not recipe.projector_norm, "projector_norm", True, False)
    need(tower(spec), "encoder", recipe.encoder, [n for n, r in ENCODERS.items() if tower(r)])
    need(recipe.template != "plain", "template", "plain", "qwen_1_5 or vicuna_v1")


def to_config(model: Any, words: Any) -> transformers.LlavaOnevisionConfig:
    """A VLM's sizes and settings; `words` is its tokenizer with `<image>`."""
    spec, tiles, block = model.spec, model.recipe.visual, model.encoder.blocks[0]
    vision, text, R, T = tower(spec), model.llm.config.to_dict(), spec.tile, spec.side**2
    image, video = words.convert_tokens_to_ids([PLACEHOLDER, "<video>"])
    return transformers.LlavaOnevisionConfig(
        vision_feature_select_strategy=vision.pop("vision_feature_select_strategy"),
        vision_config=vision
        | sizes(block)
        | {"num_hidden_layers": spec.blocks, "vision_use_head": False},
        text_config=text
        | {
            "vocab_size": max(text["vocab_size"], image + 1, video + 1),
            "_name_or_path": "",
            "dtype": "float32",
        },
        image_token_index=image,
        video_token_index=video,
        projector_hidden_act=model.recipe.connector,
        vision_aspect_ratio=f"anyres_max_{parse_budget(tiles.max_visual_tokens, T) // T - 1}",
        image_grid_pinpoints=[[b * R, a * R] for a, b in parse_grids(tiles.max_grid)],
    )


def write(model: Any, folder: str | Path) -> None:
    """A VLM -> a folder that plain transformers opens: the model, its tokenizer and processor.

    Raises ValueError, naming the key of the recipe, for what LlavaOnevision cannot be.
    """
    spec, form, words = model.spec, TEMPLATES[model.recipe.template], deepcopy(model.tokenizer)
    check(model.recipe, spec)
    words.add_tokens([PLACEHOLDER, "<video>"], special_tokens=True)
    names = ["input_ids", "attention_mask"]  # what `generate` takes
    words.init_kwargs["model_input_names"] = words.model_input_names = names  # saved only as both
    config, ends = to_config(model, words), stop_ids(words, model.recipe.template)
    theirs = transformers.LlavaOnevisionForConditionalGeneration(config)
    copy(dict(model.named_parameters()), theirs, spec)
    pad = ends[0] if words.pad_token_id is None else words.pad_token_id
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    theirs.save_pretrained(folder)
    pixels = {
        "size": {"height": spec.tile, "width": spec.tile},
        "image_mean": spec.mean,
        "image_std": spec.std,
    }
    grids, strategy = config.image_grid_pinpoints, config.vision_feature_select_strategy
    texts = {
        "start": form.start.removeprefix("<s>"),
        "user": form.user[0],
        "after": form.user[1],
        "assistant": form.assistant,
        "ask": form.assistant.rstrip(" "),
        "end": form.end + form.after,
    }
    transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessorFast(**pixels, image_grid_pinpoints=grids),
        words,
        transformers.LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=spec.side**2 + (strategy == "default"),  # it takes the class token off
        vision_feature_select_strategy=strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=CHAT.substitute({key: json.dumps(text) for key, text in texts.items()}),
    ).save_pretrained(folder)
