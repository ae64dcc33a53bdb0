"""Data: records -> MDS shards, once -> documents, shuffled and mixed by mosaicml-streaming.

`prepare` keeps each image's original bytes and can be stopped at any time: a source is written in
chunks to a folder named `.part`, goes on after the last whole chunk, and gets its real name when it
is complete. What cannot be read is counted, named in `bad.json` and left out; nothing is ever
replaced by another sample.
"""

import getpass
import hashlib
import io
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock
from streaming import LocalDataset, MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.util import merge_index
from torch import Tensor
from tqdm import tqdm

from nanollava.anyres import open_image
from nanollava.extras import readers
from nanollava.files import explain_full_disk
from nanollava.prompts import read_turns
from nanollava.recipe import Recipe, Stage, hashed, used_sources
from nanollava.sequence import Document, Writer
from nanollava.sources import KINDS, files_here, images_of, records

COLUMNS = {"id": "str", "image": "bytes", "sizes": "json", "conversations": "json", "source": "str"}
# Of any number of processes, the same samples in each step.
ORDER: dict = {"shuffle": True, "num_canonical_nodes": 1}
# Of a terminal, a scheduler and a closed connection. They often go to the whole process group.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CHUNK = 16_384  # records of a source that are written at once: the most that a stop can cost


def shard_folder(recipe: Recipe, name: str) -> Path:
    """Where a source's shards lie: its name, and a hash of all that its content depends on; of
    files that may be large, their names and sizes, and of the hub's, their address alone.
    """
    source = recipe.sources[name]
    digest = hashlib.sha256(json.dumps([hashed(source), recipe.seed]).encode())
    for file in files_here(source.path):
        small = file.suffix in (".py", ".json")
        digest.update(file.read_bytes() if small else f"{file.name} {file.stat().st_size}".encode())
    return Path(recipe.data) / f"{name}-{digest.hexdigest()[:10]}"


def usable(found: Iterable[dict], bad: list[str]) -> Iterator[tuple[dict, list[bytes]]]:
    """The records, with their images, that can be read; the others to `bad`."""
    for record in found:
        try:
            images = images_of(record)
            for data in images:
                open_image(data)
            turns = read_turns(record["conversations"], len(images))
            if not any(turn.role == "assistant" and turn.text for turn in turns):
                raise ValueError("no answer to learn from")
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            bad.append(f"{record.get('id')}: {error}")
            continue
        yield record, images


def prepare_source(recipe: Recipe, name: str) -> Path:
    """Write one source's shards unless they are there; returns their folder."""
    folder = shard_folder(recipe, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may want the same source at once.
    with explain_full_disk(folder.parent, f"{folder}.part/next"), FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_shards(recipe, name, folder)
    read_chunk(folder)
    return folder


def write_shards(recipe: Recipe, name: str, folder: Path) -> None:
    """Records -> shards in `folder`, which appears when they are complete.

    Until then they lie in chunks, each renamed when it is whole: the next start goes on there.
    """
    source, part = recipe.sources[name], Path(f"{folder}.part")
    chunks = sorted(part.glob("[0-9]*"))
    taken = sum(written + len(bad) for written, bad in map(read_chunk, chunks))
    found = islice(records(source, recipe.seed), taken, None)
    total = source.samples or source.expected or None
    found = iter(tqdm(found, f"prepare {name}", total, initial=taken))
    while write_chunk(found, name, part / "next"):
        chunks.append((part / "next").rename(part / f"{len(chunks):05}"))
    shutil.rmtree(part / "next")
    done = [read_chunk(chunk) for chunk in chunks]
    written, bad = sum(count for count, _ in done), [line for _, lines in done for line in lines]
    if not written:
        shutil.rmtree(part)  # another try reads the records anew
        raise ValueError(f"source {name} yielded no usable record; left out: {bad[:3] or 'none'}")
    if len(chunks) > 1:
        (part / "index.json").unlink(missing_ok=True)
        with chdir(part):  # it reads paths as URLs: a # in a longer one would end it
            merge_index([f"{chunk.name}/index.json" for chunk in chunks], ".")
        if bad:
            (part / "bad.json").write_text(json.dumps(bad, indent=1))
    (part if len(chunks) > 1 else chunks[0]).rename(folder)
    shutil.rmtree(part, ignore_errors=True)
    told = f"{written:,} records" + (f" (expected {total:,})" if total else "")
    first = f": {'; '.join(bad[:3])} (all in {folder}/bad.json)" if bad else ""
    print(f"  {name}: {told}, {len(bad):,} left out{first}")


def write_chunk(found: Iterator[dict], name: str, folder: Path) -> int:
    """The next CHUNK records -> shards in `folder`, beside a list of the bad ones; how many."""
    shutil.rmtree(folder, ignore_errors=True)  # what a stop left half written
    bad: list[str] = []
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit="64mb") as writer:
        for record, images in usable(islice(found, CHUNK), bad):
            writer.write(
                {
                    "id": str(record["id"]),
                    "image": b"".join(images),
                    "sizes": [len(data) for data in images],
                    "conversations": record["conversations"],
                    "source": name,
                }
            )
    if bad:
        (folder / "bad.json").write_text(json.dumps(bad, indent=1))
    return read_chunk(folder)[0] + len(bad)


