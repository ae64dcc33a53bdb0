"""Cost: what a step computes, counted from shapes before anything runs.

Useful FLOPs only: a multiply and an add are two, attention counts the causal triangle of each
document, the lm_head counts supervised positions. Nothing is counted for padding or recomputation.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanollava.sequence import Document

# Backward passes as forward equivalents: gradients of the inputs and of the weights cost as much
# as the forward pass each; a frozen LLM still passes gradients on to the projector. Attention has
# no weights: both of its matrix products pass gradients to both of their inputs.
PARTS = {  # what a part's rate is per; the tower that decides; passes if it is trained, if frozen
    "encoder": ("views", "encoder", 3, 1),
    "stem": ("views", "encoder", 2, 1),  # the encoder's first layer; pixels need no gradient
    "projector": ("features", "encoder", 3, 2),
    "projector_2": ("features", "encoder", 3, 3),  # it passes gradients to its first layer
    "llm": ("positions", "llm", 3, 2),
    "attention": ("pairs", "llm", 3, 3),
    "lm_head": ("learned", "llm", 3, 2),
}


def rates(model: Any) -> dict[str, int]:
    """Forward FLOPs of each part per view, feature, position, pair or learned token.

    Counts one view without computing it; the rest follows from the matrices' sizes. On the
    "meta" device, because a CPU's fused attention is invisible to FlopCounterMode.
    """
    encoder, R = model.encoder, model.spec.tile
    empty = {n: torch.empty_like(x, device="meta") for n, x in encoder.named_buffers()}
    for name, p in encoder.named_parameters():
        empty[name] = torch.empty_like(p, device="meta", requires_grad=True)
    black = torch.zeros(1, 3, R, R, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = torch.func.functional_call(encoder, empty, (black,))
        view = counter.get_total_flops()
        features.sum().backward()
    stem = 3 * view - counter.get_total_flops()
    linear = [m.weight.numel() for m in model.llm.model.modules() if isinstance(m, nn.Linear)]
    config = model.llm.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = heads * getattr(config, "head_dim", config.hidden_size // heads)
    return {
        "encoder": view - stem,
        "stem": stem,
        "projector": 2 * model.projector[0].weight.numel(),
        "projector_2": 2 * model.projector[2].weight.numel(),
        "llm": 2 * sum(linear),
        "attention": 4 * layers * width,
        "lm_head": 2 * model.llm.lm_head.weight.numel(),
    }


def count(documents: Sequence[Document], T: int, after: bool) -> dict[str, int]:
    """What a batch holds; `after`: the projector runs before pooling, on all T features."""
    layouts = [lay for d in documents for lay in d.layouts]
    lengths = [len(d.ids) for d in documents]
    views, visual = sum(lay.views for lay in layouts), sum(lay.tokens for lay in layouts)
    return {
        "views": views,
        "visual": visual,
        "features": views * T if after else visual,
        "positions": sum(lengths),
        "pairs": sum(n * (n + 1) // 2 for n in lengths),
        "learned": sum(d.learned for d in documents),
    }


def forward_flops(
    rates: dict[str, int], documents: Sequence[Document], T: int, after: bool
) -> dict[str, int]:
    """Forward FLOPs of a batch by part."""
    counts = count(documents, T, after)
    return {part: rate * counts[PARTS[part][0]] for part, rate in rates.items()}


def step_flops(forward: dict[str, int], trained: Collection[str]) -> int:
    """A training step's FLOPs from its forward FLOPs, for a stage that trains these parts."""
    total = 0
    for part, flops in forward.items():
        _, tower, whole, frozen = PARTS[part]
        total += flops * (whole if tower in trained else frozen)
    return total
