"""What only a GPU can show, in one table. Run it wherever there is one:

    python tests/gpu.py                         # real widths with random weights, about 8 minutes
    python tests/gpu.py --size tiny --steps 6   # the same lines anywhere, to see that they run

Packed attention on the device against the CPU's; training in bf16 with a falling loss; memory
beside `plan`; G1 useful FLOP/s, G2 against HF LlavaOnevision on a padded batch, G3 waiting for
data, G4 generation against HF's static cache. The peer gets our weights and the same documents.
"""

import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import matplotlib
import peer
import torch
import transformers
import typer
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from nanollava.anyres import Visual, open_image
from nanollava.cost import forward_flops, rates, step_flops
from nanollava.extras.plan import memory
from nanollava.generate import Assistant
from nanollava.llm import flash_varlen
from nanollava.model import TRAIN, VLM
from nanollava.prompts import Turn
from nanollava.recipe import Stage
from nanollava.sequence import Document, pack

PHOTO = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")
SHAPES = ((640, 480), (480, 640), (1024, 768), (800, 1200), (600, 600), (300, 900), (336, 336))
PEAK = 790e12  # what an H200 reaches in bf16 on large matrices
ROWS: list[tuple[str, str, str]] = []


def told(what: str, found: str, target: str = "") -> None:
    """One row of the table, printed at once, too."""
    ROWS.append((what, found, target))
    print(f"{what:42} {found:42} {target}", flush=True)


