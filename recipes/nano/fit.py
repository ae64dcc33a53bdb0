"""One phase of stage 0: a small training loop that keeps its result, so that it runs once."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def curve(optimizer: torch.optim.Optimizer, steps: int, final: float) -> LambdaLR:
    """5% warm-up, then a cosine down to the `final` share of the learning rate."""

    def share(n: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * n / steps)
        return min((n + 1) / (0.05 * steps), final + (1 - final) * cosine)

    return LambdaLR(optimizer, share)


def fit(
    name: str, model: nn.Module, loss: Callable[[int], tuple[Tensor, dict]], steps: int, lr: float,
    folder: Path, final: float = 0.05,
) -> dict:  # fmt: skip
    """Train `model` for `steps` on `loss(step) -> (loss, figures)`; returns the phase's record.

    AdamW, gradients clipped at 1, bf16 autocast. A phase whose checkpoint lies in `folder` is
    loaded instead.
    """
    saved = folder / f"{name}.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        return state["record"]
    start, means = time.process_time(), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    rate = curve(optimizer, steps, final)
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            value, figures = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        for key, figure in {"loss": value.item(), **figures}.items():
            means[key] = 0.95 * means.get(key, figure) + 0.05 * figure
        if step % 100 == 0 or step == steps:
            spent = round(time.process_time() - start, 1)
            figures = {key: round(mean, 4) for key, mean in means.items()}
            record = {"steps": step, "cpu_seconds": spent, **figures}
            print(name, *(f"{k} {v}" for k, v in record.items()), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "record": record}, saved)
    return record