def read_chunk(folder: Path) -> tuple[int, list[str]]:
    """How many records shards hold, and which were left out; ValueError for one that is cut."""
    shards = json.loads((folder / "index.json").read_text())["shards"]
    for shard in shards:
        file, size = folder / shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} should have {size:,} bytes: delete {folder}, it is damaged")
    bad = folder / "bad.json"
    return sum(x["samples"] for x in shards), json.loads(bad.read_text()) if bad.exists() else []


def prepare(recipe: Recipe) -> None:
    """Write the shards of every source that a stage uses, after a look at the disk.

    What a function, a PDF's pages or the first samples of a source will weigh is not known before.
    """
    folders = {name: shard_folder(recipe, name) for name in sorted(used_sources(recipe))}
    write, fetch, told = 0, 0, []
    for name in [name for name, folder in folders.items() if not folder.is_dir()]:
        source = recipe.sources[name]
        kind, _, where = source.path.partition(":")
        size, missing = readers.weigh(where) if kind in KINDS else (0, 0)
        told.append(f"{name} {size / 1e9:.2f} GB" if size else f"{name} unknown")
        fetch += missing
        if kind != "pdf" and not source.samples:
            done = Path(f"{folders[name]}.part").rglob("*.mds")
            write += size - sum(file.stat().st_size for file in done)
    if not folders:
        print("prepare: no stage of this recipe uses a source")
    if told:
        room = readers.check_space(recipe.data, write, fetch)
        print(f"prepare: {room}, {fetch / 1e9:.2f} GB to fetch; sizes: {', '.join(told)}")
    for name in folders:
        prepare_source(recipe, name)


def stored(recipe: Recipe, name: str) -> LocalDataset | None:
    """The rows of a source's shards, where they are written already."""
    folder = shard_folder(recipe, name)
    return LocalDataset(local=str(folder)) if folder.is_dir() else None


def split_images(data: bytes, sizes: list[int]) -> list[bytes]:
    """The shards keep a sample's images end to end: cut them apart again."""
    file = io.BytesIO(data)
    return [file.read(size) for size in sizes]


class Documents(StreamingDataset):
    """Shards of several sources -> documents, made in the loader's worker processes."""

    def __init__(self, writer: Writer, **kwargs):
        super().__init__(**kwargs)
        self.writer = writer

    def __getitem__(self, i: int) -> Document:
        row = super().__getitem__(i)
        try:
            images = [open_image(data) for data in split_images(row["image"], row["sizes"])]
        except ValueError as error:  # prepare could read it
            raise ValueError(f"{row['source']}: damaged shards: {row['id']}: {error}") from error
        turns = read_turns(row["conversations"], len(images))
        return self.writer(turns, images, row["id"], row["source"])


@dataclass(frozen=True)
class Bundle:
    """A batch on its way from a worker: the documents' tensors end to end.

    Each tensor that travels between processes needs a file descriptor. With three for each of 256
    documents a batch would be over the usual limit of 1,024; a bundle has three in all.
    """

    documents: list[Document]  # their tensors are empty meanwhile
    positions: list[int]  # of each document
    counts: list[int]  # views of each document
    ids: Tensor
    labels: Tensor
    views: Tensor

    @classmethod
    def of(cls, documents: list[Document]) -> "Bundle":
        """Documents -> a bundle; what workers do with a batch."""
        nothing = torch.zeros(0)
        return cls(
            [replace(d, ids=nothing, labels=nothing, views=nothing) for d in documents],
            [len(d.ids) for d in documents],
            [len(d.views) for d in documents],
            torch.cat([d.ids for d in documents]),
            torch.cat([d.labels for d in documents]),
            torch.cat([d.views for d in documents]),
        )

    def __len__(self) -> int:
        return len(self.documents)

    def open(self) -> list[Document]:
        """The documents again."""
        parts = zip(
            self.documents,
            self.ids.split(self.positions),
            self.labels.split(self.positions),
            self.views.split(self.counts),
            strict=True,
        )
        return [replace(d, ids=i, labels=lab, views=v) for d, i, lab, v in parts]


class Loader(StreamingDataLoader):
    """Yields lists of documents; streaming counts what was seen by their length."""

    def _get_batch_size(self, batch: Bundle) -> int:
        return len(batch)

    def __iter__(self) -> Iterator[list[Document]]:
        for bundle in super().__iter__():
            yield bundle.open()


def leave_stopping_to_the_trainer(worker: int) -> None:
    """Ignore stop signals in a worker of the loader: the trainer still needs it for the step that
    it is in, after which it writes a checkpoint and ends the worker.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
        told = f"batch_size {stage.batch_size} does not divide among {processes} processes"
        raise ValueError(told)
    batch = stage.batch_size // processes
    streams = [
        Stream(local=str(shard_folder(recipe, name)), repeat=times)
        for name, times in stage.mix.items()
    ]
    with alone_on_this_machine():
        dataset = Documents(
            writer,
            streams=streams,
            **ORDER,
            shuffle_seed=recipe.seed,
            batch_size=batch,
        )
    return Loader(
        dataset,
        batch_size=batch,
        num_workers=recipe.workers,
        collate_fn=Bundle.of,
        drop_last=True,
        persistent_workers=False,
        prefetch_factor=4 if recipe.workers else None,
        worker_init_fn=leave_stopping_to_the_trainer,
    )
