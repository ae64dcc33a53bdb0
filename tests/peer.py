"""The peer: transformers' LlavaOnevision holding our model's numbers, and what to feed it.

A SigLIP tower and a Qwen2 LLM of any size are built twice, once through `nanollava.model.VLM` (so
through open_clip and timm, as a published tower is) and once by transformers from a config; then
our weights are copied over by name. The mosaic budget, GELU and raster order are the peer's.
"""

import json
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.factory import add_model_config
from timm.models.vision_transformer import VisionTransformer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from nanollava.anyres import Visual, layout, open_image, parse_budget, parse_grids
from nanollava.cost import count as totals
from nanollava.data import usable
from nanollava.encoder import CLIP_MEAN, CLIP_STD, ENCODERS, EncoderSpec
from nanollava.hf import llava_onevision as hf
from nanollava.llm import config_of
from nanollava.model import VLM
from nanollava.prompts import IGNORE, IMAGE, read_turns
from nanollava.recipe import Recipe
from nanollava.sequence import Document, pack, split
from nanollava.sources import records

ROOT = Path(__file__).parent.parent
MOSAIC = Visual(max_grid="3x3", max_visual_tokens="(4+1)T", budget="mosaic")
BENCH = json.loads((ROOT / "tests/bench/batch.json").read_text())
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


@dataclass(frozen=True)
class Size:
    """Widths and depths of both models; the tile is no multiple of the patch, as 384 / 14."""

    name: str = "tiny"
    tile: int = 75
    patch: int = 14
    width: int = 48
    blocks: int = 2
    heads: int = 4
    dim: int = 64
    layers: int = 2
    llm_heads: int = 4
    kv_heads: int = 4
    ffn: int = 96
    vocabulary: int = 264
    tied: bool = True


TINY = Size()
QUARTER = Size("quarter", 384, 14, 288, 7, 4, 256, 6, 4, 4, 704, 9504)


def tower(size: Size, folder: Path) -> EncoderSpec:
    """Teach timm and open_clip a small SigLIP with one block more than is kept; returns its row."""
    name = f"vit_{size.name}_siglip"

    def build(pretrained: bool = False, **kwargs) -> VisionTransformer:
        return VisionTransformer(
            img_size=size.tile,
            patch_size=size.patch,
            embed_dim=size.width,
            depth=size.blocks + 1,
            num_heads=size.heads,
            mlp_ratio=3.7362,
            class_token=False,
            **{k: v for k, v in kwargs.items() if k in ("num_classes", "global_pool")},
        )

    build.__name__, build.__module__ = name, __name__
    if name not in timm.list_models():
        globals().setdefault("__all__", []).append(name)
        timm.models.register_model(build)
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    vision = {
        "image_size": size.tile,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    config = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    add_model_config(folder / f"{name}.json")
    assert name in open_clip.list_models()
    return EncoderSpec(size.tile, size.patch, size.width, size.blocks, tanh=True, open_clip=name)


def clip(folder: Path, layers: int = 3) -> tuple[EncoderSpec, CLIPVisionModel]:
    """A small OpenAI CLIP: our row, cut as the released code reads it, and transformers' model."""
    name = "tiny-clip-quickgelu"
    vision = {"image_size": 75, "layers": layers, "width": 64, "head_width": 16, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    add_model_config(folder / f"{name}.json")
    theirs = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=75,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    row = EncoderSpec(75, 14, 64, layers - 1, mean=CLIP_MEAN, std=CLIP_STD, open_clip=name)
    return row, CLIPVisionModel(theirs).eval()


def copy_clip(visual: torch.nn.Module, theirs: CLIPVisionModel, row: EncoderSpec) -> None:
    """Our tower's weights into transformers' model; what our tower was cut of stays as it is."""
    whole = torch.nn.Module()
    whole.vision_tower = theirs
    hf.copy({f"encoder.visual.{n}": p for n, p in visual.named_parameters()}, whole, row)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ChatML's special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # their own order changes by process
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        clean_up_tokenization_spaces=False,
    )


def qwen2(size: Size) -> Qwen2Config:
    """The LLM's config."""
    return Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        intermediate_size=size.ffn,
        num_attention_heads=size.llm_heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.tied,
        max_position_embeddings=16384,
        initializer_range=0.05,
    )


