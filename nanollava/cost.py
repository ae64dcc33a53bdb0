"""Cost: what a step computes, counted from shapes before anything runs.

    training FLOPs = sum over parts of  FLOPs per unit x units x passes        (PARTS)

Only useful FLOPs are counted: a multiply and an add are two, attention is the causal triangle of
each document, the lm_head runs on supervised positions. Padding and recomputation count nothing.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanollava.sequence import Document


@dataclass(frozen=True)
class Part:
    """A part of the model, and its forward and backward passes in units of the forward pass."""

    unit: str  # what its rate is per: a key of `count`
    tower: str  # whose training decides on the backward passes
    trained: int  # passes if that tower trains
    frozen: int  # passes if it is frozen

    def passes(self, trained_parts: Collection[str]) -> int:
        """Its passes in a stage that trains these parts."""
        return self.trained if self.tower in trained_parts else self.frozen


# The gradients of the inputs and of the weights cost as much as the forward pass each. A frozen LLM
# still passes gradients on to the projector. Attention has no weights: both of its matrix products
# pass gradients to both of their inputs.
PARTS = {
    "encoder": Part("views", "encoder", trained=3, frozen=1),
    "stem": Part("views", "encoder", trained=2, frozen=1),  # its first layer: no gradient of pixels
    "projector": Part("features", "encoder", trained=3, frozen=2),
    "projector_2": Part("features", "encoder", trained=3, frozen=3),  # its second layer
    "llm": Part("positions", "llm", trained=3, frozen=2),
    "attention": Part("pairs", "llm", trained=3, frozen=3),
    "lm_head": Part("learned", "llm", trained=3, frozen=2),
}


def rates(model: Any) -> dict[str, int]:
    """Forward FLOPs of each part per unit; `model` is a VLM, or its parts without memory.

    One view is counted without being computed, on the "meta" device, because FlopCounterMode does
    not see a CPU's fused attention. The rest follows from the sizes of the matrices.
    """
    encoder, R = model.encoder, model.spec.tile
    tensors = {name: torch.empty_like(b, device="meta") for name, b in encoder.named_buffers()}
    for name, p in encoder.named_parameters():
        tensors[name] = torch.empty_like(p, device="meta", requires_grad=True)
    black = torch.zeros(1, 3, R, R, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = torch.func.functional_call(encoder, tensors, (black,))
        forward = counter.get_total_flops()
        features.sum().backward()
    # The whole costs 3 forward passes, less the gradient of the stem's input.
    stem = 3 * forward - counter.get_total_flops()
    config = model.llm.config
    heads = config.num_attention_heads
    width = heads * getattr(config, "head_dim", config.hidden_size // heads)
    layers = [m.weight.numel() for m in model.llm.model.modules() if isinstance(m, torch.nn.Linear)]
    return {
        "encoder": forward - stem,
        "stem": stem,
        "projector": 2 * model.projector[0].weight.numel(),
        "projector_2": 2 * model.projector[2].weight.numel(),
        "llm": 2 * sum(layers),
        "attention": 4 * config.num_hidden_layers * width,
        "lm_head": 2 * model.llm.lm_head.weight.numel(),
    }


def count(documents: Sequence[Document], T: int, after: bool) -> dict[str, int]:
    """The units in a batch. `after`: pooling follows the projector, which runs on all T features
    of a view.
    """
    counts = Counter()
    for document in documents:
        positions = len(document.ids)
        views = sum(layout.views for layout in document.layouts)
        visual = sum(layout.tokens for layout in document.layouts)
        counts.update(
            views=views,
            visual=visual,
            features=views * T if after else visual,
            positions=positions,
            pairs=positions * (positions + 1) // 2,
            learned=document.learned,
        )
    return dict(counts)


def forward_flops(
    rates: dict[str, int], documents: Sequence[Document], T: int, after: bool
) -> dict[str, int]:
    """Forward FLOPs of a batch by part."""
    counts = count(documents, T, after)
    return {part: rate * counts[PARTS[part].unit] for part, rate in rates.items()}


def step_flops(forward: dict[str, int], trained: Collection[str]) -> int:
    """A training step's FLOPs from its forward FLOPs, for a stage that trains these parts."""
    return sum(flops * PARTS[name].passes(trained) for name, flops in forward.items())
