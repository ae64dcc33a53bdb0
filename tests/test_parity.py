"""Packed rows equal separate documents, and both equal transformers' LlavaOnevision.

Runs in both environments (`-m parity`). Float32 on the CPU; a difference of gradients is the
largest difference over the largest gradient of a parameter.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peer
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from nanollava import generate
from nanollava.anyres import layout
from nanollava.cost import forward_flops, rates, step_flops
from nanollava.generate import Assistant
from nanollava.llm import load_tokenizer
from nanollava.model import VLM
from nanollava.prompts import IGNORE, IMAGE, Turn, encode
from nanollava.sequence import Document, pack

pytestmark = pytest.mark.parity
BENCH = json.loads((Path(__file__).parent / "bench" / "batch.json").read_text())
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


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        ((found[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items()
    )


def logits(model: VLM, packed) -> torch.Tensor:
    """What the forward pass computes at the supervised positions, float[K, vocabulary]."""
    seen = []
    hook = model.llm.lm_head.register_forward_hook(lambda *x: seen.append(x[2].detach()))
    model(packed)
    hook.remove()
    return seen[0]


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
    packed = pack(all_of_them, model.row.tile)
    assert len({d.layouts[0].grid for d in all_of_them if d.layouts}) == 3
    loss = model(packed).mean()
    packed_gradients = gradients(model, loss)
    rows = [model(pack([d], model.row.tile)) for d in all_of_them]
    alone = torch.cat(rows).mean()
    difference = worst(packed_gradients, gradients(model, alone))
    print(f"packed against alone: loss {abs(loss - alone):.1e}, gradients {difference:.1e}")
    assert abs(loss - alone) < 1e-6
    assert difference < 1e-6


def test_first_step_equals_llava_onevision(pair):
    model, other = pair
    all_of_them = documents(model)
    loss = model(pack(all_of_them, model.row.tile)).mean()
    theirs = other(**peer.batch(model, all_of_them)).loss
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for name, g in gradients(other, theirs).items():
        place = peer.part(name, expected[peer.our_name(name)])
        place.copy_(g.view_as(place))
    difference = worst(gradients(model, loss), expected)
    print(f"ours against LlavaOnevision: loss {abs(loss - theirs):.1e}, gradients {difference:.1e}")
    assert abs(loss - theirs) < 2e-6
    assert difference < 1e-6
