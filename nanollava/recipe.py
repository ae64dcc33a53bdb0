"""A recipe: the YAML file of a whole run, typed and checked.

A recipe is also a Python program, so that `composer recipes/nano.yaml` works as typed: its first
line is a YAML key that Python reads as a call. `base: other.yaml` plus the changed keys makes a
variant, and `key=value` after the file name changes a key for one run. Local paths in a recipe
begin with ./ or ../ and are relative to the recipe; outputs go below the folder you are in.

Every key is declared below with its default, its comment and, where it has them, its choices or
its least value. The keys of `visual` are in anyres.py.
"""

import re
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanollava.anyres import Visual, layout, parse_grids
from nanollava.encoder import ENCODERS
from nanollava.files import write_atomically
from nanollava.metrics import METRICS
from nanollava.projector import ACTIVATIONS
from nanollava.prompts import MASKS, TEMPLATES


def key(
    default: Any = MISSING,
    choices: Collection[str] | None = None,
    least: float | None = None,
    free: bool = False,
) -> Any:
    """A recipe's key. `free`: it may differ when a run is resumed, and is part of no digest."""
    metadata = {"choices": choices, "least": least, "free": free}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Assumed:
    """What `plan` assumes about a source before its shards are written."""

    sizes: dict[str, float] = key(dict)  # "640x480" or "none" (text only): share of the samples
    text: int = key(0)  # text tokens of a sample
    learned: int = key(0)  # how many of them are supervised


@dataclass(frozen=True)
class Source:
    """Where records come from (sources.py)."""

    path: str = key()  # FILE.py:function or KIND:WHERE
    split: str = key("train")  # passed to FILE.py:function
    samples: int = key(0, least=0)  # only the first records; 0: all of them
    prompt: str = key("")  # put after <image> in a human turn that has no words
    expected: int = key(0, free=True)  # how many records its publisher states
    origin: str = key("", free=True)  # where it is published
    licence: str = key("", free=True)  # of its content, as published
    assume: Assumed = key(Assumed, free=True)  # what `plan` takes it to be like


@dataclass(frozen=True)
class Stage:
    """One training stage."""

    sources: dict[str, float] = key(dict)  # name: how often each of its samples is seen
    train: str = key("full", choices=("projector", "projector+llm", "full"))  # the parts
    lr: float = key(2e-5, least=0)  # peak learning rate
    vision_lr: float = key(2e-6, least=0)  # of the vision encoder
    projector_lr: float = key(0.0, least=0)  # of the projector; 0: lr
    batch_size: int = key(128, least=1)  # samples per step, over all processes
    microbatch_tokens: int = key(16384, least=1, free=True)  # positions per pack; sets the memory
    duration: str = key("1ep")  # epochs or steps: 2ep, 500ba
    warmup: float = key(0.03, least=0)  # share of the duration
    weight_decay: float = key(0.0, least=0)  # of matrices; vectors have none
    template: str = key("", choices=("", *TEMPLATES))  # "": the recipe's
    anyres: bool = key(True)  # false: one squashed view per image
    checkpoint_activations: bool = key(False, free=True)  # recompute blocks to save memory
    save_interval: int = key(500, least=1, free=True)  # steps between checkpoints

    @property
    def mix(self) -> dict[str, float]:
        """The sources that are seen at all."""
        return {name: times for name, times in self.sources.items() if times}


