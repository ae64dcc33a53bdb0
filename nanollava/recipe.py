"""A recipe: the YAML file of a whole run, typed and checked.

A recipe is also a Python program, so that `composer recipes/nano.yaml` works as typed: its first
line is a YAML key that Python reads as a call. `base: other.yaml` plus the changed keys is a
variant; `key=value` after the file name changes keys for one run. Local paths in a recipe begin
with ./ or ../ and are relative to the recipe; outputs go below the folder you are in.
"""

import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
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

PROGRAM = "if __name__"  # how the launcher line begins
MEMORY = ("microbatch_tokens", "checkpoint_activations", "save_interval")  # of a stage
# may differ on resume: what decides where and how a run computes, not what
FREE = {"run", "fresh", "base", "data", "workers", "tasks", "settings", "reference", "shard"}


@dataclass(frozen=True)
class Assumed:
    """What `plan` takes a source to be like before its shards are there."""

    sizes: dict[str, float] = field(default_factory=dict)  # "640x480" or "none": share of samples
    text: int = 0  # tokens of a sample's words
    learned: int = 0  # those of them that are supervised


@dataclass(frozen=True)
class Source:
    """Where records come from (sources.py)."""

    path: str  # FILE.py:function or KIND:WHERE
    split: str = "train"  # told to FILE.py:function; of files, choose by name
    samples: int = 0  # the first so many; 0: all there are
    prompt: str = ""  # put after <image> in a human turn that has no words
    expected: int = 0  # records at its origin
    origin: str = ""
    licence: str = ""
    assume: Assumed = field(default_factory=Assumed)


ABOUT = ("expected", "origin", "licence", "assume")  # keys that only document a source


@dataclass(frozen=True)
class Stage:
    """One training stage."""

    sources: dict[str, float] = field(default_factory=dict)  # name: times each sample is seen
    train: str = "full"  # projector | projector+llm | full
    lr: float = 2e-5
    vision_lr: float = 2e-6
    projector_lr: float = 0.0  # 0: the LLM's
    batch_size: int = 128  # samples per step, over all processes
    microbatch_tokens: int = 16384  # positions per packed row: what memory is bought with
    duration: str = "1ep"
    warmup: float = 0.03  # share of the duration
    weight_decay: float = 0.0
    template: str = ""  # "": the recipe's
    anyres: bool = True  # False: one squashed view per image
    checkpoint_activations: bool = False
    save_interval: int = 500  # steps between checkpoints

    @property
    def mix(self) -> dict[str, float]:
        """The sources that are seen at all."""
        return {name: times for name, times in self.sources.items() if times}


