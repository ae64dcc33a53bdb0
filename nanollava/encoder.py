"""The vision encoder: views uint8[N, 3, R, R] -> features float[N, T, C].

One spec per encoder, one code path: open_clip builds the tower, or timm where open_clip does not
know it (EVA-CLIP-8B), and `forward_intermediates`, which both have, reads it. The tower is cut at
its feature layer when it is loaded: later blocks, the norm after them and the pooling head are
dropped, so every parameter that is left gets a gradient. The feature layers are the released
code's: CLIP block 23 of 24, SigLIP block 26 of 27, EVA the last block; the class token is never
used.
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder: R = `tile` pixels, T = (tile / patch)^2 tokens, C = `width` channels."""

    tile: int
    patch: int
    width: int
    blocks: int  # blocks kept, counted from the first: the feature layer
    mean: tuple = HALF
    std: tuple = HALF
    tanh: bool = False  # GELU by tanh, as SigLIP was trained and HF has it; timm's is the exact one
    open_clip: str = ""  # open_clip's model name; its `published` is a tag
    hub: str = ""  # a hub id, for EVA-CLIP-8B; its `published` is a file there
    published: str = ""
    heads: int = 0  # only for towers that are built here
    stem: tuple[int, ...] = ()  # nano: channels of the convolutional stem in place of `conv1`

    @property
    def side(self) -> int:
        """Tokens along one side of a view: T = side * side (384 / 14 = 27, the rest is cut)."""
        return self.tile // self.patch


CLIP = {"mean": CLIP_MEAN, "std": CLIP_STD}
ENCODERS = {
    "clip_l_224": EncoderSpec(
        224, 14, 1024, 23, **CLIP, open_clip="ViT-L-14-quickgelu", published="openai"
    ),
    "clip_l_336": EncoderSpec(
        336, 14, 1024, 23, **CLIP, open_clip="ViT-L-14-336-quickgelu", published="openai"
    ),
    "eva02_e_224": EncoderSpec(
        224, 14, 1792, 64, **CLIP, open_clip="EVA02-E-14", published="laion2b_s4b_b115k"
    ),
    "eva_8b_224": EncoderSpec(
        224,
        14,
        4096,
        32,
        **CLIP,
        hub="BAAI/EVA-CLIP-8B",
        published="EVA_CLIP_8B_psz14_s9B.pt",
        heads=32,
    ),
    "eva_8b_448": EncoderSpec(
        448,
        14,
        4096,
        32,
        **CLIP,
        hub="BAAI/EVA-CLIP-8B-448",
        published="EVA_CLIP_8B_psz14_plus_s0.6B.pt",
        heads=32,
    ),
    "so400m_384": EncoderSpec(
        384, 14, 1152, 26, tanh=True, open_clip="ViT-SO400M-14-SigLIP-384", published="webli"
    ),
    "nano_s": EncoderSpec(48, 8, 64, 2, heads=4, stem=(24, 48, 64)),
    "nano_m": EncoderSpec(48, 8, 96, 3, heads=6, stem=(24, 64, 96)),
    "nano_l": EncoderSpec(48, 8, 128, 4, heads=8, stem=(32, 96, 128)),
}


