"""PERFORMANCE C5: one training step against transformers' LlavaOnevision on a padded batch.

    python tests/bench/step.py

The documents of batch.json, the "quarter" model, the same weights in both (tests/peer.py), the
loss and the gradients' lengths compared first. Forward and backward, float32, one thread.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import peer  # noqa: E402
from contest import Row, race, ratio, told  # noqa: E402

from nanollava.sequence import pack  # noqa: E402

TARGETS = {"2x2": 1.35, "6x6": 1.8}
ROUNDS = {"2x2": 3, "6x6": 1}  # of 70 and 200 CPU seconds


def length(model: torch.nn.Module) -> float:
    """The length of all gradients; they are taken away."""
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return float(torch.stack(norms).norm())


def same(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Loss within 2e-6 and gradients as long within 1e-5, as far as float32 reaches."""
    return abs(a[0] / b[0] - 1) < 2e-6 and abs(a[1] / b[1] - 1) < 1e-5


def compare(name: str, target: float) -> Row:
    """One of the two batches."""
    with tempfile.TemporaryDirectory() as folder:
        model = peer.bench_model(Path(folder), name).train()
    other, documents = peer.peer_of(model).train(), peer.bench_documents(model, name)
    packed, padded = pack(documents, model.spec.tile), peer.batch(model, documents)

    def theirs() -> tuple[float, float]:
        loss = other(**padded).loss
        loss.backward()
        return float(loss), length(other)

    def ours() -> tuple[float, float]:
        loss = model(packed).mean()
        loss.backward()
        return float(loss), length(model)

    found = race({"peer": theirs, "ours": ours}, same, ROUNDS[name])
    return Row(
        f"C5 training step, {name}", ratio(found, "peer", "ours"), "x", target, note=told(found)
    )


def main() -> list[Row]:
    """The rows of C5."""
    return [compare(name, target) for name, target in TARGETS.items()]


if __name__ == "__main__":
    print(*main(), sep="\n")