@dataclass(frozen=True)
class Task:
    """One evaluation task: a source whose last answer is the reference."""

    path: str = key()  # as a source's
    metric: str = key(choices=METRICS)  # metrics.py
    split: str = key("test")  # passed to FILE.py:function
    samples: int = key(200, least=0)  # questions; 0: all
    max_new_tokens: int = key(32, least=1)  # of an answer


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on."""

    run: str = key("runs/unnamed", free=True)  # the run folder
    data: str = key("data", free=True)  # where shards are written
    seed: int = key(0, least=0)  # of all that is drawn at random
    fresh: bool = key(False, free=True)  # true: delete the run in the run folder and start again
    program: str = key("")  # FILE.py:function to call instead of training (stage 0)
    encoder: str = key("so400m_384", choices=ENCODERS)  # the vision encoder (encoder.py)
    encoder_weights: str = key("published")  # published | random | a file
    llm: str = key("Qwen/Qwen1.5-0.5B-Chat")  # a hub id or a folder
    llm_weights: str = key("published")  # published | random
    connector: str = key("relu", choices=ACTIVATIONS)  # the projector's activation
    projector_norm: bool = key(False)  # scale the projector's output like the LLM's embeddings
    visual: Visual = key(Visual)  # how an image becomes visual tokens (anyres.py)
    template: str = key("qwen_1_5", choices=TEMPLATES)  # the chat format (prompts.py)
    label_mask: str = key("answers", choices=MASKS)  # released: headers and newlines as well
    isolate_documents: bool = key(True)  # attention never crosses the documents of a pack
    max_length: int = key(32768, least=1)  # positions of one document
    precision: str = key("auto", choices=("auto", "fp32"))  # auto: bf16 where the device has it
    workers: int = key(2, least=0, free=True)  # processes that prepare batches
    shard: bool = key(False, free=True)  # FSDP2: each process holds its share of every block
    reference: str = key("", free=True)  # losses.csv of reference runs, for the progress bar
    sources: dict[str, Source] = key(dict)  # by name: where records come from
    stages: dict[str, Stage | None] = key(dict)  # by name, in order; null leaves one out
    tasks: dict[str, Task | None] = key(dict, free=True)  # by name: what is evaluated
    settings: dict[str, dict[str, str]] = key(dict, free=True)  # name: visual keys, to evaluate at

    def visual_of(self, stage: Stage) -> Visual:
        """The visual keys of a stage, which may go without tiles."""
        return self.visual if stage.anyres else replace(self.visual, max_grid="base")


# The keys that entered digests in the first edition, and still do at any value. A key that is
# added later is left out at its default, so that it does not orphan results measured before it.
FIRST_EDITION = {
    Recipe: "seed program encoder encoder_weights llm llm_weights connector projector_norm visual "
    "template label_mask isolate_documents max_length precision sources stages",
    Visual: "max_grid lift max_visual_tokens budget pooling pool_stride pool_after_projector "
    "arrange",
    Source: "path split samples prompt",
    Stage: "sources train lr vision_lr projector_lr batch_size duration warmup weight_decay "
    "template anyres",
    Task: "path metric split samples max_new_tokens",
}


def read_yaml(path: Path, variants: tuple[Path, ...] = ()) -> DictConfig:
    """A recipe file merged over its bases, local paths made absolute.

    `variants`: the files that led here by their `base` keys.
    """
    if path in variants:
        chain = " -> ".join(file.name for file in (*variants, path))
        raise ValueError(f"{path} is its own base: {chain}. Remove one of these `base` keys")
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} is not a file")
    try:
        tree = OmegaConf.create(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} is not a mapping of keys to values")
    keys = OmegaConf.to_container(tree)
    # The launcher line is a key, too.
    keys = {name: value for name, value in keys.items() if not str(name).startswith("if __name__")}
    base = keys.pop("base", None)
    own = OmegaConf.create(absolute_paths(keys, path.parent))
    if not base:
        return own
    return OmegaConf.merge(read_yaml((path.parent / base).resolve(), (*variants, path)), own)


def absolute_paths(value: Any, folder: Path) -> Any:
    """A tree of keys whose local paths are taken from `folder`."""
    if isinstance(value, dict):
        return {name: absolute_paths(inner, folder) for name, inner in value.items()}
    if not isinstance(value, str):
        return value
    # A path stands alone, after KIND: or after the + that joins further files.
    local = r"(^(?:\w+:)?|\+)(\.\.?/[^+]*)"
    return re.sub(local, lambda match: match[1] + str((folder / match[2]).resolve()), value)


def read_recipe(path: str | Path, overrides: list[str] | None = None, **changes: Any) -> Recipe:
    """A checked recipe; `overrides` as typed ("stages.stage2.lr=1e-5"), `changes` as values.

    Raises ValueError for an unknown key, with the closest valid name, for a wrong type, and for a
    value that cannot work.
    """
    for word in overrides or []:
        if "=" not in word:
            raise ValueError(f"{word!r} is not an override. Write key=value, e.g. run=runs/mine")
    try:
        typed = OmegaConf.to_container(OmegaConf.from_dotlist(overrides or []))
        tree = OmegaConf.merge(
            OmegaConf.structured(Recipe),
            read_yaml(Path(path).resolve()),
            absolute_paths(typed, Path.cwd()),
            changes,
        )
        recipe = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        hint = ""
        if is_dataclass(error.object_type) and "Did you mean" not in str(error):
            names = ", ".join(f.name for f in fields(error.object_type))
            hint = f"\n    The keys here are {names}"
        raise ValueError(f"{path}: {error}{hint}") from error
    for visual_keys in recipe.settings.values():
        with_visual(recipe, visual_keys)
    return check(recipe)


def check(recipe: Recipe) -> Recipe:
    """Raise ValueError for what cannot work, before anything is loaded; returns the recipe."""
    check_keys(recipe, "")
    check_keys(recipe.visual, "visual.")
    for kind in ("sources", "stages", "tasks"):
        for name, part in getattr(recipe, kind).items():
            if part is not None:
                check_keys(part, f"{kind}.{name}.")
    check_visual(recipe)
    for name, stage in recipe.stages.items():
        if stage is not None:
            check_stage(recipe, f"stages.{name}", stage)
    return recipe


def check_keys(part: Any, where: str) -> None:
    """Compare each key of a part with the choices and the least value that it is declared with."""
    for f in fields(part):
        value = getattr(part, f.name)
        choices, least = f.metadata.get("choices"), f.metadata.get("least")
        if choices is not None and value not in choices:
            names = ", ".join(filter(None, choices))
            raise ValueError(f"{where}{f.name}: {value!r} is unknown. Choose from {names}")
        if least is not None and not value >= least:  # also true of nan
            raise ValueError(f"{where}{f.name}: {value}; expected {least} or more")


def check_visual(recipe: Recipe) -> None:
    """Lay out one image per grid, of the size that fills it: the largest budgets fail there."""
    visual, spec = recipe.visual, ENCODERS[recipe.encoder]
    if visual.budget == "mosaic" and visual.arrange == "flat":
        raise ValueError("visual.arrange: flat needs budget per_view; a mosaic is one raster")
    for columns, rows in parse_grids(visual.max_grid):
        size = max(columns, 1) * spec.tile, max(rows, 1) * spec.tile
        layout(size, visual, spec.tile, spec.side)


def check_stage(recipe: Recipe, where: str, stage: Stage) -> None:
    """What one key of a stage alone cannot tell."""
    if not stage.sources:
        raise ValueError(f"{where} has no sources. The recipe's stages are {list(recipe.stages)}")
    for source, times in stage.sources.items():
        if source not in recipe.sources:
            names = list(recipe.sources)
            raise ValueError(f"{where}.sources: {source!r} is not one of the recipe's: {names}")
        if not times >= 0:
            raise ValueError(f"{where}.sources.{source}: {times}; expected 0 or more")
    if not re.fullmatch(r"[1-9]\d*(ep|ba)", stage.duration):
        raise ValueError(f"{where}.duration: {stage.duration!r}. Write '2ep' or '500ba'")
    if stage.warmup > 1:
        raise ValueError(f"{where}.warmup: {stage.warmup}; expected a share of the duration, 0-1")


def with_visual(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with some visual keys changed, as a setting does: typed and checked."""
    try:
        visual = OmegaConf.merge(OmegaConf.structured(Visual), asdict(recipe.visual), changes)
        return check(replace(recipe, visual=OmegaConf.to_object(visual)))
    except OmegaConfBaseException as error:
        raise ValueError(f"visual keys {dict(changes)}: {error}") from error


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The resolved recipe as YAML, readable by `read_recipe`."""
    with write_atomically(path) as half:
        half.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def used_sources(recipe: Recipe) -> set[str]:
    """The names of the sources that a stage uses."""
    return {name for stage in recipe.stages.values() if stage for name in stage.mix}


def differences(a: Recipe, b: Recipe) -> list[str]:
    """'key: old -> new' for each key that makes b another run than a."""
    old, new = run_keys(a), run_keys(b)
    pairs = [(name, old.get(name), new.get(name)) for name in sorted(old | new)]
    return [f"{name}: {x} -> {y}" for name, x, y in pairs if x != y]


def run_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys that make a run, by dotted name; of the sources, those that a stage uses."""
    used = {name: recipe.sources[name] for name in sorted(used_sources(recipe))}
    return _flatten(hashed(replace(recipe, sources=used)))


def hashed(value: Any) -> Any:
    """A part of a recipe as it enters digests, as plain dicts.

    Free keys are left out, and so are keys newer than the first edition at their default value.
    """
    if isinstance(value, dict):
        return {name: hashed(inner) for name, inner in value.items()}
    if not is_dataclass(value):
        return value
    first = FIRST_EDITION[type(value)].split()
    tree = {}
    for f in fields(value):
        inner = getattr(value, f.name)
        new = f.name not in first
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.metadata.get("free") or (new and inner == default):
            continue
        tree[f.name] = hashed(inner)
    return tree


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= _flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