def ours(folder: Path, size: Size = TINY, visual: Visual = MOSAIC, **keys) -> VLM:
    """Our model at a size, random weights of seed 0, with biases that are not zero."""
    folder.mkdir(parents=True, exist_ok=True)
    qwen2(size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    ENCODERS[size.name] = tower(size, folder)
    recipe = Recipe(
        encoder=size.name,
        encoder_weights="random",
        llm=str(folder),
        visual=visual,
        llm_weights="random",
        connector="gelu",
        precision="fp32",
    )
    torch.manual_seed(0)
    model = VLM(replace(recipe, **keys))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def real(folder: Path, **keys) -> VLM:
    """SO400M and Qwen1.5-0.5B with random weights; nano's tokenizer stands in for Qwen's."""
    config_of("Qwen/Qwen1.5-0.5B-Chat", random=True).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(ROOT / "recipes/nano/tokenizer").save_pretrained(folder)
    return VLM(Recipe(llm=str(folder), **keys), "random")


def averages(documents: list[Document]) -> dict[str, float]:
    """What `plan.memory` asks of a stage's documents: means, and the longest."""
    sums = totals(documents, 0, after=False)  # no key that memory reads depends on T
    longest = max(len(d.ids) for d in documents)
    return {key: n / len(documents) for key, n in sums.items()} | {"longest": longest}


def bench_model(folder: Path, name: str) -> VLM:
    """The "quarter" model at the settings of one of the committed batches, "2x2" or "6x6"."""
    keys = {key: BENCH[name][key] for key in ("max_grid", "max_visual_tokens")}
    return ours(folder, QUARTER, replace(MOSAIC, **keys))


def bench_documents(model: VLM, name: str) -> list[Document]:
    """A committed batch: its image sizes and lengths, noise for contents."""
    draw, out = torch.Generator().manual_seed(0), []
    for d in BENCH[name]["documents"]:
        plan = layout(tuple(d["size"]), model.recipe.visual, model.spec.tile, model.spec.side)
        words = torch.randint(1, 256, (d["text"],), generator=draw)
        ids = torch.cat([torch.full((plan.length,), IMAGE), words])
        labels = torch.where(torch.arange(len(ids)) < len(ids) - d["supervised"], IGNORE, ids)
        shape = (plan.views, 3, plan.tile, plan.tile)
        views = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        out.append(Document(ids, labels, views, (plan,)))
    return out


def grids(model: VLM) -> dict[str, list[list[int]]]:
    """The peer writes a grid as its canvas in pixels, height first."""
    R = model.spec.tile
    pairs = parse_grids(model.recipe.visual.max_grid)
    return {"image_grid_pinpoints": [[b * R, a * R] for a, b in pairs]}


def budget(model: VLM) -> str:
    """Its budget leaves the base view out: (4+1)T is anyres_max_4."""
    T = model.spec.side**2
    return f"anyres_max_{parse_budget(model.recipe.visual.max_visual_tokens, T) // T - 1}"


def peer_of(model: VLM, device: str = "cpu") -> LlavaOnevisionForConditionalGeneration:
    """LlavaOnevision with our weights (on "meta": without any)."""
    row, words = model.spec, model.tokenizer
    blocks = model.encoder.visual.trunk.blocks
    vision = SiglipVisionConfig(
        hidden_size=row.width,
        intermediate_size=blocks[0].mlp.fc1.out_features,
        num_hidden_layers=row.blocks,
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=row.tile,
        patch_size=row.patch,
        vision_use_head=False,
    )
    text = Qwen2Config(**model.llm.config.to_dict())
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        vision_aspect_ratio=budget(model),
        **grids(model),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=-7,
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=words.pad_token_id,
    )
    with torch.device(device):
        peer = LlavaOnevisionForConditionalGeneration(config).eval()
    peer.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
    peer.generation_config.pad_token_id = words.pad_token_id
    if device == "meta":
        return peer
    hf.copy(dict(model.named_parameters()), peer, row)
    return peer


