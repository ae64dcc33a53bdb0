"""Training: the stages, one after another, with MosaicML Composer.

Each stage says what it trains, packs its batches by a token budget, and ends in a folder that the
next stage, `evaluate`, `chat` and the demo can load. The loss is the mean over the supervised
tokens of the whole batch, over all microbatches and processes. The same recipe again resumes.
"""

import atexit
import os
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from composer import Callback, ComposerModel, DataSpec, State, Trainer
from composer.callbacks import SpeedMonitor
from composer.loggers import Logger
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, get_device, reproducibility
from composer.utils.parallelism import FSDP2Config
from torch import Tensor
from torch.distributed.checkpoint import state_dict
from torch.utils.data import DataLoader
from tqdm import tqdm

from nanollava import runs
from nanollava.checkpoint import gather, load_weights, save
from nanollava.cost import forward_flops, rates, step_flops
from nanollava.data import STOP_SIGNALS, make_loader, prepare
from nanollava.files import explain_full_disk
from nanollava.model import TRAIN, VLM
from nanollava.recipe import Recipe, Stage
from nanollava.sequence import Document, Pack, count_tokens, pack, split


class ComposerVLM(ComposerModel):
    """The model as Composer trains it; sums up losses by source for the log."""

    def __init__(self, model: VLM, stage: Stage):
        super().__init__()
        self.model, self.train_set, self.rates = model, TRAIN[stage.train], rates(model)
        self.sources = list(stage.mix)
        self.table = torch.zeros(len(self.sources), 2, dtype=torch.float64)  # loss sum, tokens

    def forward(self, packed: Pack) -> Tensor:
        """The loss of each supervised token of a pack, float32[K]."""
        return self.model(packed)

    def loss(self, losses: Tensor, packed: Pack) -> Tensor:
        """Their mean; Composer weighs it by the pack's share of the batch's supervised tokens."""
        if packed.learned:
            source = torch.tensor([self.sources.index(name) for name in packed.sources])
            each = losses.detach().cpu().double()
            rows = torch.stack([each, torch.ones_like(each)], dim=1)
            self.table.index_add_(0, source[packed.owner.cpu()], rows)
        return losses.mean()

    def flops_per_batch(self, documents: Sequence[Document]) -> int:
        """Useful FLOPs of this process's part of a batch, for SpeedMonitor."""
        keys, row = self.model.recipe.visual, self.model.spec
        forward = forward_flops(self.rates, documents, row.side**2, keys.pool_after_projector)
        return step_flops(forward, self.train_set)


def over_processes(values: Tensor, operation: str) -> Tensor:
    """The SUM or MAX of a tensor over all processes; NCCL wants it on the device meanwhile."""
    values = get_device(None).tensor_to_device(values)
    dist.all_reduce(values, reduce_operation=operation)
    return values.cpu()


def split_batch(documents: list[Document], budget: int, tile: int) -> list[Pack]:
    """Documents -> packs of at most `budget` positions, as many on every process."""
    packs = split(documents, budget)
    most = int(over_processes(torch.tensor(len(packs)), "MAX"))
    # A process that has run out of documents still takes part in every reduction.
    packs += [[] for _ in range(most - len(packs))]
    return [pack(documents, tile) for documents in packs]


