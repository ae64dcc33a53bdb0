"""The plan of a run before it starts: tokens, FLOPs, memory and hours of each stage.

Image sizes and text lengths are measured on prepared shards or on a local source's first records,
and otherwise assumed as the source's `assume` key states. FLOPs are counted (cost.py). Memory is
counted from shapes: parameters, gradients, Adam's two moments, and what the backward pass keeps:

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

import psutil
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nanollava.anyres import Layout, open_image
from nanollava.cost import PARTS, count, rates, step_flops
from nanollava.data import split_images, stored, usable
from nanollava.encoder import ENCODERS, build
from nanollava.llm import load_llm, load_tokenizer
from nanollava.model import TRAIN
from nanollava.projector import Projector
from nanollava.prompts import read_turns
from nanollava.recipe import Recipe, Stage
from nanollava.runs import steps_of
from nanollava.sequence import Writer
from nanollava.sources import records

# Dense bf16 FLOP/s of the data sheet, bytes of memory.
DEVICES = {
    "h200": (989e12, 141e9),
    "h100": (989e12, 80e9),
    "a100": (312e12, 80e9),
    "4090": (165e12, 24e9),
    "cpu": (0, psutil.virtual_memory().total),
}
# (a, b) of the LLM, frozen and trained, and of a trained encoder; a frozen encoder keeps nothing.
# Under bf16 autocast norms and residuals stay float32.
SAVED = {"fp32": ((24, 12), (44, 16), (32, 8)), "bf16": ((16, 6), (36, 8), (20, 4))}
BATCH = 8  # documents that a padded batch would hold, for the comparison
LIMIT = 300  # records looked at per source


@dataclass(frozen=True)
class Sketch:
    """What a document costs, without its content."""

    ids: range
    layouts: tuple[Layout, ...]
    learned: int


Mix = list[tuple[Sketch, float]]  # each with the number of samples that it stands for


def sketches(recipe: Recipe, name: str, writer: Writer) -> tuple[list[Sketch], int, str]:
    """Documents of a source, how many samples it has, and how the documents are known."""
    rows, source, out = stored(recipe, name), recipe.sources[name], []
    samples = source.samples or source.expected if rows is None else len(rows)
    if not samples:
        raise ValueError(f"sources.{name}: how many? Say `samples` or `expected`, or run prepare")
    if rows is None and "hf://" in source.path:
        if not source.assume.sizes:
            raise ValueError(f"sources.{name}: neither shards (run prepare) nor `assume.sizes`")
        for size, share in source.assume.sizes.items():
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*|none", size) or not 0 < share <= 1:
                told = f"sources.{name}.assume.sizes: {size}: {share}"
                raise ValueError(f"{told}; expected e.g. 640x480: 0.7 or none: 0.3")
            W, _, H = size.partition("x")
            images = [SimpleNamespace(size=(int(W), int(H)))] if H else []  # "none": text only
            layouts = writer.layouts(images)
            length = source.assume.text + sum(lay.length for lay in layouts)
            out += [Sketch(range(length), layouts, source.assume.learned)] * round(100 * share)
        return out, samples, "assumed"
    if rows is None:
        found = usable(islice(records(source, recipe.seed), LIMIT), [])
    else:
        some = random.Random(0).sample(range(len(rows)), min(LIMIT, len(rows)))
        found = ((row, split_images(row["image"], row["sizes"])) for row in (rows[i] for i in some))
    writer = replace(writer, tokenizer=load_tokenizer(recipe.llm))
    for row, images in found:
        turns = read_turns(row["conversations"], len(images))
        plain = writer.plain(turns, [open_image(data) for data in images], name)
        out.append(Sketch(range(len(plain.ids)), plain.layouts, plain.learned))
    if not out:
        raise ValueError(f"sources.{name}: none of its first records can be read: run prepare")
    return out, samples, f"measured on {len(out)}"


def parts_of(recipe: Recipe) -> SimpleNamespace:
    """The model's parts on the meta device: shapes without memory."""
    with torch.device("meta"):
        row = ENCODERS[recipe.encoder]
        encoder, llm = build(row, "random"), load_llm(recipe.llm, "random")
        projector = Projector(row.width, llm.config.hidden_size, recipe.connector)
    return SimpleNamespace(row=row, encoder=encoder, llm=llm, projector=projector)


