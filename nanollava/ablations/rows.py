"""What an ablation file holds: a base recipe, rows that change some of its keys, and claims.

    base: {nano: ../nano_sweep.yaml, full: ../qwen05b.yaml}
    roles: {nano: {recap: detailed}, full: {recap: recap_coco118k}}
    rows:
      NAME: {keys: [KEY=VALUE, ...], nano: [...], full: [...], infer: {max_grid: 4x4}, label: TEXT}

A row's `keys` apply to both bases, and those under `nano` or `full` to that base only; the same two
names at the top of the file apply to all rows. A row with `nano: null` does not exist for nano.
`$recap` becomes the base's own name for that role, and `KEY*=0.5` half of the base's value.
`infer` changes visual keys after training. A row is named after the blog's; where nano has
something else, `label` says what. Claims are described in verdicts.py.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanollava.recipe import Recipe, absolute_paths, read_recipe, with_visual

BLOG = json.loads(Path(__file__).with_name("blog.json").read_text())
TABLES = BLOG["tables"]
UNSCORED = {  # metrics that are not scores in 0..1, and the unit of their differences
    "loss": "nats",
    "train": "log of s",
    "infer": "log of s",
    "flops": "log of FLOPs",
}


@dataclass
class RowKeys:
    """A row as it is written in the file."""

    keys: list[str] = field(default_factory=list)
    # OmegaConf cannot read `list[str] | None`.
    nano: Optional[list[str]] = field(default_factory=list)  # noqa: UP045
    full: Optional[list[str]] = field(default_factory=list)  # noqa: UP045
    infer: dict[str, str] = field(default_factory=dict)
    blog: Optional[int] = None  # noqa: UP045
    missing: str = ""
    label: str = ""


@dataclass(frozen=True)
class Claim:
    """One sentence of the blog, and the rows that could show it (verdicts.py)."""

    name: str = ""
    says: str = MISSING
    section: str = MISSING
    metric: Any = MISSING  # a name or several; after `read_claims` always several
    contrast: dict[str, float] = MISSING
    margin: float = MISSING
    holds: str = "above"
    late: str = ""

    @property
    def source(self) -> str:
        """The blog's sentence in quotation marks, or a table's numbers; and the section."""
        says = self.says if re.match(r"T\d|ours:", self.says) else f'"{self.says}"'
        return f"{says} ({self.section})".replace("|", "/")

    @property
    def title(self) -> str:
        """Its name, and what was known when it was written, if anything was."""
        return f"{self.name} (written {self.late})" if self.late else self.name

    @property
    def unit(self) -> str:
        """The unit of its differences: points, unless a metric is not a score."""
        units = [UNSCORED[name] for name in self.metric if name in UNSCORED]
        return units[0] if units else "points"

    @property
    def factor(self) -> int:
        """A difference times this factor is in `unit`."""
        return 100 if self.unit == "points" else 1


@dataclass
class Ablation:
    """A whole file."""

    base: dict[str, str] = MISSING
    rows: dict[str, RowKeys] = MISSING
    claims: dict[str, Claim] = field(default_factory=dict)
    roles: dict[str, dict[str, str]] = field(default_factory=dict)
    nano: list[str] = field(default_factory=list)
    full: list[str] = field(default_factory=list)
    blog: str = ""  # the blog's table that these rows repeat
    note: str = ""  # a remark on that table for the ledger


@dataclass(frozen=True)
class Row:
    """A row on one of the two bases."""

    keys: list[str]  # changed keys, as one would type them after the base's file name
    base: Path
    infer: dict[str, str]  # visual keys changed after training
    blog: int | None  # the index of the row in the blog's table
    table: str
    missing: str  # why the row cannot be run at full scale
    label: str  # what the row is in nano, if its name is the blog's


def read_ablation(file: Path) -> Ablation:
    """Read an ablation file; raises ValueError for anything else and for an unknown key."""
    try:
        tree = yaml.safe_load(file.read_text())
        ablation = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ablation), tree))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not an ablation file: {error}") from error
    if not ablation.rows or not all(isinstance(row, RowKeys) for row in ablation.rows.values()):
        form = "rows: {NAME: {keys: [KEY=VALUE]}}"
        raise ValueError(f"{file} is not an ablation file: expected {form}")
    return ablation


def read_rows(file: Path, scale: str = "nano") -> dict[str, Row]:
    """The rows of an ablation on its `nano` or `full` base; none if the file lacks that base."""
    ablation = read_ablation(file)
    if scale not in ablation.base:
        return {}
    path = (file.parent / ablation.base[scale]).resolve()
    common = getattr(ablation, scale)
    base = read_recipe(path, [local(key, path.parent) for key in common])
    rows = {}
    for name, row in ablation.rows.items():
        own = getattr(row, scale)
        if own is None:  # this row exists for the other base only
            continue
        keys = []
        try:
            for key in (*common, *own, *row.keys):  # a later key overrides an earlier one
                key = Template(key).substitute(ablation.roles.get(scale, {}))
                keys.append(at_ratio(local(key, path.parent), base))
            with_visual(base, row.infer)  # raises for a key that does not exist
        except KeyError as error:
            raise ValueError(f"{file}: row {name}: roles.{scale} has no {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: row {name}: {error}") from error
        rows[name] = Row(keys, path, row.infer, row.blog, ablation.blog, row.missing, row.label)
    return rows


def blog_row(table: str, index: int) -> dict[str, Any]:
    """A row of one of the blog's tables as printed, by column."""
    content = TABLES[table]
    columns = [*content["factors"], *content["metrics"]]
    return dict(zip(columns, content["rows"][index], strict=True))


def printed(row: Row) -> dict[str, Any]:
    """The blog's row that this one repeats, by column; empty if there is none."""
    return {} if row.blog is None else blog_row(row.table, row.blog)


def local(key: str, folder: Path) -> str:
    """KEY=VALUE with a local path in VALUE taken from `folder`."""
    name, sign, value = key.partition("=")
    return name + sign + absolute_paths(value, folder)


def at_ratio(key: str, base: Recipe) -> str:
    """`stages.stage2.lr*=0.5` -> `stages.stage2.lr=1e-05` for a base with 2e-5."""
    name, sign, ratio = key.partition("*=")  # "stages.stage2.lr", "*=", "0.5"
    if not sign:
        return key
    try:
        value = base
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        number = value * float(ratio)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: the base has no number {name} to multiply") from error
    if isinstance(value, int):  # a batch size stays a whole number
        return f"{name}={round(number)}"
    return f"{name}={number:g}"