class Report(Callback):
    """Progress bar, losses.csv, clipping; stops at a stop signal or at a loss that is no number."""

    def __init__(self, run: Path, name: str, interval: int, course: Any, excess=1.0):
        self.run, self.name, self.interval, self.course = run, name, interval, course
        self.excess = excess  # how many times too large the gradients arrive
        self.asked = 0  # the signal that asked this process to stop
        self.stop = False  # whether any process was asked to: all of them agree after each step
        self.bar = None
        self.before = {n: signal.getsignal(n) for n in STOP_SIGNALS}

    @property
    def code(self) -> int:
        """The exit code of a run that was asked to stop, as a shell would report the signal."""
        return 128 + (self.asked or signal.SIGTERM)

    def ask(self, number: int, frame: object) -> None:
        """Note a stop signal; a second Ctrl-C does not wait for the checkpoint."""
        if number == self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        if dist.get_global_rank() == 0:
            told = "\nstopping after this step, with a checkpoint (Ctrl-C again: at once)\n"
            os.write(2, told.encode())  # print is not safe in a signal handler

    def fit_start(self, state: State, logger: Logger) -> None:
        for number, before in self.before.items():
            if before != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self.ask)
        self.start, self.tokens = time.perf_counter(), int(state.timestamp.token)
        if dist.get_global_rank() == 0:
            done, total = int(state.timestamp.batch), int(state.max_duration.value)
            runs.keep_losses(self.run, self.name, done)
            form = self.name + "|{bar:10}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
            self.bar = tqdm(total=total, initial=done, mininterval=1, bar_format=form)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        if self.excess != 1:
            torch._foreach_div_(gradients, self.excess)
        # Composer's GradientClipping leaves the gradients of FSDP2 as they are, without a word.
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)

    def batch_end(self, state: State, logger: Logger) -> None:
        student = getattr(state.model, "module", state.model)  # DDP wraps it, FSDP does not
        stop = torch.tensor([[float(self.asked > 0), 0]], dtype=torch.float64)
        # Sums travel, not means: a process may hold none of a source, or very little.
        table = torch.cat([student.table, student.table.sum(0, keepdim=True), stop])
        *rows, (stop, _) = over_processes(table, "SUM").tolist()
        student.table.zero_()
        self.stop = bool(stop)
        step, loss = int(state.timestamp.batch), rows[-1][0] / (rows[-1][1] or nan)
        means = {s: total / n for s, (total, n) in zip(student.sources, rows[:-1]) if n}
        notes = [document.note for document in state.batch if document.note]
        if odd := self.course.odd(loss, means):
            names = [document.name for document in state.batch]
            notes.insert(0, f"step {step}: {odd}; samples {', '.join(names)}")
        runs.log_notes(self.run, self.name, notes)
        if not isfinite(loss):
            raise ValueError(f"{self.name} {notes[0]}")
        if self.bar is None:
            return
        seconds = time.perf_counter() - self.start
        lr = max(group["lr"] for group in state.optimizers[0].param_groups)
        runs.add_losses(
            self.run,
            [
                (self.name, step, source, f"{total / n:.6f}", int(n), f"{lr:.3g}", f"{seconds:.2f}")
                for source, (total, n) in zip([*student.sources, "all"], rows, strict=True)
                if n
            ],
        )
        speed = (int(state.timestamp.token) - self.tokens) / seconds
        told = f"{self.course.tell(step, loss)}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(step - self.bar.n)

    def due(self, state: State, event: object) -> bool:
        """Whether a checkpoint is to be written now: every interval, and before stopping.

        Not at the last step, after which the stage's own folder is written.
        """
        step = int(state.timestamp.batch)
        return step < int(state.max_duration.value) and (self.stop or step % self.interval == 0)

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.stop:
            raise SystemExit(self.code)  # the checkpoint of the last step has been written

    def close(self, state: State, logger: Logger) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)
        if self.bar is not None:
            self.bar.close()


def run_stage(recipe: Recipe, name: str, model: VLM) -> int:
    """Train one stage, from its last checkpoint on; returns the exit code if it was asked to stop
    in its last step, else 0.
    """
    stage = recipe.stages[name]
    writer = model.writer(recipe.visual_of(stage), stage.template)
    loader = make_loader(recipe, stage, writer, dist.get_world_size())
    # Before the trainer is made: DDP expects a gradient of all that requires one at that moment.
    counts = model.set_trainable(stage.train)
    trainer = make_trainer(recipe, name, model, loader)  # counts FLOPs, without recomputation
    model.checkpoint_activations(stage.checkpoint_activations)
    if dist.get_global_rank() == 0:
        runs.print_stage(name, stage, counts, int(trainer.state.max_duration.value))
    trainer.fit()
    trainer.close()
    # Both would hold this stage's model and Adam's moments until the process ends.
    atexit.unregister(trainer.engine._close)
    getattr(state_dict._get_fqns, "cache_clear", int)()
    report = next(c for c in trainer.state.callbacks if isinstance(c, Report))
    return report.code if report.stop else 0


