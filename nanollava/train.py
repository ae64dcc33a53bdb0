"""Training: the stages, one after another, with MosaicML Composer.

Each stage says what it trains, packs its batches by a token budget, and ends in a folder that the
next stage, `evaluate`, `chat` and the demo can load. The loss is the mean over the supervised
tokens of the whole batch, over all microbatches and processes. The same recipe again resumes.
"""

import csv
import json
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from composer import Callback, ComposerModel, DataSpec, State, Time, TimeUnit, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import SpeedMonitor
from composer.loggers import Logger
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, get_device, reproducibility
from torch import Tensor
from tqdm import tqdm

from nanollava.cost import forward_flops, rates, step_flops
from nanollava.data import make_loader, prepare
from nanollava.model import VLM, load_weights, save
from nanollava.recipe import Recipe, Stage, differences, read_recipe, write_recipe
from nanollava.sequence import Document, Pack, pack, split

PACKAGES = ("torch", "transformers", "mosaicml", "mosaicml-streaming", "open_clip_torch")
COLUMNS = ("stage", "step", "source", "loss", "tokens", "lr", "seconds")


class Student(ComposerModel):
    """The model as Composer trains it; keeps each microbatch's loss by source for the log."""

    def __init__(self, model: VLM, train: str):
        super().__init__()
        self.model, self.train_set, self.rates = model, train, rates(model)
        self.by_source: dict[str, list[float]] = {}

    def forward(self, packed: Pack) -> Tensor:
        """The loss of each supervised token of a pack, float32[K]."""
        return self.model(packed)

    def loss(self, losses: Tensor, packed: Pack) -> Tensor:
        """Their mean; Composer weighs it by the pack's share of the batch's supervised tokens."""
        each = losses.detach()[: len(packed.owner)]
        sums = each.new_zeros(len(packed.lengths)).index_add_(0, packed.owner, each)
        counts = packed.owner.bincount(minlength=len(packed.lengths)).tolist()
        for source, total, n in zip(packed.sources, sums.tolist(), counts, strict=False):
            entry = self.by_source.setdefault(source, [0.0, 0])
            entry[0], entry[1] = entry[0] + total, entry[1] + n
        return losses.mean()

    def flops_per_batch(self, documents: Sequence[Document]) -> int:
        """Useful FLOPs of this process's part of a batch, for SpeedMonitor."""
        keys, row = self.model.recipe.visual, self.model.row
        forward = forward_flops(self.rates, documents, row.side**2, keys.pool_after_projector)
        return step_flops(forward, self.train_set)


def splitter(tile: int) -> Callable[[list[Document], int], list[Pack]]:
    """Documents -> packs of at most `budget` positions, as many on every process."""

    def split_batch(documents: list[Document], budget: int) -> list[Pack]:
        packs = split(documents, budget)
        most = torch.tensor(len(packs))
        dist.all_reduce(most, reduce_operation="MAX")
        packs += [[] for _ in range(int(most) - len(packs))]
        return [pack(documents, tile) for documents in packs]

    return split_batch


def count_tokens(batch: list[Document] | Pack) -> dict[str, int]:
    """Positions and supervised tokens of a batch or of one pack."""
    if isinstance(batch, Pack):
        return {"total": sum(batch.lengths), "loss_generating": len(batch.targets)}
    return {
        "total": sum(len(d.ids) for d in batch),
        "loss_generating": sum(d.learned for d in batch),
    }


