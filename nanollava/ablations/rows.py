"""What an ablation's file says: rows of changed keys on a base, and claims about them.

    base: {nano: ../nano_sweep.yaml, full: ../qwen05b.yaml}
    roles: {nano: {recap: detailed}, full: {recap: recap_coco118k}}
    rows:
      NAME: {keys: [KEY=VALUE, ...], nano: [...], full: [...], infer: {max_grid: 4x4}}

A row's `keys` hold on both bases, those under `nano` or `full` on one; at the top of the file they
are for all rows, and a row with `nano: null` is not for that base. `$recap` is what the base calls
that role, `KEY*=0.5` half of the base's value. `infer` changes visual keys after training only.
Claims: see verdicts.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanollava.recipe import Recipe, absolute_paths, read_recipe, with_visual

TABLES = json.loads(Path(__file__).with_name("blog.json").read_text())["tables"]


@dataclass
class RowKeys:
    """A row as it is written."""

    keys: list[str] = field(default_factory=list)
    nano: Optional[list[str]] = field(default_factory=list)  # noqa: UP045 (OmegaConf reads it)
    full: Optional[list[str]] = field(default_factory=list)  # noqa: UP045
    infer: dict[str, str] = field(default_factory=dict)
    blog: Optional[int] = None  # noqa: UP045
    table: str = ""
    missing: str = ""


@dataclass
class ClaimKeys:
    """A claim as it is written."""

    says: str = MISSING
    section: str = MISSING
    metric: Any = MISSING
    contrast: dict[str, float] = MISSING
    margin: float = MISSING
    holds: str = "above"
    late: str = ""


@dataclass
class Ablation:
    """A file."""

    base: dict[str, str] = MISSING
    rows: dict[str, RowKeys] = MISSING
    claims: dict[str, ClaimKeys] = field(default_factory=dict)
    roles: dict[str, dict[str, str]] = field(default_factory=dict)
    nano: list[str] = field(default_factory=list)
    full: list[str] = field(default_factory=list)
    blog: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table on one base."""

    keys: list[str]  # as typed after the base's file name
    base: Path
    infer: dict[str, str] = field(default_factory=dict)  # visual keys that are changed afterwards
    blog: int | None = None  # its place in the blog's table
    table: str = ""
    missing: str = ""  # why it cannot be run at full scale


def read_ablation(file: Path) -> Ablation:
    """A file, typed; ValueError for what is no such file or for a key that none has."""
    try:
        tree = yaml.safe_load(file.read_text())
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ablation), tree))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no ablation: {error}") from error
    if not found.rows or not all(isinstance(row, RowKeys) for row in found.rows.values()):
        raise ValueError(f"{file} is no ablation: write rows: {{NAME: {{keys: [KEY=VALUE]}}}}")
    return found


def read_rows(file: Path, scale: str = "nano") -> dict[str, Row]:
    """The rows of an ablation's file on its `nano` or its `full` base, none if it has no such."""
    tree, found = read_ablation(file), {}
    if scale not in tree.base:
        return {}
    base = (file.parent / tree.base[scale]).resolve()
    roles, common = tree.roles.get(scale, {}), getattr(tree, scale)
    start = read_recipe(base, [local(key, base.parent) for key in common])
    for name, row in tree.rows.items():
        own = getattr(row, scale)
        if own is None:
            continue  # a row of the other base alone
        try:
            keys = [
                at_ratio(local(Template(key).substitute(roles), base.parent), start)
                for key in [*common, *own, *row.keys]
            ]
            if row.infer:
                with_visual(start, row.infer)
        except KeyError as error:
            raise ValueError(f"{file}: row {name}: roles.{scale} has no {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: row {name}: {error}") from error
        found[name] = Row(keys, base, row.infer, row.blog, row.table or tree.blog, row.missing)
    return found


def printed(row: Row) -> dict[str, Any]:
    """What the blog prints in the row of its table that this one stands for, by column."""
    if row.blog is None:
        return {}
    table = TABLES[row.table]
    return dict(zip([*table["factors"], *table["metrics"]], table["rows"][row.blog], strict=True))


def clock(text: str) -> float:
    """The blog's times in hours: "6H30M", "11H14M", "7h30min"."""
    hours, _, minutes = text.lower().partition("h")
    return int(hours) + int(minutes.rstrip("min") or 0) / 60


def local(key: str, folder: Path) -> str:
    """A key whose value, if it is a local path, is one of the base's folder."""
    name, sign, value = key.partition("=")
    return name + sign + absolute_paths(value, folder)


def at_ratio(key: str, base: Recipe) -> str:
    """`stages.stage2.lr*=0.5` -> `stages.stage2.lr=1e-05` for a base with 2e-5."""
    name, sign, ratio = key.partition("*=")
    if not sign:
        return key
    try:
        value = base
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        number = value * float(ratio)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: the base has no number {name} to multiply") from error
    return f"{name}={round(number) if isinstance(value, int) else f'{number:g}'}"
