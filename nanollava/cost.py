"""Cost: what a step computes, counted from shapes before anything runs.

Useful FLOPs only: a multiply and an add are two, attention counts the causal triangle of each
document, the lm_head counts supervised positions. Nothing is counted for padding or recomputation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanollava.model import TRAIN, VLM
from nanollava.sequence import Document

# Backward passes as forward equivalents: gradients of the inputs and of the weights cost as much
# as the forward pass each; a frozen LLM still passes gradients on to the projector. Attention has
# no weights: both of its matrix products pass gradients to both of their inputs.
PASSES = {
    "encoder": lambda trained: 3 if "encoder" in trained else 1,
    "projector": lambda trained: 3 if "encoder" in trained else 2,
    "llm": lambda trained: 3 if "llm" in trained else 2,
    "lm_head": lambda trained: 3 if "llm" in trained else 2,
    "attention": lambda trained: 3,
}


@dataclass(frozen=True)
class Rates:
    """Forward FLOPs of a model's parts."""

    view: int  # encoder, per view
    token: int  # projector, per token
    position: int  # the LLM's matrices, per position
    pair: int  # attention, per (query, key) pair of all layers
    supervised: int  # lm_head, per supervised token


def matrices(part: nn.Module) -> int:
    """Numbers in the weight matrices of a part's linear layers."""
    return sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))


def rates(model: VLM) -> Rates:
    """Count one view without computing it; the rest follows from the matrices' sizes.

    On the "meta" device, because a CPU's fused attention is invisible to FlopCounterMode.
    """
    tensors = [*model.encoder.named_parameters(), *model.encoder.named_buffers()]
    empty = {name: torch.empty_like(x, device="meta") for name, x in tensors}
    black = torch.zeros(1, 3, model.row.tile, model.row.tile, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model.encoder, empty, (black,))
    config = model.llm.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = heads * getattr(config, "head_dim", config.hidden_size // heads)
    return Rates(
        view=counter.get_total_flops(),
        token=2 * matrices(model.projector),
        position=2 * matrices(model.llm.model),
        pair=4 * layers * width,
        supervised=2 * model.llm.lm_head.weight.numel(),
    )


def forward_flops(rate: Rates, documents: Sequence[Document], T: int, after: bool) -> dict:
    """Forward FLOPs of a batch by part; `after`: the projector runs before pooling, on all T."""
    plans = [plan for d in documents for plan in d.layouts]
    views = sum(plan.views for plan in plans)
    lengths = [len(d.ids) for d in documents]
    return {
        "encoder": rate.view * views,
        "projector": rate.token * (views * T if after else sum(plan.tokens for plan in plans)),
        "llm": rate.position * sum(lengths),
        "attention": rate.pair * sum(n * (n + 1) // 2 for n in lengths),
        "lm_head": rate.supervised * sum(d.learned for d in documents),
    }


def step_flops(forward: dict[str, int], train: str) -> int:
    """A training step's FLOPs from its forward FLOPs, for a stage that trains `train`."""
    passes = {part: count(TRAIN[train]) for part, count in PASSES.items()}
    return sum(n * passes[part] for part, n in forward.items())