class Report(Callback):
    """The progress bar, losses.csv, and a clean stop at SIGTERM or at a loss that is no number."""

    def __init__(self, name: str, file: Path, sources: Sequence[str], interval: int):
        self.name, self.file, self.sources = name, file, sorted(sources)
        self.interval, self.stop, self.bar, self.start = interval, False, None, 0.0
        self.before = signal.getsignal(signal.SIGTERM)

    def fit_start(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        self.start, self.tokens = time.perf_counter(), int(state.timestamp.token)
        if dist.get_global_rank():
            return
        done, total = int(state.timestamp.batch), int(state.max_duration.value)
        rows = list(csv.DictReader(self.file.open())) if self.file.exists() else []
        with self.file.open("w", newline="") as out:  # steps after the checkpoint are done again
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(r for r in rows if r["stage"] != self.name or int(r["step"]) <= done)
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit="step", mininterval=1.0)

    def batch_end(self, state: State, logger: Logger) -> None:
        student = state.model.module if dist.get_world_size() > 1 else state.model
        mine = student.by_source
        table = torch.tensor(
            [[*mine.get(s, (0.0, 0))] for s in self.sources] + [[float(self.stop), 0]],
            dtype=torch.float64,
        )
        dist.all_reduce(table)
        student.by_source = {}
        *rows, (stop, _) = table.tolist()
        self.stop = bool(stop)
        total, tokens = (sum(column) for column in zip(*rows, strict=True))
        step, seconds = int(state.timestamp.batch), time.perf_counter() - self.start
        loss = total / tokens
        if loss != loss or loss == float("inf"):
            names = [d.name for d in state.batch]
            raise ValueError(f"{self.name} step {step}: the loss is {loss}; samples {names}")
        if self.bar is None:
            return
        lr = max(group["lr"] for group in state.optimizers[0].param_groups)
        lines = [
            ("all", total, tokens),
            *((s, *r) for s, r in zip(self.sources, rows, strict=True)),
        ]
        with self.file.open("a", newline="") as out:
            csv.writer(out).writerows(
                (self.name, step, source, f"{t / n:.6f}", int(n), f"{lr:.3g}", f"{seconds:.2f}")
                for source, t, n in lines if n
            )  # fmt: skip
        speed = (int(state.timestamp.token) - self.tokens) / seconds
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(step - self.bar.n)

    def due(self, state: State, event: object) -> bool:
        """Whether a checkpoint is to be written now: every interval, and before stopping."""
        step = int(state.timestamp.batch)
        return self.stop or step % self.interval == 0

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.stop:
            raise SystemExit(143)  # the checkpoint of the last step has been written

    def close(self, state: State, logger: Logger) -> None:
        signal.signal(signal.SIGTERM, self.before)
        if self.bar is not None:
            self.bar.close()


def steps_of(stage: Stage, batches: int) -> int:
    """Optimizer steps of a stage whose loader has `batches`: "1ep" or "500ba"."""
    duration = Time.from_timestring(stage.duration)
    if duration.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or not batches:
        raise ValueError(
            f"duration {stage.duration!r} with {batches} batches: write '2ep' or '500ba', and give "
            f"at least batch_size = {stage.batch_size} samples"
        )
    return int(duration.value * (batches if duration.unit == TimeUnit.EPOCH else 1))


def announce(name: str, stage: Stage, counts: dict[str, int], steps: int) -> None:
    """Print what a stage trains and what it freezes."""
    train = ", ".join(f"{part} {n:,}" for part, n in counts.items() if n)
    frozen = ", ".join(part for part, n in counts.items() if not n) or "nothing"
    mix = ", ".join(f"{source} x {times:g}" for source, times in stage.sources.items() if times)
    print(
        f"\n{name}: trains {train} parameters (lr {stage.lr:g}, vision {stage.vision_lr:g}); "
        f"frozen: {frozen}\n  {steps:,} steps of {stage.batch_size} samples: {mix}"
    )


