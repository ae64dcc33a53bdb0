"""The plan of a run before it starts: tokens, FLOPs, memory and hours of each stage.

Image sizes and text lengths are measured on prepared shards or on the first records of a local
source. Where neither is at hand they are assumed as the source's `assume` key states. FLOPs are
counted (cost.py). Memory is counted from shapes: parameters, gradients, Adam's two moments, and
what the backward pass keeps:

    bytes per position and block = a width + b MLP width    (SAVED; found by counting saved tensors)

Hours are FLOPs at a stated share of the device's peak: an estimate, not a measurement.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from timeit import repeat
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from nanollava.anyres import Layout, open_image
from nanollava.cost import PARTS, count, rates, step_flops
from nanollava.data import split_images, stored, usable
from nanollava.encoder import ENCODERS, build
from nanollava.llm import load_llm, load_tokenizer
from nanollava.model import TRAIN, VLM
from nanollava.projector import Projector
from nanollava.prompts import read_turns
from nanollava.recipe import Assumed, Recipe, Stage
from nanollava.runs import steps_of
from nanollava.sequence import Document, Writer
from nanollava.sources import records

BATCH = 8  # documents of the padded batch that packing is compared with
LIMIT = 300  # records that are measured per source

DEVICES = {  # dense bf16 FLOP/s of the data sheet, bytes of memory
    "h200": (989e12, 141e9),
    "h100": (989e12, 80e9),
    "a100": (312e12, 80e9),
    "4090": (165e12, 24e9),
    "cpu": (0, psutil.virtual_memory().total),  # its speed is measured
}


@dataclass(frozen=True)
class Saved:
    """Bytes that the backward pass keeps per position and block, by the block's widths."""

    width: int  # times the model's width
    mlp: int  # times the MLP's width


# A frozen encoder keeps nothing. Under bf16 autocast norms and residuals stay float32.
SAVED = {
    "fp32": {"frozen llm": Saved(24, 12), "llm": Saved(44, 16), "encoder": Saved(32, 8)},
    "bf16": {"frozen llm": Saved(16, 6), "llm": Saved(36, 8), "encoder": Saved(20, 4)},
}


@dataclass(frozen=True)
class Sketch:
    """A document that is only assumed: what it costs, without its content."""

    ids: range
    layouts: tuple[Layout, ...]
    learned: int


Mix = list[tuple[Document | Sketch, float]]  # each with the number of samples that it stands for


def parts_of(recipe: Recipe) -> SimpleNamespace:
    """A model's parts, named as in a VLM, on the meta device: shapes without memory."""
    spec = ENCODERS[recipe.encoder]
    with torch.device("meta"):
        encoder = build(spec, "random")
        llm = load_llm(recipe.llm, "random")
        projector = Projector(spec.width, llm.config.hidden_size, recipe.connector)
    return SimpleNamespace(spec=spec, encoder=encoder, projector=projector, llm=llm)


def sketches(recipe: Recipe, name: str, writer: Writer) -> tuple[list[Document | Sketch], int, str]:
    """Documents of a source, how many samples it has, and how the documents are known."""
    source = recipe.sources[name]
    shards = stored(recipe, name)
    samples = source.samples or source.expected if shards is None else len(shards)
    if not samples:
        advice = "set `samples` or `expected`, or run prepare"
        raise ValueError(f"sources.{name} has an unknown number of samples: {advice}")
    if shards is None and "hf://" in source.path:
        return assumed(name, source.assume, writer), samples, "assumed"
    if shards is None:
        found = usable(islice(records(source, recipe.seed), LIMIT), [])
    else:
        numbers = random.Random(0).sample(range(len(shards)), min(LIMIT, len(shards)))
        rows = (shards[i] for i in numbers)
        found = ((row, split_images(row["image"], row["sizes"])) for row in rows)
    writer = replace(writer, tokenizer=load_tokenizer(recipe.llm))
    measured = []
    for record, images in found:
        turns = read_turns(record["conversations"], len(images))
        measured.append(writer.plain(turns, [open_image(image) for image in images], name))
    if not measured:
        raise ValueError(f"sources.{name}: none of its first records can be read: run prepare")
    return measured, samples, f"measured on {len(measured)}"


def assumed(name: str, assume: Assumed, writer: Writer) -> list[Sketch]:
    """About a hundred documents of a source, in the shares that its `assume` key gives."""
    if not assume.sizes:
        raise ValueError(f"sources.{name} has neither shards nor `assume.sizes`: run prepare")
    documents = []
    for size, share in assume.sizes.items():
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*|none", size) or not 0 < share <= 1:
            advice = "a size and its share of the samples, such as 640x480: 0.7 or none: 0.3"
            raise ValueError(f"sources.{name}.assume.sizes has {size}: {share}. Give {advice}")
        width, _, height = size.partition("x")
        images = [SimpleNamespace(size=(int(width), int(height)))] if height else []
        layouts = writer.layouts(images)
        length = assume.text + sum(lay.length for lay in layouts)
        documents += [Sketch(range(length), layouts, assume.learned)] * round(100 * share)
    return documents


