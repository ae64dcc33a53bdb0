"""Training: the stages, one after another, with MosaicML Composer.

Each stage says what it trains, packs its batches by a token budget, and ends in a folder that the
next stage, `evaluate`, `chat` and the demo can load. The same recipe again resumes.

A training step as Composer runs it, in the order of the code below:

    1  split_batch    a batch of documents -> packs of at most `microbatch_tokens` positions
    2  ComposerVLM    each pack forward and backward. The loss is the mean over the supervised
                      tokens of the whole batch, over all packs and processes.
    3  Clipping       the gradient's norm is limited to 1; then Composer runs AdamW
    4  Logging        losses of all processes -> progress bar, losses.csv, notes.txt
    5  Stopping       all processes agree whether to stop, and whether a checkpoint is due
"""

import atexit
import os
import signal
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path

import torch
from composer import Callback, ComposerModel, DataSpec, Logger, State, Trainer
from composer.callbacks import SpeedMonitor
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist, get_device, reproducibility
from composer.utils.parallelism import FSDP2Config
from torch import Tensor
from torch.distributed.checkpoint import state_dict
from tqdm import tqdm

from nanollava import runs
from nanollava.checkpoint import gather, load_weights, save
from nanollava.cost import forward_flops, rates, step_flops
from nanollava.data import STOP_SIGNALS, Loader, make_loader, prepare
from nanollava.extras.losses import JUMP_WINDOW, SMOOTHING, expected_losses, find_jump
from nanollava.files import explain_full_disk
from nanollava.model import TRAIN, VLM
from nanollava.recipe import Recipe, Stage
from nanollava.sequence import Document, Pack, count_tokens, pack, split


def all_reduce(values: Tensor, operation: str) -> Tensor:
    """The SUM or MAX of a CPU tensor over all processes. NCCL reduces only GPU tensors."""
    values = get_device().tensor_to_device(values)
    dist.all_reduce(values, reduce_operation=operation)
    return values.cpu()


def split_batch(documents: list[Document], budget: int, tile: int) -> list[Pack]:
    """Step 1: documents -> packs of at most `budget` positions, equally many on every process."""
    groups = split(documents, budget)
    most = int(all_reduce(torch.tensor(len(groups)), "MAX"))
    # A process that has run out of documents still takes part in every reduction of gradients.
    groups += [[]] * (most - len(groups))
    return [pack(group, tile) for group in groups]


class ComposerVLM(ComposerModel):
    """Step 2: the model as Composer trains it. It also adds up the losses by source for the log."""

    def __init__(self, model: VLM, stage: Stage):
        super().__init__()
        self.model, self.stage = model, stage
        self.rates = rates(model)
        self.sources = list(stage.mix)
        self.table = torch.zeros(len(self.sources), 2, dtype=torch.float64)  # loss sum, tokens

    def forward(self, packed: Pack) -> Tensor:
        """The loss of each supervised token of a pack, float32[K]."""
        return self.model(packed)

    def loss(self, losses: Tensor, packed: Pack) -> Tensor:
        """Their mean. Composer weighs it by the pack's share of the batch's supervised tokens."""
        if packed.learned:
            of_document = torch.tensor([self.sources.index(name) for name in packed.sources])
            of_token = of_document[packed.owner.cpu()]  # (K,), the index of each token's source
            values = losses.detach().cpu().double()
            pairs = torch.stack([values, torch.ones_like(values)], dim=1)  # (K, 2)
            self.table.index_add_(0, of_token, pairs)
        return losses.mean()

    def flops_per_batch(self, documents: list[Document]) -> int:
        """Useful FLOPs of this process's part of a batch, for SpeedMonitor."""
        T = self.model.spec.side**2
        after = self.model.recipe.visual.pool_after_projector
        return step_flops(forward_flops(self.rates, documents, T, after), TRAIN[self.stage.train])


class Clipping(Callback):
    """Step 3: limits the norm of the gradient to 1."""

    def __init__(self, grad_scale: float):
        self.grad_scale = grad_scale  # the factor by which the backend inflates gradients

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if self.grad_scale != 1:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, self.grad_scale)
        # Composer's GradientClipping silently leaves the gradients of FSDP2 as they are.
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)


