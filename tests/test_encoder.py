"""The blog's six vision encoders: sizes on the meta device, EVA against plain matrices."""

import json

import pytest
import timm
import torch
from open_clip import add_model_config
from torch.nn import functional as F

from nanollava import encoder
from nanollava.encoder import ENCODERS, EncoderSpec, build

# Table 2 of the blog and the publishers' configs: parameters of the whole tower and T.
BLOG = {
    "clip_l_224": (303_966_208, 256),
    "clip_l_336": (304_293_888, 576),
    "eva02_e_224": (4_350_556_928, 256),
    "eva_8b_224": (7_520_841_728, 256),
    "eva_8b_448": (7_523_987_456, 1024),
    "so400m_384": (428_225_600, 729),
}


@pytest.mark.parametrize("name", BLOG)
def test_each_row_is_the_published_tower_cut_at_its_layer(name):
    row = ENCODERS[name]
    with torch.device("meta"):
        cut = build(row, "random").visual
    whole, T = BLOG[name]
    dropped = {  # blocks after the feature layer, the norm after them, the head
        "clip_l_224": 12_596_224 + 2_048 + 768 * 1024,
        "clip_l_336": 12_596_224 + 2_048 + 768 * 1024,
        "eva02_e_224": 2 * 1792 + 1024 * 1792 + 1024,
        "eva_8b_224": 0,
        "eva_8b_448": 0,
        "so400m_384": 15_239_504 + 2 * 1152 + 15_238_352,
    }
    assert sum(p.numel() for p in cut.parameters()) == whole - dropped[name]
    assert row.side**2 == T
    with torch.device("meta"):
        views = torch.zeros(2, 3, row.tile, row.tile)
        out = cut.forward_intermediates(views, indices=1, intermediates_only=True, output_fmt="NLC")
    out = out if isinstance(out, list) else out["image_intermediates"]
    assert out[-1].shape == (2, T, row.width)


def test_so400m_has_the_activation_that_it_was_trained_with():
    with torch.device("meta"):
        blocks = build(ENCODERS["so400m_384"], "random").blocks
    assert len(blocks) == 26 and all(b.mlp.act.approximate == "tanh" for b in blocks)


def plain_eva(state: dict, views: torch.Tensor, row: EncoderSpec, post_norm: bool) -> torch.Tensor:
    """EVA's tower after its paper: absolute positions, pre-norm (8B) or post-norm (02-E)."""

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        if bias is None:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def matrix(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def attend(x, name):
        biases = state.get(f"{name}.q_bias"), state.get(f"{name}.v_bias")
        q, k, v = F.linear(x, state[f"{name}.qkv.weight"]).chunk(3, -1)
        if biases[0] is not None:
            q, v = q + biases[0], v + biases[1]
        q, k, v = (t.unflatten(-1, (row.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return matrix((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    mean, std = (torch.tensor(x)[:, None, None] for x in (row.mean, row.std))
    pixels = (views.double() / 255 - mean) / std
    x = (
        F.conv2d(
            pixels,
            state["patch_embed.proj.weight"],
            state["patch_embed.proj.bias"],
            stride=row.patch,
        )
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for i in range(row.blocks):
        b = f"blocks.{i}"
        mlp = lambda y, b=b: matrix(F.gelu(matrix(y, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")  # noqa: E731
        if post_norm:
            x = x + norm(attend(x, f"{b}.attn"), f"{b}.norm1")
            x = x + norm(mlp(x), f"{b}.norm2")
        else:
            x = x + attend(norm(x, f"{b}.norm1"), f"{b}.attn")
            x = x + mlp(norm(x, f"{b}.norm2"))
    return x[:, 1:]


def scrambled(model):
    """Every parameter at random, also those that begin at zero or one."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim < 2 else p.shape[-1] ** -0.5)
    return model.eval()


def check(model, row, post_norm):
    state = scrambled(model.double()).visual.state_dict()
    state = {k.removeprefix("trunk."): v for k, v in state.items()}
    views = torch.randint(0, 256, (2, 3, row.tile, row.tile), dtype=torch.uint8)
    with torch.no_grad():
        apart = (model(views) - plain_eva(state, views, row, post_norm)).abs().max().item()
    print(f"EVA, post-norm {post_norm}: {apart:.1e}")
    assert apart < 1e-5
    model(views).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parity
def test_eva_8b_equals_plain_matrices():
    torch.manual_seed(0)
    row = EncoderSpec(56, 14, 64, 3, **encoder.CLIP, hub="BAAI/EVA-CLIP-8B", heads=2)
    check(build(row, "random"), row, False)


@pytest.mark.parity
def test_eva02_e_equals_plain_matrices(tmp_path):
    torch.manual_seed(0)
    name, large = "tiny_eva02_e", "eva02_enormous_patch14_clip_224"

    def tiny_eva02_e(pretrained=False, **keys):
        sizes = {"img_size": 56, "embed_dim": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 8.57}
        keys = {k: v for k, v in keys.items() if k in ("num_classes", "global_pool")}
        return timm.create_model(large, **sizes, **keys)

    tiny_eva02_e.__module__ = __name__
    globals().setdefault("__all__", []).append(name)
    timm.models.register_model(tiny_eva02_e)
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    vision = {
        "image_size": 56,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    }
    config = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    add_model_config(tmp_path / f"{name}.json")
    row = EncoderSpec(56, 14, 64, 3, **encoder.CLIP, open_clip=name, heads=2)
    check(build(row, "random"), row, True)


def test_evas_published_file_is_read_by_its_names(tmp_path):
    row = EncoderSpec(56, 14, 64, 2, **encoder.CLIP, hub="BAAI/EVA-CLIP-8B", heads=2)
    source = scrambled(build(row, "random"))
    own = source.visual.state_dict()
    published = {f"visual.{k}": v.half().float() for k, v in own.items()}
    published |= {
        "visual.norm.weight": torch.ones(64),
        "text.token_embedding.weight": torch.ones(2),
    }
    torch.save(published, tmp_path / "eva.pt")
    loaded = build(row, str(tmp_path / "eva.pt")).visual.state_dict()
    assert all(torch.equal(v, published[f"visual.{k}"]) for k, v in loaded.items())
    published.pop("visual.blocks.1.attn.qkv.weight")
    torch.save(published, tmp_path / "eva.pt")
    with pytest.raises(ValueError, match="does not hold this EVA tower.*blocks.1.attn.qkv"):
        build(row, str(tmp_path / "eva.pt"))