def make_trainer(recipe: Recipe, name: str, model: VLM, loader: DataLoader) -> Trainer:
    """Composer's trainer for a stage, over a loader whose batches are lists of documents."""
    stage, run = recipe.stages[name], Path(recipe.run)
    steps = runs.steps_of(stage, len(loader))
    course = runs.LossBand(recipe.reference, name, steps)
    excess = runs.gradient_scale() if recipe.shard else 1.0
    report = Report(run, name, stage.save_interval, course, excess)
    data = DataSpec(
        loader,
        split_batch=partial(split_batch, tile=model.spec.tile),
        get_num_samples_in_batch=len,
        get_num_tokens_in_batch=count_tokens,
        microbatch_transforms=lambda pack: pack.to(model.newline.device),
    )
    rates = (stage.lr, stage.vision_lr, stage.projector_lr or stage.lr, stage.weight_decay)
    with runs.weights_only(run):
        return Trainer(
            model=ComposerVLM(model, stage),
            train_dataloader=data,
            optimizers=torch.optim.AdamW(model.groups(*rates), fused=True),
            schedulers=CosineAnnealingWithWarmupScheduler(f"{round(steps * stage.warmup)}ba"),
            callbacks=[report, SpeedMonitor(window_size=10)],
            max_duration=f"{steps}ba",
            device_train_microbatch_size=stage.microbatch_tokens,  # as it is, to split_batch
            accumulate_train_batch_on_tokens=True,  # else uneven packs are averaged as if even
            precision="fp32",  # the model's own autocast computes in bf16, on the CPU too
            seed=recipe.seed,
            device="gpu" if torch.cuda.is_available() else "cpu",
            progress_bar=False,
            **sharding(recipe, model),
            **runs.checkpointing(name, run, report.due),
        )


def sharding(recipe: Recipe, model: VLM) -> dict:
    """Composer's settings for `shard`: a unit per block, the rest (tied embeddings) in the root."""
    if not recipe.shard:
        return {}
    for block in model.blocks():
        block._fsdp_wrap = True
    settings = FSDP2Config(state_dict_type="full", load_monolith_rank0_only=True)
    return {"parallelism_config": {"fsdp": settings}}


def begin(recipe: Recipe, last: Path | None) -> VLM:
    """The model as a stage finds it: pretrained parts, or the folder of the stage before.

    With `shard` only the first process holds it, until the trainer deals it out.
    """
    away = recipe.shard and dist.get_global_rank() > 0
    with torch.device("meta") if away else nullcontext():
        model = VLM(recipe, "random" if last or away else "")
    if last and not away:
        load_weights(model, last / "model.safetensors")
    return model


def train(recipe: Recipe) -> Path:
    """All stages of a recipe; returns the run folder. All nodes must see run and data folders."""
    dist.initialize_dist(get_device(None), timeout=3600)
    run, first = Path(recipe.run), dist.get_global_rank() == 0
    runs.check_run(recipe)
    if (run / "model.safetensors").exists() and not recipe.fresh:
        if first:
            print(f"{run} is already trained; fresh=true starts anew")
        return run
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // dist.get_local_world_size()))
    dist.barrier()
    if first:
        runs.open_run(recipe, dist.get_world_size())
        prepare(recipe)
    dist.barrier()
    recipe = replace(recipe, fresh=False)
    reproducibility.seed_all(recipe.seed)
    last = None
    for name in (name for name, stage in recipe.stages.items() if stage):
        if not (run / name / "model.safetensors").exists():
            with explain_full_disk(run):
                model = begin(recipe, last)
                stop = run_stage(recipe, name, model)
                state = gather(model) if recipe.shard else None
                if first:
                    save(model, run / name, state)
                dist.barrier()
            if stop:
                raise SystemExit(stop)
        last = run / name
    if first:
        runs.finish(run, last)
    dist.barrier()
    return run