class Encoder(nn.Module):
    """A vision tower cut at its feature layer; pixels are normalised here, on the device."""

    def __init__(self, spec: EncoderSpec, visual: nn.Module):
        super().__init__()
        self.spec, self.visual = spec, visual
        self.plain = spec.side <= 8  # there a CPU's plain kernel is twice as fast
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1) * 255, persistent=False)

    @property
    def cut(self) -> nn.Module:
        """The transformer itself: timm's stands behind a wrapper of open_clip."""
        return getattr(self.visual, "trunk", self.visual)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks, from the first on."""
        return list(getattr(self.cut, "blocks", None) or self.cut.transformer.resblocks)

    def recompute(self, on: bool) -> None:
        """Whether blocks keep their inputs only; recomputation would take the usual kernel."""
        self.cut.set_grad_checkpointing(on)
        self.plain = self.spec.side <= 8 and not on

    def forward(self, views: Tensor) -> Tensor:
        """uint8[N, 3, R, R] -> float[N, T, C]."""
        pixels = (views - self.mean) / self.std
        plain = self.plain and not views.is_cuda
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            out = self.visual.forward_intermediates(
                pixels, indices=1, intermediates_only=True, output_fmt="NLC"
            )
        return (out if isinstance(out, list) else out["image_intermediates"])[-1]  # timm: a list


def conv_stem(channels: tuple[int, ...], width: int) -> nn.Sequential:
    """Three 3x3 convolutions (strides 2, 2, 1), then 2x2 to one token per 8x8 patch.

    It stands in for the linear patch embedding of the nano towers: at this size it learns to
    read glyphs that do not sit on the patch grid several times sooner.
    """
    layers, before = [], 3
    for out, stride in zip(channels, (2, 2, 1), strict=True):
        layers += [nn.Conv2d(before, out, 3, stride, padding=1), nn.ReLU()]
        before = out
    for conv in layers[::2]:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    return nn.Sequential(*layers, nn.Conv2d(before, width, 2, 2, bias=False))


def eva(spec: EncoderSpec) -> nn.Module:
    """EVA-CLIP-8B's image tower; its class in timm is used for EVA-02 too."""
    from timm.layers import RmsNorm
    from timm.models.eva import Eva

    return Eva(
        spec.tile,
        spec.patch,
        embed_dim=spec.width,
        depth=spec.blocks,
        num_heads=spec.heads,
        mlp_ratio=5,
        qkv_bias=False,
        norm_layer=partial(RmsNorm, eps=1e-6),
        num_classes=0,
        global_pool="token",
    )


def load_eva(visual: nn.Module, file: str) -> None:
    """The image tower of EVA-CLIP's published .pt, or of a file with the tower alone."""
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    own = visual.state_dict()
    found = {k.removeprefix("visual."): v for k, v in state.items()}
    odd = [k for k in own if k not in found or found[k].shape != own[k].shape]
    if odd:
        raise ValueError(f"{file} does not hold this EVA tower: {odd[:3]} missing or of other size")
    visual.load_state_dict({k: found[k] for k in own})


def build(spec: EncoderSpec, weights: str = "published") -> Encoder:
    """An encoder with published weights, those of a file, or random ones.

    A file is what the publisher ships (open_clip's or EVA's whole checkpoint), for nano a
    .safetensors of the cut tower. Raises FileNotFoundError where it is missing, and the libraries'
    errors where there is no network.
    """
    import open_clip
    from open_clip.transformer import VisionTransformer

    file = "" if weights in ("published", "random") else weights
    if file and not Path(file).is_file():
        raise FileNotFoundError(
            f"encoder_weights: {file} is not a file; give a checkpoint, `published` or `random`"
        )
    if spec.open_clip:
        tag = None if weights == "random" else file or spec.published
        device = torch.empty(0).device  # "meta" under `with torch.device("meta")`
        logging.disable(logging.NOTSET if tag else logging.WARNING)  # random weights are no news
        visual = open_clip.create_model(spec.open_clip, pretrained=tag, device=device).visual
        logging.disable(logging.NOTSET)
    elif spec.hub:
        visual = eva(spec)
        if weights == "published":
            file = hf_hub_download(spec.hub, spec.published)
        if file:
            load_eva(visual, file)
    else:
        visual = VisionTransformer(
            spec.tile, spec.patch, spec.width, spec.blocks, spec.heads, mlp_ratio=4.0, output_dim=1
        )
        visual.conv1 = conv_stem(spec.stem, spec.width)
    encoder = Encoder(spec, visual)
    encoder.cut.prune_intermediate_layers([spec.blocks - 1], prune_norm=True, prune_head=True)
    for block in encoder.blocks if spec.tanh else ():
        block.mlp.act = nn.GELU("tanh")
    if file and spec.stem:
        visual.load_state_dict(load_file(file))
    return encoder