def padding(mix: Mix) -> float:
    """The share that padding to the longest of BATCH documents would add to the positions."""
    shuffled = random.Random(0).choices(*zip(*mix, strict=True), k=200 * BATCH)
    lengths = [len(s.ids) for s in shuffled]
    rows = [max(lengths[i : i + BATCH]) * BATCH for i in range(0, len(lengths), BATCH)]
    return sum(rows) / sum(lengths) - 1


def memory(
    recipe: Recipe, stage: Stage, parts: SimpleNamespace, mean: dict, devices: int, dtype: str
) -> dict[str, float]:
    """Bytes on one device: weights, gradients with Adam's moments, activations, logits."""
    sizes = {
        n: sum(p.numel() for p in getattr(parts, n).parameters())
        for n in ("encoder", "projector", "llm")
    }
    trained = sum(n for part, n in sizes.items() if part in TRAIN[stage.train])
    config, row, share = parts.llm.config, parts.spec, devices if recipe.shard else 1
    batch = stage.batch_size / devices * mean["positions"]
    positions = max(min(stage.microbatch_tokens, batch), mean["longest"])  # of the largest pack
    part = positions / mean["positions"]  # documents in it
    seen = part * mean["views"] * row.side**2
    mlp = max(p.shape[0] for n, p in parts.encoder.blocks[0].named_parameters() if "mlp" in n)
    (a, b), (c, d) = SAVED[dtype]["llm" in TRAIN[stage.train]], SAVED[dtype][2]
    llm = positions * (a * config.hidden_size + b * config.intermediate_size)  # a block
    encoder = seen * (c * row.width + d * mlp) * ("encoder" in TRAIN[stage.train])
    if stage.checkpoint_activations:  # a float32 input per block, and one block as a whole
        inputs = positions * config.hidden_size * config.num_hidden_layers
        inputs += seen * row.width * row.blocks * ("encoder" in TRAIN[stage.train])
        kept = 4 * inputs + max(llm, encoder)
    else:
        kept = llm * config.num_hidden_layers + encoder * row.blocks
        kept += 2 * sum(sizes.values()) * (dtype == "bf16")  # autocast's copies of the weights
    block = sum(p.numel() for p in parts.llm.model.layers[0].parameters())
    root = sum(sizes.values()) - block * config.num_hidden_layers - sizes["encoder"]
    whole = 4 * (root + 2 * block) * (2 if "llm" in TRAIN[stage.train] else 1)
    return {
        "weights": 4 * sum(sizes.values()) / share,
        "gradients, Adam": 12 * trained / share,
        "gathered shards": whole * recipe.shard,  # root unit, two blocks, their gradients
        "activations": kept,
        "logits": part * mean["learned"] * config.vocab_size * (14 if dtype == "bf16" else 16),
    }


def advice(recipe: Recipe, name: str, stage: Stage, need: dict[str, float], room: float) -> str:
    """Which key to change so that a stage fits."""
    fixed = need["weights"] + need["gradients, Adam"]
    if fixed > 0.9 * room:
        share = "" if recipe.shard else "shard=true and "
        return f"{share}at least {ceil(fixed / (0.7 * room))} times as many devices, or another llm"
    if not stage.checkpoint_activations:
        return f"stages.{name}.checkpoint_activations=true"
    tokens = int(stage.microbatch_tokens * 0.9 * (room - fixed) / (sum(need.values()) - fixed))
    return f"stages.{name}.microbatch_tokens={tokens}, or a lower visual.max_visual_tokens"


def cpu_peak() -> float:
    """FLOP/s of this machine's processor on a large float32 matrix product."""
    seconds = repeat("x @ x", number=1, globals={"x": torch.rand(2048, 2048)})
    return 2 * 2048**3 / min(seconds)