def batch(model: VLM, documents: list[Document], left: bool = False) -> dict[str, Tensor]:
    """The peer's padded batch of our documents, each with one image at most; padded on the `left`
    they are prompts, and nothing is learned.
    """
    most = max(len(d.ids) for d in documents)
    views = max(len(d.views) for d in documents)
    image, pad = (model.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", SPECIALS[0]))

    def stack(rows: list[Tensor], value: int) -> Tensor:
        ends = [(most - len(r), 0) if left else (0, most - len(r)) for r in rows]
        return torch.stack([F.pad(r, end, value=value) for r, end in zip(rows, ends, strict=True)])

    out = {
        "input_ids": stack([d.ids.masked_fill(d.ids == IMAGE, image) for d in documents], pad),
        "attention_mask": stack([torch.ones_like(d.ids) for d in documents], 0),
    }
    if not left:
        out["labels"] = stack([d.labels for d in documents], -100)
    seen = [d for d in documents if d.layouts]
    if seen:
        pixels = [(d.views - model.encoder.mean) / model.encoder.std for d in seen]
        out["pixel_values"] = torch.stack([F.pad(x, (0,) * 7 + (views - len(x),)) for x in pixels])
        out["image_sizes"] = torch.tensor([d.layouts[0].size[::-1] for d in seen])
    return out


@torch.inference_mode()
def write(peer: LlavaOnevisionForConditionalGeneration, prompts: dict, room: int) -> list[list]:
    """The ids that the peer's `generate` puts after a batch of prompts, greedily."""
    out = peer.generate(**prompts, max_new_tokens=room, do_sample=False)
    return out[:, prompts["input_ids"].shape[1] :].tolist()


def train_step(model: VLM, optimizer: torch.optim.Optimizer, documents: list, budget: int) -> float:
    """A whole optimizer step; returns the mean loss over supervised tokens."""
    learned, total = sum(d.learned for d in documents), 0.0
    for packed in split(documents, budget):
        losses = model(pack(packed, model.spec.tile).to(model.newline.device))
        (losses.sum() / learned).backward()
        total += losses.detach().sum() / learned
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def stage_documents(model: VLM, name: str, most: int = 1000) -> list[Document]:
    """What a stage trains on: the first samples of each of its sources."""
    recipe, stage = model.recipe, model.recipe.stages[name]
    writer = model.writer(recipe.visual_of(stage), stage.template)
    return [
        writer(read_turns(row["conversations"], len(images)), [open_image(x) for x in images])
        for source in stage.sources
        for row, images in usable(islice(records(recipe.sources[source], recipe.seed), most), [])
    ]


def processor(model: VLM) -> LlavaOnevisionProcessor:
    """The peer's preprocessing at our tile, grids and budget."""
    row = model.spec
    images = LlavaOnevisionImageProcessor(
        size={"height": row.tile, "width": row.tile},
        image_mean=row.mean,
        image_std=row.std,
        **grids(model),
    )
    video = LlavaOnevisionVideoProcessor(size={"height": row.tile, "width": row.tile})
    return LlavaOnevisionProcessor(
        images,
        model.tokenizer,
        video,
        num_image_tokens=row.side**2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<|im_start|>",
        vision_aspect_ratio=budget(model),
    )


def padded_step(peer: LlavaOnevisionForConditionalGeneration, views: int, rows: int, length: int):
    """One training step of the peer on a padded batch, part by part on "meta".

    Its own forward looks at values, which are not there. Under a padding mask sdpa computes the
    whole square, above the diagonal too.
    """
    vision = peer.config.vision_config
    pixels = torch.empty(views, 3, vision.image_size, vision.image_size, device="meta")
    hidden = peer.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    seen = peer.model.multi_modal_projector(hidden)
    embeds = torch.empty(rows, length, seen.shape[-1], device="meta") + 0 * seen.sum()
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")
    out = peer.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    peer.lm_head(out.last_hidden_state).sum().backward()


class Useful(TorchFunctionMode):
    """Counts attention by what it must compute: the triangle where it is causal, no recomputation.

    sdpa's matrix products are replaced by a sum, so that a FlopCounterMode inside sees none of
    them; forward is 4 d FLOPs per (query, key) pair, and backward twice that.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        causal = (kwargs or {}).get("is_causal", False) or len(rest) > 2 and rest[2]
        (*many, q, d), k = query.shape, key.shape[-2]
        pairs = q * (q + 1) // 2 + q * (k - q) if causal else q * k
        passes = 3 if query.requires_grad or key.requires_grad or value.requires_grad else 1
        self.flops += 4 * d * torch.Size(many).numel() * pairs * passes
        return query + 0 * (key.sum() + value.sum())


def count(step) -> int:
    """FLOPs of step(): matrix products and convolutions as they run, attention as `Useful`."""
    with FlopCounterMode(display=False) as counter, Useful() as attention:
        step()
    return counter.get_total_flops() + attention.flops