@dataclass(frozen=True)
class Task:
    """One evaluation task: a source whose last answer is the reference."""

    path: str
    metric: str
    split: str = "test"
    samples: int = 200
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on."""

    run: str = "runs/unnamed"  # the run folder
    data: str = "data"  # where shards are written
    seed: int = 0
    fresh: bool = False  # True: start anew even if the run folder has a run
    program: str = ""  # FILE.py:function to call instead of training (stage 0)
    encoder: str = "so400m_384"
    encoder_weights: str = "published"
    llm: str = "Qwen/Qwen1.5-0.5B-Chat"
    llm_weights: str = "published"
    connector: str = "relu"
    projector_norm: bool = False  # scale the projector's output like the LLM's embeddings
    visual: Visual = field(default_factory=Visual)
    template: str = "qwen_1_5"
    label_mask: str = "answers"
    isolate_documents: bool = True
    max_length: int = 32768
    precision: str = "auto"  # auto: bf16 where the device has it | fp32
    workers: int = 2
    shard: bool = False  # FSDP2: each process holds its share of every block
    reference: str = ""  # the losses.csv of reference runs, for the band in the progress bar
    sources: dict[str, Source] = field(default_factory=dict)
    stages: dict[str, Stage | None] = field(default_factory=dict)
    tasks: dict[str, Task | None] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)  # name: visual keys

    def visual_of(self, stage: Stage) -> Visual:
        """The visual keys of a stage, which may go without tiles."""
        return self.visual if stage.anyres else replace(self.visual, max_grid="base")


CHOICES = {  # of a key in one of these parts
    Recipe: {
        "encoder": ENCODERS,
        "connector": ACTIVATIONS,
        "template": TEMPLATES,
        "label_mask": MASKS,
        "precision": ("auto", "fp32"),
    },
    Visual: {
        "pooling": ("bilinear", "average"),
        "arrange": ("raster", "flat"),
        "budget": ("per_view", "mosaic"),
    },
    Stage: {"train": ("projector", "projector+llm", "full"), "template": ("", *TEMPLATES)},
    Task: {"metric": METRICS},
    Source: {},
}
LEAST = {  # of a key wherever it stands
    "seed": 0,
    "workers": 0,
    "max_length": 1,
    "lift": 0,
    "pool_stride": 1,
    "samples": 0,
    "lr": 0,
    "vision_lr": 0,
    "projector_lr": 0,
    "batch_size": 1,
    "microbatch_tokens": 1,
    "warmup": 0,
    "weight_decay": 0,
    "save_interval": 1,
    "max_new_tokens": 1,
}


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """A recipe file and its bases as one tree, local paths made absolute."""
    if path in above:
        raise ValueError(f"{path} is its own base: {' -> '.join(p.name for p in (*above, path))}")
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} is not a file")
    try:
        tree = OmegaConf.create(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} is no mapping of keys to values")
    keys = {k: v for k, v in OmegaConf.to_container(tree).items() if not str(k).startswith(PROGRAM)}
    base = keys.pop("base", None)
    keys = OmegaConf.create(absolute_paths(keys, path.parent))
    if not base:
        return keys
    return OmegaConf.merge(read_yaml((path.parent / base).resolve(), (*above, path)), keys)


def absolute_paths(value: Any, folder: Path) -> Any:
    """A tree of keys, its local paths taken from `folder`."""
    if isinstance(value, dict):
        return {k: absolute_paths(v, folder) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    local = r"(^(?:\w+:)?|\+)(\.\.?/[^+]*)"  # alone, after KIND: or after the + of further files
    return re.sub(local, lambda found: found[1] + str((folder / found[2]).resolve()), value)


def read_recipe(path: str | Path, overrides: list[str] | None = None, **changes: Any) -> Recipe:
    """A checked recipe; `overrides` as typed ("stages.stage2.lr=1e-5"), `changes` as values.

    Raises ValueError for an unknown key (with the nearest known one), a wrong type or a value
    that cannot work.
    """
    for word in overrides or []:
        if "=" not in word:
            raise ValueError(f"{word!r} is no override: write key=value, e.g. run=runs/mine")
    try:
        typed = OmegaConf.to_container(OmegaConf.from_dotlist(overrides or []))
        typed = OmegaConf.merge(
            OmegaConf.structured(Recipe),
            read_yaml(Path(path).resolve()),
            absolute_paths(typed, Path.cwd()),
            changes,
        )
        recipe = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        known = ""
        if is_dataclass(error.object_type) and "Did you mean" not in str(error):
            known = "\n    known keys: " + ", ".join(f.name for f in fields(error.object_type))
        raise ValueError(f"{path}: {error}{known}") from error
    for changes in recipe.settings.values():
        with_visual(recipe, changes)
    return check(recipe)


def check(recipe: Recipe) -> Recipe:
    """Refuse what cannot work before anything is loaded."""
    parts = {"": recipe, "visual.": recipe.visual}
    for kind in ("sources", "stages", "tasks"):
        parts |= {f"{kind}.{k}.": x for k, x in getattr(recipe, kind).items() if x}
    for where, part in parts.items():
        for key, known in CHOICES[type(part)].items():
            if (value := getattr(part, key)) not in known:
                told = f"{where}{key}: {value!r} is unknown"
                raise ValueError(f"{told}; choose from {', '.join(filter(None, known))}")
        for key, least in LEAST.items():
            if not getattr(part, key, least) >= least:  # a nan is not, either
                raise ValueError(f"{where}{key}: {getattr(part, key)}; expected {least} or more")
    visual, row = recipe.visual, ENCODERS[recipe.encoder]
    if visual.budget == "mosaic" and visual.arrange == "flat":
        raise ValueError("visual.arrange: flat needs budget per_view; a mosaic is one raster")
    for a, b in parse_grids(visual.max_grid):  # the size that fills this grid finds its errors
        layout((max(a, 1) * row.tile, max(b, 1) * row.tile), visual, row.tile, row.side)
    for name, stage in recipe.stages.items():
        if stage:
            _check_stage(recipe, f"stages.{name}", stage)
    return recipe


def _check_stage(recipe: Recipe, where: str, stage: Stage) -> None:
    if not stage.sources:
        raise ValueError(f"{where} has no sources; the stages are {list(recipe.stages)}")
    known = list(recipe.sources)
    for source, times in stage.sources.items():
        if source not in known:
            raise ValueError(f"{where}.sources: {source!r} is none of the recipe's: {known}")
        if not times >= 0:
            raise ValueError(f"{where}.sources.{source}: {times}; expected 0 or more")
    if not re.fullmatch(r"[1-9]\d*(ep|ba)", stage.duration):
        raise ValueError(f"{where}.duration: {stage.duration!r}; write '2ep' or '500ba'")
    if stage.warmup > 1:
        raise ValueError(f"{where}.warmup: {stage.warmup}; expected a share of the duration")


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
    pairs = [(key, old.get(key), new.get(key)) for key in sorted(old | new)]
    return [f"{key}: {x} -> {y}" for key, x, y in pairs if x != y]


def run_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys that make a run: of the sources, those that are used, without their papers."""
    tree = {key: value for key, value in asdict(recipe).items() if key not in FREE}
    for name, source in tree.pop("sources").items():
        if name in used_sources(recipe):
            tree[f"sources.{name}"] = {k: v for k, v in source.items() if k not in ABOUT}
    flat = _flatten(tree)
    return {key: value for key, value in flat.items() if key.split(".")[-1] not in MEMORY}


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for k, v in tree.items():
        flat |= _flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return flat