class Logging(Callback):
    """Step 4: progress bar, losses.csv and notes.txt. Ends a run whose loss is not a number."""

    def __init__(self, run: Path, stage: str, expected: dict[int, str]):
        self.run, self.stage, self.expected = run, stage, expected
        self.recent: deque[float] = deque(maxlen=JUMP_WINDOW)
        self.bar: tqdm | None = None  # only the first process shows one

    def fit_start(self, state: State, logger: Logger) -> None:
        self.start_time = time.perf_counter()
        self.start_tokens = state.timestamp.token.value
        if dist.get_global_rank() == 0:
            step, steps = state.timestamp.batch.value, state.max_duration.value
            runs.rewind_losses(self.run, self.stage, step)
            form = self.stage + "|{bar:10}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
            self.bar = tqdm(total=steps, initial=step, mininterval=1, bar_format=form)

    def batch_end(self, state: State, logger: Logger) -> None:
        # 1. The mean loss of each source. Sums travel, not means, because a process may hold few
        #    tokens of a source, or none.
        model = getattr(state.model, "module", state.model)  # DDP wraps it, FSDP does not
        sums = torch.cat([model.table, model.table.sum(0, keepdim=True)])  # (sources + 1, 2)
        model.table.zero_()
        pairs = zip([*model.sources, "all"], all_reduce(sums, "SUM").tolist(), strict=True)
        losses = [(source, total / n, int(n)) for source, (total, n) in pairs if n]
        loss = losses[-1][1] if losses else nan
        # 2. What is unusual about this batch.
        step = state.timestamp.batch.value
        notes = [document.note for document in state.batch if document.note]
        warning = find_jump(loss, self.recent)
        self.recent.append(loss)
        if warning:
            by_source = ", ".join(f"{source} {mean:.3g}" for source, mean, _ in losses[:-1])
            samples = ", ".join(document.name for document in state.batch)
            notes.insert(0, f"step {step}: {warning} ({by_source}); samples {samples}")
        runs.log_notes(self.run, self.stage, notes)
        if not isfinite(loss):
            raise ValueError(f"{self.stage} {notes[0]}. Fix these samples, or lower the lr")
        # 3. losses.csv and the progress bar.
        if self.bar is None:
            return
        seconds = time.perf_counter() - self.start_time
        speed = (state.timestamp.token.value - self.start_tokens) / seconds
        lr = max(state.schedulers[0].get_last_lr())
        runs.add_losses(self.run, self.stage, step, losses, lr, seconds)
        last = [*self.recent][-SMOOTHING:]
        text = f"loss {sum(last) / len(last):.3f}{self.expected.get(step, '')}"
        self.bar.set_postfix_str(f"{text}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.close()


class Stopping(Callback):
    """Step 5: says when a checkpoint is due. After a stop signal, ends the run with one."""

    def __init__(self, interval: int):
        self.interval = interval  # steps between checkpoints
        self.received = 0  # the stop signal that this process received last
        self.stop = False  # whether any process has received one
        self.handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def fit_start(self, state: State, logger: Logger) -> None:
        for number, handler in self.handlers.items():
            if handler != signal.SIG_IGN:  # `nohup` leaves SIGHUP ignored, and it stays so
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        """Remember a stop signal. A second Ctrl-C does not wait for the checkpoint."""
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if dist.get_global_rank() == 0:  # os.write, because print is not safe in a handler
            os.write(2, b"\nstopping after this step, with a checkpoint (Ctrl-C again: stop now)\n")

    def batch_end(self, *_: object) -> None:
        # A signal may have reached one process only, but all have to stop at the same step.
        self.stop = bool(all_reduce(torch.tensor(self.received), "MAX"))

    def due(self, state: State, event: object) -> bool:
        """Whether a checkpoint is due: at every interval, and before stopping.

        None is due at the last step, after which the stage's own folder is written.
        """
        step = state.timestamp.batch.value
        return step < state.max_duration.value and (self.stop or step % self.interval == 0)

    def batch_start(self, state: State, logger: Logger) -> None:
        self.exit_if_asked()  # the checkpoint of the last step has been written

    def exit_if_asked(self) -> None:
        """End the process, as a shell reports the signal, if any process was asked to stop."""
        if self.stop:
            raise SystemExit(128 + (self.received or signal.SIGTERM))

    def close(self, state: State, logger: Logger) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def make_trainer(recipe: Recipe, name: str, model: VLM, loader: Loader, stop: Stopping) -> Trainer:
    """Composer's trainer for a stage, over a loader whose batches are lists of documents."""
    stage, run = recipe.stages[name], Path(recipe.run)
    steps = runs.steps_of(stage, len(loader))
    logging = Logging(run, name, expected_losses(recipe.reference, name, steps))
    clipping = Clipping(runs.gradient_scale() if recipe.shard else 1.0)
    data = DataSpec(
        loader,
        split_batch=lambda documents, budget: split_batch(documents, budget, model.spec.tile),
        get_num_samples_in_batch=len,
        get_num_tokens_in_batch=count_tokens,
        microbatch_transforms=lambda pack: pack.to(model.newline.device),
    )
    lrs = (stage.lr, stage.vision_lr, stage.projector_lr or stage.lr)
    with runs.weights_only(run):
        return Trainer(
            model=ComposerVLM(model, stage),
            train_dataloader=data,
            optimizers=torch.optim.AdamW(model.groups(*lrs, stage.weight_decay), fused=True),
            schedulers=CosineAnnealingWithWarmupScheduler(f"{round(steps * stage.warmup)}ba"),
            callbacks=[clipping, logging, stop, SpeedMonitor(window_size=10)],
            max_duration=f"{steps}ba",
            device_train_microbatch_size=stage.microbatch_tokens,  # split_batch gets it as it is
            accumulate_train_batch_on_tokens=True,  # else uneven packs are averaged as if even
            precision="fp32",  # the model's own autocast computes in bf16, on the CPU too
            seed=recipe.seed,
            progress_bar=False,
            **sharding(recipe, model),
            **runs.checkpointing(name, run, stop.due),
        )


def sharding(recipe: Recipe, model: VLM) -> dict:
    """Composer's settings for `shard`: a unit per block, the rest (tied embeddings) in the root."""
    if not recipe.shard:
        return {}
    for block in model.blocks():
        block._fsdp_wrap = True
    settings = FSDP2Config(state_dict_type="full", load_monolith_rank0_only=True)
    return {"parallelism_config": {"fsdp": settings}}


def begin(recipe: Recipe, previous: Path | None) -> VLM:
    """The model with which a stage begins: pretrained parts, or the previous stage's weights.

    With `shard` only the first process holds them, until the trainer shards them.
    """
    empty = recipe.shard and dist.get_global_rank() > 0
    with torch.device("meta") if empty else nullcontext():
        model = VLM(recipe, "random" if previous or empty else "")
    if previous and not empty:
        load_weights(model, previous / "model.safetensors")
    return model


def fit(recipe: Recipe, name: str, model: VLM, stop: Stopping) -> None:
    """Train a stage's model, from the stage's last checkpoint on."""
    stage = recipe.stages[name]
    writer = model.writer(recipe.visual_of(stage), stage.template)
    loader = make_loader(recipe, stage, writer, dist.get_world_size())
    # Before the trainer: DDP expects a gradient for all that requires one when it is made.
    counts = model.set_trainable(stage.train)
    trainer = make_trainer(recipe, name, model, loader, stop)
    # After the trainer: it counts the FLOPs of a step, which leave out recomputation.
    model.checkpoint_activations(stage.checkpoint_activations)
    if dist.get_global_rank() == 0:
        runs.print_stage(name, stage, counts, trainer.state.max_duration.value)
    trainer.fit()
    trainer.close()
    # Composer's exit handler and this cache of torch's would hold the model and Adam's moments.
    atexit.unregister(trainer.engine._close)
    if hasattr(state_dict._get_fqns, "cache_clear"):
        state_dict._get_fqns.cache_clear()


def run_stage(recipe: Recipe, name: str, previous: Path | None) -> Path:
    """Train one stage, unless that is done; returns its folder."""
    folder = Path(recipe.run) / name
    if (folder / "model.safetensors").exists():
        return folder
    stop = Stopping(recipe.stages[name].save_interval)
    with explain_full_disk(folder.parent):
        model = begin(recipe, previous)
        fit(recipe, name, model, stop)
        state = gather(model) if recipe.shard else None
        if dist.get_global_rank() == 0:
            save(model, folder, state)
        dist.barrier()
    # A signal in or after the last step leaves no checkpoint: the stage's folder is complete.
    stop.batch_end()
    stop.exit_if_asked()
    return folder


def train(recipe: Recipe) -> Path:
    """All stages of a recipe; returns the run folder. All nodes must see run and data folders."""
    dist.initialize_dist(get_device(), timeout=3600)
    run, first = Path(recipe.run), dist.get_global_rank() == 0
    runs.check_run(recipe)
    if (run / "model.safetensors").exists() and not recipe.fresh:
        if first:
            print(f"{run} is already trained. Pass fresh=true to delete it and train anew")
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
    folder = None
    for name, stage in recipe.stages.items():
        if stage:
            folder = run_stage(recipe, name, folder)
    if first:
        runs.finish(run, folder)
    dist.barrier()
    return run
