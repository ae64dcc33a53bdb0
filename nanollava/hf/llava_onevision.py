"""LlavaOnevision folders of transformers, read and written.

    keys, state = read("llava-onevision-qwen2-0.5b-ov-hf")  # recipe keys; our names -> tensors
    write(model, "out")  # plain transformers opens it; `export` compares the logits

LlavaOnevision is the released code's model in transformers. It has one way to turn an image into
visual tokens, which is our `budget: mosaic`; `check` lists every recipe key that this fixes. The
two implementations agree on questions about one image. Given several images, transformers pads
each one to a square and adds a newline, and ours does not.
"""

import json
import re
import string
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, PreTrainedTokenizerBase

from nanollava.anyres import Visual, parse_budget, parse_grids
from nanollava.encoder import ENCODERS, EncoderSpec, build
from nanollava.files import load_tensors
from nanollava.llm import load_tokenizer
from nanollava.prompts import PLACEHOLDER, TEMPLATES, Template, stop_ids
from nanollava.recipe import Recipe

# How a tensor name of transformers becomes one of ours. transformers has renamed its modules over
# the years; each pattern matches the older and the newer name.
NAMES = (
    (r"^image_newline", "newline"),
    (r"^multi_modal_projector\.linear_1", "projector.0"),
    (r"^multi_modal_projector\.linear_2", "projector.2"),
    (r"^(language_model\.)?lm_head", "llm.lm_head"),
    (r"^language_model\.(model\.)?", "llm.model."),
)
# The same for a vision tower: in transformers | in timm's SigLIP | in open_clip's CLIP.
TOWER_NAMES = (
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
# The chat format in Jinja, as transformers stores it with a tokenizer; `chat_template` fills it in.
CHAT = string.Template(
    "{{ $start }}{% for message in messages %}{% set asked = message['role'] == 'user' %}"
    "{{ $user if asked else $assistant if message['role'] == 'assistant' else raise_exception("
    "'roles are user and assistant; the system prompt is fixed') }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ $after if asked else $end }}{% endfor %}{{ $ask if add_generation_prompt else '' }}"
)


def require(ok: bool, key: str, given: Any, expected: Any) -> None:
    """Raise ValueError unless `ok`, with the key, its value and the expected one."""
    if not ok:
        raise ValueError(f"{key} is {given!r}; expected {expected!r}. Use a model with that value")


def towers() -> dict[str, dict[str, Any]]:
    """The encoders that LlavaOnevision can have, each in the words of config.json."""
    names = [name for name, spec in ENCODERS.items() if spec.tanh or "quickgelu" in spec.open_clip]
    return {name: tower_config(ENCODERS[name]) for name in names}


def tower_config(spec: EncoderSpec) -> dict[str, Any]:
    """The spec of a SigLIP or a CLIP in the words of config.json."""
    return {
        "model_type": "siglip_vision_model" if spec.tanh else "clip_vision_model",
        "image_size": spec.tile,
        "patch_size": spec.patch,
        "hidden_size": spec.width,
        "hidden_act": "gelu_pytorch_tanh" if spec.tanh else "quick_gelu",
        # "default" drops the class token, which a SigLIP does not have.
        "vision_feature_select_strategy": "full" if spec.tanh else "default",
    }


def block_config(block: nn.Module) -> dict[str, Any]:
    """The sizes that a spec does not hold, read off a block, in the words of config.json."""
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
    return {
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": len(next(block.mlp.parameters())),
        "layer_norm_eps": norms[0].eps,
    }


def our_name(name: str, spec: EncoderSpec) -> str:
    """The tensor of ours that holds one of theirs; q, k and v of a vision tower share one.

    Empty for what nothing uses: blocks after the feature layer, the norm after them, the head.
    """
    name = name.removeprefix("model.")
    if not name.startswith("vision_tower."):
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        return name
    block = re.search(r"layers\.(\d+)", name)
    late = block and int(block[1]) >= spec.blocks
    if late or re.search(r"post_layernorm|\.head\.", name):
        return ""
    for theirs, siglip, clip in TOWER_NAMES:
        name = re.sub(theirs, siglip if spec.tanh else clip, name)
    return name


def part(name: str, whole: Tensor) -> Tensor:
    """The share of our tensor that a tensor of theirs holds: ours fuses a tower's q, k and v."""
    match = re.search(r"vision_tower.*self_attn\.([qkv])_proj", name)
    return whole.chunk(3)["qkv".index(match[1])] if match else whole


@torch.no_grad()
def copy(mine: dict[str, Tensor], theirs: nn.Module, spec: EncoderSpec) -> None:
    """Copy our tensors into transformers' model, whose vocabulary may be larger than ours."""
    for name, parameter in theirs.named_parameters():
        ours = our_name(name, spec)
        if ours:
            # timm's pos_embed is (1, T, C), theirs (T, C).
            values = part(name, mine[ours]).reshape(-1, *parameter.shape[1:])
            parameter[: len(values)] = values
            parameter[len(values) :] = values.mean(0)  # the mean word is never the likeliest


def name_grids(grids: list[tuple[int, int]]) -> str:
    """The `max_grid` that means these (columns, rows) grids.

    `best_grid` takes the first of equally good grids, so their order is kept; only in a whole
    rectangle such as 6x6 it decides nothing.
    """
    largest = "{}x{}".format(*max(grids))  # 6x6 also means all grids up to 6x6
    if set(parse_grids(largest)) == set(grids):
        return largest
    if len(grids) == 1:
        return f"{largest}..{largest}"
    return "+".join("{}x{}".format(*grid) for grid in grids)


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LlavaOnevision folder -> the recipe's keys, and its tensors under our names.

    Raises ValueError, naming the key of config.json, for what no recipe can express.
    """
    folder = Path(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        keys = read_keys(folder, config)
    except ValueError as error:
        reason = f"{folder} has no recipe.yaml, so it was read as a LlavaOnevision folder"
        raise ValueError(f"{reason}: {error}") from error
    state = read_tensors(folder, ENCODERS[keys["encoder"]])
    if config.get_text_config().tie_word_embeddings:
        state.pop("llm.lm_head.weight", None)  # some folders store the tied weight twice
    return keys, state


def read_keys(folder: Path, config: LlavaOnevisionConfig) -> dict[str, Any]:
    """A LlavaOnevision folder -> the recipe's keys."""
    kind = config.model_type
    require(kind == "llava_onevision", "model_type", kind, "llava_onevision")
    encoder = find_encoder(config)
    R = ENCODERS[encoder].tile
    sizes, ratio = config.image_grid_pinpoints, config.vision_aspect_ratio  # sizes: (H, W)
    multiples = sizes and all(H % R == 0 and W % R == 0 for H, W in sizes)
    require(multiples, "image_grid_pinpoints", sizes, f"multiples of {R}")
    tiles = re.fullmatch(r"anyres_max_([1-9]\d*)", ratio)
    require(tiles, "vision_aspect_ratio", ratio, "anyres_max_9 or another number")
    check_pixels(folder, ENCODERS[encoder])
    grids = name_grids([(W // R, H // R) for H, W in sizes])
    return {
        "encoder": encoder,
        "connector": config.projector_hidden_act,
        "llm": str(folder),
        "template": find_template(folder),
        "visual": {"max_grid": grids, "max_visual_tokens": f"({tiles[1]}+1)T", "budget": "mosaic"},
    }


def find_encoder(config: LlavaOnevisionConfig) -> str:
    """The encoder with that tower and feature layer.

    Raises ValueError with the first difference from the most similar encoder.
    """
    given = config.vision_config.to_dict()
    for key in ("vision_feature_layer", "vision_feature_select_strategy"):
        given[key] = getattr(config, key)
    known = towers()
    # Their layer -1 is the output of the last block, -2 of the one before; ours is `blocks`.
    for name, tower in known.items():
        tower["vision_feature_layer"] = ENCODERS[name].blocks - given["num_hidden_layers"] - 1

    def similarity(name: str) -> int:
        return sum(given.get(key) == value for key, value in known[name].items())

    # The nearest encoder's first difference is the most helpful one to report.
    nearest = max(known, key=similarity)
    with torch.device("meta"):
        block = build(ENCODERS[nearest], "random").blocks[0]
    for key, value in (known[nearest] | block_config(block)).items():
        require(given.get(key) == value, key, given.get(key), value)
    return nearest


def find_template(folder: Path) -> str:
    """The chat format whose special tokens a folder's tokenizer has."""
    tokens = load_tokenizer(str(folder)).all_special_tokens
    forms = {name: set(form.specials) for name, form in TEMPLATES.items() if form.specials}
    fitting = [name for name, specials in forms.items() if specials <= set(tokens)]
    require(fitting, "the list of special tokens", tokens, "those of qwen_1_5 or vicuna_v1")
    return fitting[0]


def check_pixels(folder: Path, spec: EncoderSpec) -> None:
    """Raise ValueError unless a folder prepares pixels as the encoder's spec does."""
    expected = {"image_mean": spec.mean, "image_std": spec.std, "resample": (3,)}  # 3: bicubic
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = folder / name
        config = json.loads(file.read_text()) if file.is_file() else {}
        config = config.get("image_processor", config)  # transformers 5 keeps all in one file
        for key, value in expected.items():
            given = config.get(key, value)
            require(np.allclose(given, value), f"{name}: {key}", given, value)


def read_tensors(folder: Path, spec: EncoderSpec) -> dict[str, Tensor]:
    """The tensors of all files under our names."""
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    theirs, state = {}, {}
    for file in files:
        theirs |= load_tensors(folder / file)
    # Sorted by name, except that q goes before k and v: this is how our fused tensor holds them.
    for name in sorted(theirs, key=lambda name: name.replace(".q_proj", ".a_proj")):
        ours = our_name(name, spec)
        if ours:
            tensor = theirs[name][None] if ours.endswith("pos_embed") else theirs[name]
            state[ours] = torch.cat([state[ours], tensor]) if ours in state else tensor
    return state


def check(recipe: Recipe, spec: EncoderSpec) -> None:
    """Raise ValueError, naming the key of the recipe, for what LlavaOnevision cannot express."""
    visual, budget, T = recipe.visual, recipe.visual.max_visual_tokens, spec.side**2
    # Grids and tokens are free; every other visual key has the one value that goes with mosaic.
    mosaic = Visual(visual.max_grid, max_visual_tokens=budget, budget="mosaic")
    for key, value in vars(mosaic).items():
        given = getattr(visual, key)
        require(given == value, f"visual.{key}", given, value)
    tau = parse_budget(budget, T)
    require(tau > T and tau % T == 0, "visual.max_visual_tokens", budget, "2T, 3T or more")
    require(visual.max_grid != "base", "visual.max_grid", "base", "tiles, as in 5grids")
    require(not recipe.projector_norm, "projector_norm", True, False)
    require(recipe.encoder in towers(), "encoder", recipe.encoder, [*towers()])
    require(recipe.template != "plain", "template", "plain", "qwen_1_5 or vicuna_v1")


def to_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionConfig:
    """A VLM's sizes and settings; `tokenizer` is its own with `<image>` and `<video>` added."""
    spec, visual = model.spec, model.recipe.visual
    R, T = spec.tile, spec.side**2
    vision = tower_config(spec) | block_config(model.encoder.blocks[0])
    strategy = vision.pop("vision_feature_select_strategy")
    text = model.llm.config.to_dict()
    # The two new words may need more rows than the LLM's vocabulary has.
    image, video = tokenizer.convert_tokens_to_ids([PLACEHOLDER, "<video>"])
    words = max(text["vocab_size"], image + 1, video + 1)
    tiles = parse_budget(visual.max_visual_tokens, T) // T - 1  # tau = (tiles + 1) T
    return LlavaOnevisionConfig(
        vision_config=vision | {"num_hidden_layers": spec.blocks, "vision_use_head": False},
        vision_feature_select_strategy=strategy,
        # Without the path of this machine.
        text_config=text | {"vocab_size": words, "_name_or_path": "", "dtype": "float32"},
        image_token_index=image,
        video_token_index=video,
        projector_hidden_act=model.recipe.connector,
        vision_aspect_ratio=f"anyres_max_{tiles}",
        image_grid_pinpoints=[[b * R, a * R] for a, b in parse_grids(visual.max_grid)],  # (H, W)
    )


def write(model: Any, folder: str | Path) -> None:
    """A VLM -> a folder that plain transformers opens: the model, its tokenizer and processor.

    Raises ValueError, naming the key of the recipe, for what LlavaOnevision cannot express.
    """
    spec, tokenizer = model.spec, deepcopy(model.tokenizer)
    check(model.recipe, spec)
    tokenizer.add_tokens([PLACEHOLDER, "<video>"], special_tokens=True)
    # What `generate` takes. transformers saves the names only if they are set in both places.
    inputs = ["input_ids", "attention_mask"]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = inputs
    config = to_config(model, tokenizer)
    theirs = transformers.LlavaOnevisionForConditionalGeneration(config)
    copy(dict(model.named_parameters()), theirs, spec)
    ends = stop_ids(tokenizer, model.recipe.template)
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    theirs.save_pretrained(folder)

    size = {"height": spec.tile, "width": spec.tile}
    pixels = {"size": size, "image_mean": spec.mean, "image_std": spec.std}
    grids, strategy = config.image_grid_pinpoints, config.vision_feature_select_strategy
    transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessorFast(**pixels, image_grid_pinpoints=grids),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=spec.side**2 + (strategy == "default"),  # it drops a class token
        vision_feature_select_strategy=strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=chat_template(TEMPLATES[model.recipe.template]),
    ).save_pretrained(folder)


def chat_template(form: Template) -> str:
    """A chat format as a Jinja template."""
    texts = {
        "start": form.start.removeprefix("<s>"),  # the tokenizer adds it
        "user": form.user[0],
        "after": form.user[1],
        "assistant": form.assistant,
        "ask": form.assistant.rstrip(" "),
        "end": form.end + form.after,
    }
    return CHAT.substitute({name: json.dumps(text) for name, text in texts.items()})
