"""Data: records -> MDS shards, once -> documents, shuffled and mixed by mosaicml-streaming.

`prepare` keeps each image's original bytes and can be stopped at any time: a source is written to
a folder named `.part` that gets its real name when it is complete. What cannot be read is counted,
named in `bad.json` and left out; nothing is ever replaced by another sample.
"""

import getpass
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock
from streaming import LocalDataset, MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from tqdm import tqdm

from nanollava.anyres import open_image
from nanollava.prompts import read_turns
from nanollava.recipe import Recipe, Stage
from nanollava.sequence import Document, Writer
from nanollava.sources import READERS, Source, images_of, records

COLUMNS = {"id": "str", "image": "bytes", "sizes": "json", "conversations": "json", "source": "str"}


def shard_folder(recipe: Recipe, name: str) -> Path:
    """Where a source's shards lie: its name, and a hash of all that its content depends on."""
    source = recipe.sources[name]
    key = json.dumps([asdict(source), recipe.seed])
    kind, _, file = source.path.partition(":")
    file = Path(file if kind in READERS else source.path.rpartition(":")[0])
    files = sorted(file.parent.glob("*.py")) if file.suffix == ".py" else [file]
    content = b"".join(f.read_bytes() for f in files if f.is_file())  # what FILE.py may import
    return Path(recipe.data) / f"{name}-{hashlib.sha256(key.encode() + content).hexdigest()[:10]}"


def usable(source: Source, seed: int, bad: list[str]) -> Iterator[tuple[dict, list[bytes]]]:
    """The records of a source, with their images, that can be read; the others to `bad`."""
    for record in records(source, seed):
        try:
            images = images_of(record)
            for data in images:
                open_image(data)
            turns = read_turns(record["conversations"], len(images))
            if not any(turn.role == "assistant" and turn.text for turn in turns):
                raise ValueError("no answer to learn from")
        except (ValueError, KeyError, OSError) as error:
            bad.append(f"{record.get('id')}: {error}")
            continue
        yield record, images


def prepare_source(recipe: Recipe, name: str) -> Path:
    """Write one source's shards unless they are there; returns their folder."""
    folder = shard_folder(recipe, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two runs may want the same source at once
        if not folder.is_dir():
            write_shards(recipe, name, folder)
    return folder


def write_shards(recipe: Recipe, name: str, folder: Path) -> None:
    """Records -> shards in `folder`, which appears when they are complete."""
    source = recipe.sources[name]
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    bad: list[str] = []
    bar = tqdm(usable(source, recipe.seed, bad), f"prepare {name}", source.samples or None)
    with MDSWriter(out=str(part), columns=COLUMNS, size_limit="64mb") as writer:
        for record, images in bar:
            writer.write({
                "id": str(record["id"]), "image": b"".join(images),
                "sizes": [len(data) for data in images],
                "conversations": record["conversations"], "source": name,
            })  # fmt: skip
    if not writer.shards:
        raise ValueError(f"source {name} yielded no usable record; left out: {bad[:3] or 'none'}")
    if bad:
        (part / "bad.json").write_text(json.dumps(bad, indent=1))
        print(f"  {name}: {len(bad)} records left out, first: {bad[0]} (all in {folder}/bad.json)")
    part.rename(folder)


def prepare(recipe: Recipe) -> None:
    """Write the shards of every source that a stage uses."""
    stages = [stage for stage in recipe.stages.values() if stage]
    used = {name for stage in stages for name, times in stage.sources.items() if times}
    for name in sorted(used):
        prepare_source(recipe, name)


def stored(recipe: Recipe, name: str) -> LocalDataset | None:
    """The rows of a source's shards, where they are written already."""
    folder = shard_folder(recipe, name)
    return LocalDataset(local=str(folder)) if folder.is_dir() else None


def split_images(data: bytes, sizes: list[int]) -> list[bytes]:
    """The shards keep a sample's images end to end: cut them apart again."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class Documents(StreamingDataset):
    """Shards of several sources -> documents, made in the loader's worker processes."""

    def __init__(self, writer: Writer, **kwargs):
        super().__init__(**kwargs)
        self.writer = writer

    def __getitem__(self, i: int) -> Document:
        row = super().__getitem__(i)
        images = [open_image(data) for data in split_images(row["image"], row["sizes"])]
        turns = read_turns(row["conversations"], len(images))
        return self.writer(turns, images, name=row["id"], source=row["source"])


class Loader(StreamingDataLoader):
    """Batches are lists of documents; streaming counts what was seen by their length."""

    def _get_batch_size(self, batch: list[Document]) -> int:
        return len(batch)


@contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """One run at a time: streaming gives the next free name to its shared memory, and two runs
    that look for one at the same moment would take the same.
    """
    lock = FileLock(Path(tempfile.gettempdir(), f"nanollava-{getpass.getuser()}.lock"))
    with lock if os.environ.get("LOCAL_RANK", "0") == "0" else nullcontext():
        if dist.is_initialized():
            dist.barrier()  # the other processes of this run look once the first has its turn
        yield


def make_loader(recipe: Recipe, stage: Stage, writer: Writer, processes: int) -> Loader:
    """One stage's mix. The order depends on the seed alone, not on the number of processes."""
    if stage.batch_size % processes:
        raise ValueError(
            f"batch_size {stage.batch_size} does not divide among {processes} processes"
        )
    batch = stage.batch_size // processes
    streams = [
        Stream(local=str(shard_folder(recipe, name)), repeat=times)
        for name, times in stage.sources.items()
        if times
    ]
    with alone_on_this_machine():
        dataset = Documents(
            writer, streams=streams, shuffle=True, shuffle_seed=recipe.seed, batch_size=batch,
            num_canonical_nodes=1,
        )  # fmt: skip
    return Loader(
        dataset, batch_size=batch, num_workers=recipe.workers, collate_fn=list, drop_last=True,
        persistent_workers=False, prefetch_factor=4 if recipe.workers else None,
    )  # fmt: skip
