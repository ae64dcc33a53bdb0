"""Cost: what a step computes, counted from shapes before anything runs.

Useful FLOPs only: a multiply and an add are two, attention counts the causal triangle of each
document, the lm_head counts supervised positions. Nothing is counted for padding or recomputation.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanollava.sequence import Document

# Backward passes as forward equivalents: gradients of the inputs and of the weights cost as much
# as the forward pass each; a frozen LLM still passes gradients on to the projector. Attention has
# no weights: both of its matrix products pass gradients to both of their inputs.
PASSES = {
    "encoder": lambda trained: 3 if "encoder" in trained else 1,
    "stem": lambda trained: 2 if "encoder" in trained else 1,  # pixels need no gradient
    "projector": lambda trained: 3 if "encoder" in trained else 2,
    "projector_2": lambda trained: 3,  # its second layer passes gradients to its first
    "llm": lambda trained: 3 if "llm" in trained else 2,
    "lm_head": lambda trained: 3 if "llm" in trained else 2,
    "attention": lambda trained: 3,
}


@dataclass(frozen=True)
class Rates:
    """Forward FLOPs of a model's parts."""

    view: int  # encoder without its first layer, per view
    stem: int  # that layer, per view
    token: int  # projector's first layer, per token
    token_2: int  # and its second
    position: int  # the LLM's matrices, per position
    pair: int  # attention, per (query, key) pair of all layers
    supervised: int  # lm_head, per supervised token


def rates(model: Any) -> Rates:
    """Count one view without computing it; the rest follows from the matrices' sizes.

    On the "meta" device, because a CPU's fused attention is invisible to FlopCounterMode.
    """
    encoder, R = model.encoder, model.row.tile
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
    return Rates(
        view=view - stem,
        stem=stem,
        token=2 * model.projector[0].weight.numel(),
        token_2=2 * model.projector[2].weight.numel(),
        position=2 * sum(linear),
        pair=4 * layers * width,
        supervised=2 * model.llm.lm_head.weight.numel(),
    )


def forward_flops(rate: Rates, documents: Sequence[Document], T: int, after: bool) -> dict:
    """Forward FLOPs of a batch by part; `after`: the projector runs before pooling, on all T."""
    layouts = [lay for d in documents for lay in d.layouts]
    views = sum(lay.views for lay in layouts)
    lengths = [len(d.ids) for d in documents]
    tokens = views * T if after else sum(lay.tokens for lay in layouts)
    return {
        "encoder": rate.view * views,
        "stem": rate.stem * views,
        "projector": rate.token * tokens,
        "projector_2": rate.token_2 * tokens,
        "llm": rate.position * sum(lengths),
        "attention": rate.pair * sum(n * (n + 1) // 2 for n in lengths),
        "lm_head": rate.supervised * sum(d.learned for d in documents),
    }


def step_flops(forward: dict[str, int], trained: Collection[str]) -> int:
    """A training step's FLOPs from its forward FLOPs, for a stage that trains these parts."""
    passes = {part: count(trained) for part, count in PASSES.items()}
    return sum(n * passes[part] for part, n in forward.items())