def plan_stage(
    recipe: Recipe,
    name: str,
    parts: SimpleNamespace,
    rate: dict[str, int],
    device: str,
    devices: int,
    speed: float,
) -> dict:
    """One stage's samples, steps, tokens, FLOPs, memory and hours; `speed`: FLOP/s in all."""
    stage, row, room = recipe.stages[name], parts.spec, DEVICES[device][1]
    visual = recipe.visual_of(stage)
    writer = Writer(
        None,
        visual,
        row.tile,
        row.side,
        stage.template or recipe.template,
        recipe.label_mask,
        recipe.max_length,
    )
    mix: Mix = []
    known = {}
    for source, times in stage.mix.items():
        mine, n, known[source] = sketches(recipe, source, writer)
        mix += [(sketch, times * n / len(mine)) for sketch in mine]
    samples = sum(n for _, n in mix)
    steps = steps_of(stage, int(samples) // stage.batch_size)
    mean = Counter()  # of a sample
    for sketch, n in mix:
        counts = count([sketch], row.side**2, visual.pool_after_projector)
        mean.update({key: value * n / samples for key, value in counts.items()})
    forward = {
        part: per * mean[PARTS[part].unit] * steps * stage.batch_size for part, per in rate.items()
    }
    mean["longest"] = max(len(sketch.ids) for sketch, _ in mix)
    flops = step_flops(forward, TRAIN[stage.train])
    again = sum(forward.values()) * stage.checkpoint_activations  # the forward pass again
    dtype = "fp32" if device == "cpu" or recipe.precision == "fp32" else "bf16"
    need = memory(recipe, stage, parts, mean, devices, dtype)
    fits = sum(need.values()) < 0.95 * room
    return {
        "known": known,
        "samples": round(samples),
        "steps": steps,
        **mean,
        "padding": padding(mix),
        "forward": forward,
        "flops": flops,
        "memory": need,
        "change": "" if fits else advice(recipe, name, stage, need, room),
        "hours": (flops + again) / speed / 3600,
    }


def plan(recipe: Recipe, device: str = "h200", devices: int = 1, share: float = 0.4) -> dict:
    """Stage by stage; `share` is the part of the device's peak that is hoped for."""
    if device not in DEVICES or devices < 1 or not 0 < share <= 1:
        raise ValueError(
            f"{devices} x {device} at a share of {share}: give 1 or more of "
            f"{', '.join(DEVICES)}, and a share above 0 and up to 1"
        )
    if not any(recipe.stages.values()):
        raise ValueError("the recipe has no stages to plan")
    parts = parts_of(recipe)
    rate, speed = rates(parts), (DEVICES[device][0] or cpu_peak()) * share * devices
    return {
        name: plan_stage(recipe, name, parts, rate, device, devices, speed)
        for name, stage in recipe.stages.items()
        if stage
    }


def show(stages: dict[str, dict], title: str) -> None:
    """Print a plan, a column for each stage."""
    columns = {}
    for name, x in stages.items():
        forward = sum(x["forward"].values())
        gigabytes = {**x["memory"], "in all": sum(x["memory"].values())}
        columns[name] = {
            **{key: f"{x[key]:,}" for key in ("samples", "steps")},
            **{
                f"{key} per sample": f"{x[key]:,.1f}"
                for key in ("views", "positions", "visual", "learned")
            },
            "longest sample": f"{x['longest']:,}",
            "padding would add": f"{x['padding']:.0%}",
            **{f"forward, {part}": f"{n / forward:.0%}" for part, n in x["forward"].items()},
            "PFLOPs in all": f"{x['flops'] / 1e15:,.4g}",
            **{f"GB, {part}": f"{n / 1e9:,.2f}" for part, n in gigabytes.items()},
            "hours": f"{x['hours']:,.3g}",
        }
    table = Table("", *stages, title=title, box=SIMPLE)
    for key in next(iter(columns.values())):
        table.add_row(key, *(column[key] for column in columns.values()))
    Console().print(table)
    for name, x in stages.items():
        print(f"{name}: " + ", ".join(f"{source} {how}" for source, how in x["known"].items()))
        if x["change"]:
            print(f"{name} does not fit. Change: {x['change']}")


def print_plan(recipe: Recipe, device: str, devices: int, share: float, as_json: bool) -> None:
    """Print a run's tokens, FLOPs, memory and hours, as a table or as JSON."""
    stages = plan(recipe, device, devices, share)
    if as_json:
        print(json.dumps(stages, indent=1))
    else:
        show(stages, f"{devices} x {device} at {share:.0%} of its peak")
