"""The vision encoder: views uint8[N, 3, R, R] -> features float[N, T, C].

There is one spec per encoder and one code path: open_clip builds the tower, or timm where open_clip
does not have it (EVA-CLIP-8B), and `forward_intermediates`, which both libraries have, reads it.
The tower is cut at its feature layer when it is loaded. Later blocks, the norm after them and the
pooling head are dropped, so that every remaining parameter gets a gradient. The feature layers are
the released code's: CLIP block 23 of 24, SigLIP block 26 of 27, EVA the last block. The class token
is never used.
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

# Mean and standard deviation of each colour, for pixel values from 0 to 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder: R = `tile` pixels, T = (tile / patch)^2 tokens, C = `width` channels."""

    tile: int
    patch: int
    width: int
    blocks: int  # blocks kept, counted from the first: the feature layer
    published: str = ""  # weights: a tag of open_clip's, or a file in the hub's repository
    open_clip: str = ""  # model name in open_clip
    hub: str = ""  # repository on the Hugging Face hub, for EVA-CLIP-8B
    heads: int = 0  # only for towers that are built here
    stem: tuple[int, ...] = ()  # nano: channels of the convolutional stem in place of `conv1`
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    tanh: bool = False  # SigLIP was trained with the tanh form of GELU; timm builds the exact one

    @property
    def side(self) -> int:
        """Tokens along one side of a view: T = side * side. 384 / 14 is 27; the rest is cut."""
        return self.tile // self.patch


CLIP = {"mean": CLIP_MEAN, "std": CLIP_STD}
EVA = {**CLIP, "heads": 32}
ENCODERS = {
    "clip_l_224": EncoderSpec(224, 14, 1024, 23, "openai", "ViT-L-14-quickgelu", **CLIP),
    "clip_l_336": EncoderSpec(336, 14, 1024, 23, "openai", "ViT-L-14-336-quickgelu", **CLIP),
    "eva02_e_224": EncoderSpec(224, 14, 1792, 64, "laion2b_s4b_b115k", "EVA02-E-14", **CLIP),
    "eva_8b_224": EncoderSpec(
        224, 14, 4096, 32, "EVA_CLIP_8B_psz14_s9B.pt", hub="BAAI/EVA-CLIP-8B", **EVA
    ),
    "eva_8b_448": EncoderSpec(
        448, 14, 4096, 32, "EVA_CLIP_8B_psz14_plus_s0.6B.pt", hub="BAAI/EVA-CLIP-8B-448", **EVA
    ),
    "so400m_384": EncoderSpec(384, 14, 1152, 26, "webli", "ViT-SO400M-14-SigLIP-384", tanh=True),
    "nano_s": EncoderSpec(48, 8, 64, 2, heads=4, stem=(24, 48, 64)),
    "nano_m": EncoderSpec(48, 8, 96, 3, heads=6, stem=(24, 64, 96)),
    "nano_l": EncoderSpec(48, 8, 128, 4, heads=8, stem=(32, 96, 128)),
}


class Encoder(nn.Module):
    """A vision tower cut at its feature layer. It normalises the pixels, on the device."""

    def __init__(self, spec: EncoderSpec, visual: nn.Module):
        super().__init__()
        self.spec = spec
        self.visual = visual
        self.math_on_cpu = spec.side <= 8  # see recompute
        # Constants, so they are not saved with the weights.
        for name in ("mean", "std"):
            scaled = torch.tensor(getattr(spec, name)).view(3, 1, 1) * 255  # the pixels are bytes
            self.register_buffer(name, scaled, persistent=False)

    @property
    def cut(self) -> nn.Module:
        """The transformer itself: open_clip wraps a tower of timm's and calls it the trunk."""
        return getattr(self.visual, "trunk", self.visual)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks in order: `blocks` in timm, `transformer.resblocks` in open_clip."""
        return list(getattr(self.cut, "blocks", None) or self.cut.transformer.resblocks)

    def recompute(self, on: bool) -> None:
        """Compute the blocks again in the backward pass, instead of keeping their activations."""
        self.cut.set_grad_checkpointing(on)
        # With at most 64 tokens, the kernel of plain matrix products is twice as fast on a CPU as
        # the fused one. The backward pass recomputes outside of forward's choice of a kernel, and
        # the two kernels keep different tensors, so recomputation needs the default.
        self.math_on_cpu = self.spec.side <= 8 and not on

    def forward(self, views: Tensor) -> Tensor:
        """uint8[N, 3, R, R] -> float[N, T, C]."""
        pixels = (views - self.mean) / self.std
        use_math = self.math_on_cpu and not views.is_cuda
        with sdpa_kernel(SDPBackend.MATH) if use_math else nullcontext():
            out = self.visual.forward_intermediates(
                pixels, indices=1, intermediates_only=True, output_fmt="NLC"
            )
        if isinstance(out, dict):  # open_clip; timm returns the list itself
            out = out["image_intermediates"]
        return out[-1]  # (N, T, C)


def conv_stem(channels: tuple[int, ...], width: int) -> nn.Sequential:
    """Three 3x3 convolutions (strides 2, 2, 1), then a 2x2 one: one token per 8x8 patch.

    It replaces the linear patch embedding of the nano towers. At this size, it learns to read
    glyphs that do not lie on the patch grid several times sooner.
    """
    layers = []
    inputs = (3, *channels[:-1])
    for before, after, stride in zip(inputs, channels, (2, 2, 1), strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    for conv in layers[::2]:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 2, 2, bias=False))


def eva(spec: EncoderSpec) -> nn.Module:
    """EVA-CLIP-8B's image tower, with random weights. Its class in timm serves EVA-02, too."""
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
    """Load EVA-CLIP's published .pt, whose text tower is ignored, or a file of the tower alone."""
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    tensors = {name.removeprefix("visual."): tensor for name, tensor in state.items()}
    own = visual.state_dict()
    wrong = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"{file} does not hold this EVA tower: {wrong[:3]} are missing or have another shape. "
            "Give the checkpoint that EVA-CLIP publishes for this encoder."
        )
    visual.load_state_dict({name: tensors[name] for name in own})


def build(spec: EncoderSpec, weights: str = "published") -> Encoder:
    """An encoder with published weights, those of a file, or random ones.

    A file is what the publisher ships (open_clip's or EVA's whole checkpoint), or for nano a
    .safetensors of the cut tower. Raises FileNotFoundError where it is missing, and the libraries'
    errors where there is no network.
    """
    import open_clip
    from open_clip.transformer import VisionTransformer

    file = "" if weights in ("published", "random") else weights
    if file and not Path(file).is_file():
        raise FileNotFoundError(
            f"encoder_weights: {file} is not a file. Give a checkpoint, `published` or `random`."
        )
    if spec.open_clip:
        tag = None if weights == "random" else file or spec.published
        device = torch.empty(0).device  # "meta" under `with torch.device("meta")`
        # Random weights were asked for, so open_clip need not warn about them.
        logging.disable(logging.NOTSET if tag else logging.WARNING)
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
    if spec.tanh:
        for block in encoder.blocks:
            block.mlp.act = nn.GELU("tanh")
    if spec.stem and file:  # nano's files hold the cut tower, so they are loaded last
        visual.load_state_dict(load_file(file))
    return encoder