def padding(mix: Mix) -> float:
    """The share that padding to the longest of BATCH documents would add to the positions."""
    documents, weights = zip(*mix, strict=True)
    shuffled = random.Random(0).choices(documents, weights, k=200 * BATCH)
    lengths = [len(document.ids) for document in shuffled]
    batches = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    padded = sum(max(batch) * BATCH for batch in batches)
    return padded / sum(lengths) - 1


def numel(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def memory(
    recipe: Recipe,
    stage: Stage,
    parts: VLM | SimpleNamespace,
    mean: dict[str, Any],
    devices: int,
    dtype: str,
) -> dict[str, float]:
    """Bytes on one device: weights, gradients with Adam's moments, activations, logits.

    `mean`: what `count` counts, of the mean sample, and the positions of the `longest` sample.
    """
    config = parts.llm.config
    trains = TRAIN[stage.train]
    sizes = {part: numel(getattr(parts, part)) for part in ("encoder", "projector", "llm")}
    weights = sum(sizes.values())
    trained = sum(size for part, size in sizes.items() if part in trains)
    # The largest pack: no more positions than the recipe allows, unless one document has more.
    batch = stage.batch_size / devices * mean["positions"]
    positions = max(min(stage.microbatch_tokens, batch), mean["longest"])
    documents = positions / mean["positions"]
    features = documents * mean["views"] * parts.spec.side**2
    kept = activations(stage, parts, positions, features, dtype)
    if dtype == "bf16" and not stage.checkpoint_activations:
        kept += 2 * weights  # autocast's copies of the weights
    # FSDP gathers its root unit and two blocks at a time, and the gradients of what trains.
    block = numel(parts.llm.model.layers[0])
    root = weights - block * config.num_hidden_layers - sizes["encoder"]
    gathered = 4 * (root + 2 * block) * (2 if "llm" in trains else 1)
    shares = devices if recipe.shard else 1
    return {
        "weights": 4 * weights / shares,
        "gradients, Adam": 12 * trained / shares,
        "gathered shards": gathered * recipe.shard,
        "activations": kept,
        "logits": documents * mean["learned"] * config.vocab_size * (14 if dtype == "bf16" else 16),
    }


def activations(
    stage: Stage, parts: VLM | SimpleNamespace, positions: float, features: float, dtype: str
) -> float:
    """Bytes that the backward pass keeps of the LLM's positions and of the encoder's features."""
    spec, config = parts.spec, parts.llm.config
    saved = SAVED[dtype]["llm" if "llm" in TRAIN[stage.train] else "frozen llm"]
    widths = saved.width * config.hidden_size + saved.mlp * config.intermediate_size
    llm = positions * widths  # of one block
    inputs = positions * config.hidden_size * config.num_hidden_layers  # of all blocks
    encoder = 0.0
    if "encoder" in TRAIN[stage.train]:
        saved = SAVED[dtype]["encoder"]
        block = parts.encoder.blocks[0].named_parameters()
        mlp = max(p.shape[0] for name, p in block if "mlp" in name)
        encoder = features * (saved.width * spec.width + saved.mlp * mlp)
        inputs += features * spec.width * spec.blocks
    if stage.checkpoint_activations:  # the float32 input of each block, and one block as a whole
        return 4 * inputs + max(llm, encoder)
    return llm * config.num_hidden_layers + encoder * spec.blocks


def advice(recipe: Recipe, name: str, stage: Stage, need: dict[str, float], capacity: float) -> str:
    """Which key to change so that a stage fits into a device's memory."""
    fixed = need["weights"] + need["gradients, Adam"]
    if fixed > 0.9 * capacity:
        shard = "" if recipe.shard else "shard=true and "
        times = ceil(fixed / (0.7 * capacity))
        return f"{shard}at least {times} times as many devices, or another llm"
    if not stage.checkpoint_activations:
        return f"stages.{name}.checkpoint_activations=true"
    rest = sum(need.values()) - fixed  # grows with the pack
    tokens = int(stage.microbatch_tokens * 0.9 * (capacity - fixed) / rest)
    return f"stages.{name}.microbatch_tokens={tokens}, or a lower visual.max_visual_tokens"


def cpu_peak() -> float:
    """FLOP/s of this machine's processor on a large float32 matrix product."""
    seconds = repeat("x @ x", number=1, globals={"x": torch.rand(2048, 2048)})
    return 2 * 2048**3 / min(seconds)


def work(
    recipe: Recipe, stage: Stage, parts: SimpleNamespace, rate: dict[str, int]
) -> dict[str, Any]:
    """One stage's samples, steps, tokens and FLOPs; `rate` is what `rates` returns."""
    spec, visual = parts.spec, recipe.visual_of(stage)
    template = stage.template or recipe.template
    # Without a tokenizer, which may have to be downloaded: only what is measured needs one.
    writer = Writer(
        None, visual, spec.tile, spec.side, template, recipe.label_mask, recipe.max_length
    )
    mix: Mix = []
    known = {}
    for source, times in stage.mix.items():
        documents, total, known[source] = sketches(recipe, source, writer)
        weight = times * total / len(documents)  # samples that each of them stands for
        mix += [(document, weight) for document in documents]
    samples = sum(weight for _, weight in mix)
    steps = steps_of(stage, int(samples) // stage.batch_size)
    mean: Counter[str] = Counter()  # what a sample holds
    for document, weight in mix:
        counts = count([document], spec.side**2, visual.pool_after_projector)
        mean.update({key: value * weight / samples for key, value in counts.items()})
    forward = {}
    for part, flops in rate.items():
        unit = PARTS[part].unit  # what the rate is per: views, positions, ...
        forward[part] = flops * mean[unit] * steps * stage.batch_size
    return {
        "known": known,
        "samples": round(samples),
        "steps": steps,
        **mean,
        "longest": max(len(document.ids) for document, _ in mix),
        "padding": padding(mix),
        "forward": forward,
        "flops": step_flops(forward, TRAIN[stage.train]),
    }


def plan(recipe: Recipe, device: str = "h200", devices: int = 1, share: float = 0.4) -> dict:
    """Each stage's work, memory and hours, on devices that reach `share` of their peak speed."""
    if device not in DEVICES or devices < 1 or not 0 < share <= 1:
        expected = f"give 1 or more of {', '.join(DEVICES)}, and a share above 0 and up to 1"
        raise ValueError(f"cannot plan for {devices} x {device} at a share of {share}: {expected}")
    stages = {name: stage for name, stage in recipe.stages.items() if stage}
    if not stages:
        raise ValueError("the recipe has no stages to plan: give a recipe that trains")
    parts = parts_of(recipe)
    rate = rates(parts)
    peak, capacity = DEVICES[device]
    speed = (peak or cpu_peak()) * share * devices
    dtype = "fp32" if device == "cpu" or recipe.precision == "fp32" else "bf16"
    plans = {}
    for name, stage in stages.items():
        totals = work(recipe, stage, parts, rate)
        need = memory(recipe, stage, parts, totals, devices, dtype)
        fits = sum(need.values()) < 0.95 * capacity
        # Recomputing activations repeats the forward pass: it takes time, but is no useful work.
        again = sum(totals["forward"].values()) * stage.checkpoint_activations
        plans[name] = totals | {
            "memory": need,
            "change": "" if fits else advice(recipe, name, stage, need, capacity),
            "hours": (totals["flops"] + again) / speed / 3600,
        }
    return plans


def column(stage: dict) -> dict[str, str]:
    """A stage's plan as the cells of one column of the table."""
    cells = {}
    for key in ("samples", "steps"):
        cells[key] = f"{stage[key]:,}"
    for key in ("views", "positions", "visual", "learned"):
        cells[f"{key} per sample"] = f"{stage[key]:,.1f}"
    cells["longest sample"] = f"{stage['longest']:,}"
    cells["padding would add"] = f"{stage['padding']:.0%}"
    forward = sum(stage["forward"].values())
    for part, flops in stage["forward"].items():
        cells[f"forward, {part}"] = f"{flops / forward:.0%}"
    cells["PFLOPs in all"] = f"{stage['flops'] / 1e15:,.4g}"
    for part, size in stage["memory"].items():
        cells[f"GB, {part}"] = f"{size / 1e9:,.2f}"
    cells["GB, in all"] = f"{sum(stage['memory'].values()) / 1e9:,.2f}"
    cells["hours"] = f"{stage['hours']:,.3g}"
    return cells


def show(stages: dict[str, dict], title: str) -> None:
    """Print a plan, a column for each stage."""
    columns = [column(stage) for stage in stages.values()]
    table = Table("", *stages, title=title, box=SIMPLE)
    for key in columns[0]:
        table.add_row(key, *(cells[key] for cells in columns))
    Console().print(table)
    for name, stage in stages.items():
        known = [f"{source} {how}" for source, how in stage["known"].items()]
        print(f"{name}: {', '.join(known)}")
        if stage["change"]:
            print(f"{name} does not fit. Change: {stage['change']}")


def print_plan(recipe: Recipe, device: str, devices: int, share: float, as_json: bool) -> None:
    """Print a run's tokens, FLOPs, memory and hours, as a table or as JSON."""
    stages = plan(recipe, device, devices, share)
    if as_json:
        print(json.dumps(stages, indent=1))
    else:
        show(stages, f"{devices} x {device} at {share:.0%} of its peak")