def photos(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of one photograph in other shapes."""
    draw, whole, made = random.Random(seed), Image.open(PHOTO), []
    for _ in range(count):
        whole.resize(draw.choice(SHAPES)).save(file := io.BytesIO(), "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def document(model: VLM, image: bytes, words: int, answer: bool = False) -> Document:
    """A question and an answer of about that many letters."""
    turns = [Turn("user", "<image>\nwhat do you see?", 1)]
    turns += [] if answer else [Turn("assistant", "abcdefgh " * (words // 9))]
    return model.writer()(turns, [open_image(image)], answer=answer)


class Endless(IterableDataset):
    """Documents made in worker processes, without end."""

    def __init__(self, model: VLM):
        self.writer, self.images = model.writer(), photos(32)

    def __iter__(self) -> Iterator[Document]:
        turns = [Turn("user", "<image>\nwhat?", 1), Turn("assistant", "abcdefgh " * 20)]
        while True:
            for image in self.images:
                yield self.writer(turns, [open_image(image)])


def clock(device: str, run: Callable[[], None], times: int, warm: int) -> float:
    """Seconds of one run, the median."""
    seconds = []
    for i in range(warm + times):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - begin] * (i >= warm)
    return sorted(seconds)[len(seconds) // 2]


def attention(model: VLM, documents: list[Document], device: str) -> None:
    """Losses on the device against the CPU's float32."""
    packed = pack(documents, model.spec.tile)
    with torch.no_grad():
        expected = model.float().cpu()(packed)
        found = model.to(device)(packed.to(device)).cpu()
    apart = (found - expected).abs()
    kernel = "flash-attn" if flash_varlen() and device == "cuda" else "sdpa per document"
    told(f"losses, {kernel} against CPU", f"mean {apart.mean():.1e}, most {apart.max():.1e}", "")


def training(model: VLM, documents: list[Document], device: str, steps: int, budget: int) -> float:
    """The loss falls; memory beside the plan; returns seconds of a step (G1)."""
    model.set_trainable("full")
    optimizer = torch.optim.AdamW(model.groups(2e-5, 2e-6, 2e-5, 0.0), fused=True)
    few = documents[:8]
    losses = [peer.train_step(model, optimizer, few, budget) for _ in range(steps)]
    told(f"loss over {steps} steps on 8 documents", f"{losses[0]:.3f} -> {losses[-1]:.3f}", "falls")
    assert losses[-1] < losses[0]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = lambda: peer.train_step(model, optimizer, documents, budget)  # noqa: E731
    seconds = clock(device, step, min(20, steps), min(5, steps))
    n, keys = len(documents), model.recipe.visual
    flops = step_flops(
        forward_flops(rates(model), documents, model.spec.side**2, keys.pool_after_projector),
        TRAIN["full"],
    )
    told(
        "G1 useful FLOP/s",
        f"{flops / seconds / PEAK:.1%} of 790 T, {n / seconds:.1f} samples/s",
        ">= 45%",
    )
    if device == "cuda":
        stage = Stage(microbatch_tokens=budget, batch_size=n)
        need = memory(model.recipe, stage, model, peer.averages(documents), 1, "bf16")
        need = sum(need.values()) / 1e9
        told("peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB, plan {need:.1f} GB")
    return seconds


def against_padded(model: VLM, documents: list[Document], device: str, ours: float, times: int):
    """G2: the same documents through HF LlavaOnevision in padded batches of 8."""
    other = peer.peer_of(model.float().cpu()).to(device).train()
    model.to("cpu")
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-5, fused=True)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = [peer.batch(model, documents[i : i + 8]) for i in range(0, len(documents), 8)]

    def step() -> None:
        for batch in batches:
            moved = {k: v.to(device) for k, v in batch.items()}
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                other(**moved).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        theirs = clock(device, step, min(5, times), 1)
    except torch.OutOfMemoryError:
        told("G2 against HF padded", "HF ran out of memory at batch 8", ">= 1.4x (2x2)")
        return
    told("G2 against HF padded, batch 8", f"{theirs / ours:.2f}x", ">= 1.4x (2x2), 2.0x (6x6)")
    if device == "cuda":
        told("   HF's peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def waiting(model: VLM, device: str, steps: int, batch: int, budget: int) -> None:
    """G3: the share of the time in which the device has nothing to do but wait for documents."""
    model.to(device).set_trainable("full")
    optimizer = torch.optim.AdamW(model.groups(2e-5, 2e-6, 2e-5, 0.0), fused=True)
    loader = DataLoader(
        Endless(model),
        batch,
        num_workers=8 if device == "cuda" else 1,
        collate_fn=list,
        prefetch_factor=4,
    )
    source, lost, begin = iter(loader), 0.0, 0.0
    for i in range(steps + 2):
        before = time.perf_counter()
        documents = next(source)
        lost += (time.perf_counter() - before) * (i >= 2)
        begin = begin or before * (i >= 2)
        peer.train_step(model, optimizer, documents, budget)
    told("G3 waiting for data", f"{lost / (time.perf_counter() - begin):.1%}", "< 2%")


def generation(model: VLM, image: bytes, device: str, room: int) -> None:
    """G4: tokens a second at batch 1 against HF's static cache."""
    other = peer.peer_of(model.float().cpu()).to(device)
    asked = document(model, image, 0, answer=True)
    inputs = {k: v.to(device) for k, v in peer.batch(model, [asked], left=True).items()}
    half = torch.bfloat16 if device == "cuda" else torch.float32
    other.to(half)
    inputs["pixel_values"] = inputs["pixel_values"].to(half)
    model.to(device).llm.to(half)
    assistant = Assistant(model)
    keys = {"max_new_tokens": room, "min_new_tokens": room, "do_sample": False}
    theirs = clock(
        device, lambda: other.generate(**inputs, **keys, cache_implementation="static"), 3, 1
    )
    ours = clock(device, lambda: list(assistant.stream([asked], room)), 3, 1)
    told("G4 generation, batch 1", f"{theirs / ours:.2f}x, {room / ours:.0f} tokens/s", ">= 1.3x")


def main(
    size: Annotated[str, typer.Option(help="real or tiny")] = "real",
    steps: int = 50,
    grid: Annotated[str, typer.Option(help="5grids or 6x6")] = "5grids",
) -> None:
    """Measure, and print the table."""
    device, count = ("cuda" if torch.cuda.is_available() else "cpu"), 64 if size == "real" else 8
    if device == "cpu" and size == "real":
        raise typer.BadParameter("no GPU here: real widths would need days; try --size tiny")
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    visual = Visual(
        max_grid=grid, max_visual_tokens="5T" if grid == "5grids" else "10T", budget="mosaic"
    )
    told("device", name, f"torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"visual": replace(visual, max_grid="2x2"), "precision": "auto"}
        model = (
            peer.real(Path(folder), visual=visual, connector="gelu")
            if size == "real"
            else peer.ours(Path(folder), **tiny)
        )
    images = photos(count)
    documents = [document(model, x, 90 + 40 * (i % 7)) for i, x in enumerate(images)]
    budget = 16384 if size == "real" else 2000
    attention(model, documents[:3], device)
    seconds = training(model, documents, device, steps, budget)
    against_padded(model, documents, device, seconds, steps)
    waiting(model, device, min(20, steps), count // 2, budget)
    generation(model, images[0], device, 64 if size == "real" else 8)
    print("\n| what | found | target |\n|---|---|---|")
    print("\n".join("| " + " | ".join(row) + " |" for row in ROWS))


if __name__ == "__main__":
    typer.run(main)
