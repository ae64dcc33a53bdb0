"""One phase of stage 0: a small training loop that keeps its result, so that it runs once."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def seconds() -> float:
    """CPU seconds of this process."""
    return time.process_time()


def fit(name: str, model: nn.Module, loss: Callable[[int], tuple[Tensor, dict]], steps: int,
        lr: float, folder: Path, final: float = 0.05) -> dict:
    """Train `model` for `steps` on `loss(step) -> (loss, figures)`; returns the phase's record.

    AdamW, 5% warm-up, cosine to the `final` share of `lr`, gradients clipped at 1, bf16 autocast.
    A phase whose checkpoint lies in `folder` is loaded instead.
    """
    saved = folder / f"{name}.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        return state["record"]
    start, means = seconds(), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)

    def share(n: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * n / steps)
        return min((n + 1) / (0.05 * steps), final + (1 - final) * cosine)

    curve = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            value, figures = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.step()
        for key, figure in {"loss": value.item(), **figures}.items():
            means[key] = 0.95 * means.get(key, figure) + 0.05 * figure
        if step % 100 == 99:
            told = " ".join(f"{k} {v:.3f}" for k, v in means.items())
            print(f"{name} {step + 1}/{steps} {seconds() - start:.0f} s  {told}", flush=True)
    record = {"steps": steps, "cpu_seconds": round(seconds() - start, 1),
              **{k: round(v, 4) for k, v in means.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "record": record}, saved)
    return record