def run_stage(recipe: Recipe, name: str, model: VLM) -> None:
    """Train one stage; resumes from its last checkpoint if it was stopped."""
    stage, run = recipe.stages[name], Path(recipe.run)
    visual = recipe.visual if stage.anyres else replace(recipe.visual, max_grid="base")
    writer = model.writer(visual, stage.template)
    loader = make_loader(recipe, stage, writer, dist.get_world_size())
    steps = steps_of(stage, len(loader))
    counts = model.set_trainable(stage.train)
    if stage.checkpoint_activations:
        model.llm.gradient_checkpointing_enable()
    if dist.get_global_rank() == 0:
        announce(name, stage, counts, steps)
    sources = [s for s, times in stage.sources.items() if times]
    report = Report(name, run / "losses.csv", sources, stage.save_interval)
    data = DataSpec(
        loader,
        split_batch=splitter(model.row.tile),
        get_num_samples_in_batch=len,
        get_num_tokens_in_batch=count_tokens,
        microbatch_transforms=lambda pack: pack.to(model.newline.device),
    )
    rates = (stage.lr, stage.vision_lr, stage.projector_lr or stage.lr, stage.weight_decay)
    trainer = Trainer(
        model=Student(model, stage.train),
        train_dataloader=data,
        optimizers=torch.optim.AdamW(model.groups(*rates), fused=True),
        schedulers=CosineAnnealingWithWarmupScheduler(f"{round(steps * stage.warmup)}ba"),
        algorithms=[GradientClipping(clipping_type="norm", clipping_threshold=1.0)],
        callbacks=[report, SpeedMonitor(window_size=10)],
        max_duration=f"{steps}ba",
        device_train_microbatch_size=stage.microbatch_tokens,
        accumulate_train_batch_on_tokens=True,
        precision="fp32",  # the model's own autocast computes in bf16, on the CPU too
        seed=recipe.seed,
        device="gpu" if torch.cuda.is_available() else "cpu",
        progress_bar=False,
        **checkpointing(name, run, report),
    )
    trainer.fit()
    trainer.close()


def checkpointing(name: str, run: Path, report: Report) -> dict:
    """Composer's settings: one checkpoint a stage, found again by the stage's name.

    Composer's own autoresume deletes a signal file once per node, which fails where nodes share
    the run folder, as they must here.
    """
    latest = run / "checkpoints" / f"{name}-latest-rank0.pt"
    return {
        "run_name": name,
        "save_folder": str(run / "checkpoints"),
        "save_filename": name + "-ba{batch}-rank{rank}.pt",
        "save_latest_filename": name + "-latest-rank{rank}.pt",
        "save_interval": report.due,
        "save_num_checkpoints_to_keep": 1,
        "save_overwrite": True,
        "load_path": str(latest) if latest.exists() else None,
    }


def environment(recipe: Recipe) -> dict:
    """What a result depends on besides the recipe."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "python": platform.python_version(), **{p: version(p) for p in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": dist.get_world_size(), "commit": commit, "seed": recipe.seed,
    }  # fmt: skip


def check_run(recipe: Recipe) -> None:
    """Refuse a run folder that holds a run of another recipe."""
    file = Path(recipe.run) / "recipe.yaml"
    changed = differences(read_recipe(file), recipe) if file.exists() else []
    if changed and not recipe.fresh:
        raise ValueError(
            f"{recipe.run} holds a run of another recipe:\n  "
            + "\n  ".join(changed)
            + "\nGive another folder (run=...), or fresh=true to delete it and start anew"
        )


def open_run(recipe: Recipe) -> None:
    """Make the run folder: the resolved recipe and what else a result depends on."""
    run = Path(recipe.run)
    if recipe.fresh:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(replace(recipe, fresh=False), run / "recipe.yaml")
    (run / "environment.json").write_text(json.dumps(environment(recipe), indent=1))


def train(recipe: Recipe) -> Path:
    """All stages of a recipe; returns the run folder. All nodes must see run and data folders."""
    dist.initialize_dist(get_device(None), timeout=3600)
    run, first = Path(recipe.run), dist.get_global_rank() == 0
    check_run(recipe)
    dist.barrier()
    if first:
        open_run(recipe)
        prepare(recipe)
    dist.barrier()
    if (run / "model.safetensors").exists():
        return run
    reproducibility.seed_all(recipe.seed)
    model = VLM(recipe)
    stages = [name for name, stage in recipe.stages.items() if stage]
    for name in stages:
        done = run / name / "model.safetensors"
        if done.exists():
            load_weights(model, done)
            continue
        run_stage(recipe, name, model)
        if first:
            save(model, run / name)
        dist.barrier()
    if first:
        save(model, run)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    dist.barrier()
    return run
