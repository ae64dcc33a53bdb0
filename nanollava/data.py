"""Data: records -> MDS shards, once -> documents, shuffled and mixed by mosaicml-streaming.

`prepare` keeps each image's original bytes and can be stopped at any time. It writes a source in
chunks to a folder named `.part`, resumes after the last complete chunk, and gives the folder its
real name when the source is complete. Records that cannot be read are counted, named in `bad.json`
and left out. Nothing is ever replaced by another sample.
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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock
from streaming import LocalDataset, MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.util import merge_index
from tqdm import tqdm

from nanollava.anyres import open_image
from nanollava.extras import readers
from nanollava.files import explain_full_disk
from nanollava.prompts import read_turns
from nanollava.recipe import Recipe, Stage, hashed, used_sources
from nanollava.sequence import Document, Writer
from nanollava.sources import KINDS, files_here, images_of, records

COLUMNS = {"id": "str", "image": "bytes", "sizes": "json", "conversations": "json", "source": "str"}
CHUNK = 16_384  # records of a source in a chunk: an interruption loses at most this many
# Each step sees the same samples, however many processes share them.
ORDER = {"shuffle": True, "num_canonical_nodes": 1}
# A terminal, a scheduler and a closed connection send them, often to the whole process group.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EMPTY = dict.fromkeys(("ids", "labels", "views"), torch.zeros(0))  # a Document without tensors


def prepare(recipe: Recipe) -> None:
    """Write the shards of every source that a stage uses, after a check of the disk space."""
    folders = {name: shard_folder(recipe, name) for name in sorted(used_sources(recipe))}
    missing = {name: folder for name, folder in folders.items() if not folder.is_dir()}
    if not folders:
        print("prepare: no stage of this recipe uses a source")
    if missing:
        check_disk(recipe, missing)
    for name in folders:
        prepare_source(recipe, name)


def shard_folder(recipe: Recipe, name: str) -> Path:
    """The folder of a source's shards: its name, and a hash of all that its content depends on.

    Files that may be large are hashed by name and size, files on the hub by their address alone.
    """
    source = recipe.sources[name]
    digest = hashlib.sha256(json.dumps([hashed(source), recipe.seed]).encode())
    for file in files_here(source.path):
        small = file.suffix in (".py", ".json")
        digest.update(file.read_bytes() if small else f"{file.name} {file.stat().st_size}".encode())
    return Path(recipe.data) / f"{name}-{digest.hexdigest()[:10]}"


def check_disk(recipe: Recipe, folders: dict[str, Path]) -> None:
    """Raise ValueError if what is left to download and to write does not fit on the disks.

    The size of a function's records, of a PDF's pages or of a source's first samples is unknown.
    """
    to_write, to_download, sizes = 0, 0, []
    for name, folder in folders.items():
        source = recipe.sources[name]
        kind, _, where = source.path.partition(":")
        size, missing = readers.weigh(where) if kind in KINDS else (0, 0)
        sizes.append(f"{name} {size / 1e9:.2f} GB" if size else f"{name} unknown")
        to_download += missing
        if kind != "pdf" and not source.samples:
            written = Path(f"{folder}.part").rglob("*.mds")
            to_write += size - sum(file.stat().st_size for file in written)
    free = readers.check_space(recipe.data, to_write, to_download)
    print(f"prepare: {free}, {to_download / 1e9:.2f} GB to download; sizes: {', '.join(sizes)}")


def prepare_source(recipe: Recipe, name: str) -> Path:
    """Write one source's shards unless they exist; returns their folder."""
    folder = shard_folder(recipe, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock makes a second run that wants the same source wait for the first.
    with explain_full_disk(folder.parent, f"{folder}.part/next"), FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_shards(recipe, name, folder)
    read_chunks([folder])  # raises ValueError for a damaged shard, at which streaming would stop
    return folder


def write_shards(recipe: Recipe, name: str, folder: Path) -> None:
    """Records -> shards in `folder`, which appears when they are complete."""
    source = recipe.sources[name]
    expected = source.samples or source.expected or None
    part = Path(f"{folder}.part")
    unfinished = part / "next"
    # 1. Skip the records that an earlier start has already written in complete chunks.
    chunks = sorted(part.glob("[0-9]*"))
    written, bad = read_chunks(chunks)
    seen = written + len(bad)
    remaining = islice(records(source, recipe.seed), seen, None)
    remaining = iter(tqdm(remaining, f"prepare {name}", expected, initial=seen))
    # 2. Write one chunk after another. A number as its name marks a chunk as complete.
    while write_chunk(remaining, name, unfinished):
        chunks.append(unfinished.rename(part / f"{len(chunks):05}"))
    shutil.rmtree(unfinished)
    written, bad = read_chunks(chunks)
    if not written:
        shutil.rmtree(part)  # so that another try reads the records anew
        raise ValueError(f"source {name} has no usable record; left out: {bad[:3]}. Check its path")
    # 3. Give the shards their real name. A single chunk is the folder itself.
    if len(chunks) == 1:
        chunks[0].rename(folder)
    else:
        merge_chunks(part, chunks, bad)
        part.rename(folder)
    shutil.rmtree(part, ignore_errors=True)
    goal = f" (expected {expected:,})" if expected else ""
    examples = f": {'; '.join(bad[:3])} (all in {folder}/bad.json)" if bad else ""
    print(f"  {name}: {written:,} records{goal}, {len(bad):,} left out{examples}")


def write_chunk(remaining: Iterator[dict], name: str, folder: Path) -> int:
    """The next CHUNK records -> shards in `folder`; returns how many records were left to read."""
    shutil.rmtree(folder, ignore_errors=True)  # what a stop left half written
    bad: list[str] = []
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit="64mb") as writer:
        for record, images in usable(islice(remaining, CHUNK), bad):
            writer.write(
                {
                    "id": str(record["id"]),
                    "image": b"".join(images),
                    "sizes": [len(data) for data in images],
                    "conversations": record["conversations"],
                    "source": name,
                }
            )
    write_bad(folder, bad)
    written, _ = read_chunks([folder])
    return written + len(bad)


def usable(candidates: Iterable[dict], bad: list[str]) -> Iterator[tuple[dict, list[bytes]]]:
    """The records that can be read, with their images; names the others in `bad`."""
    for record in candidates:
        try:
            images = images_of(record)
            for data in images:
                open_image(data)
            turns = read_turns(record["conversations"], len(images))
            if not any(turn.role == "assistant" and turn.text for turn in turns):
                raise ValueError("no answer to learn from")
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            bad.append(f"{record.get('id')}: {error}")
        else:
            yield record, images


def merge_chunks(part: Path, chunks: list[Path], bad: list[str]) -> None:
    """Write one index and one list of bad records over all chunks."""
    (part / "index.json").unlink(missing_ok=True)
    with chdir(part):  # merge_index reads paths as URLs, where a # would end the path
        merge_index([f"{chunk.name}/index.json" for chunk in chunks], ".")
    write_bad(part, bad)


def write_bad(folder: Path, bad: list[str]) -> None:
    """List the records that were left out in bad.json, if there are any."""
    if bad:
        (folder / "bad.json").write_text(json.dumps(bad, indent=1))


def read_chunks(folders: Iterable[Path]) -> tuple[int, list[str]]:
    """How many records folders of shards hold, and which were left out; raises ValueError for a
    damaged shard.
    """
    written, bad = 0, []
    for folder in folders:
        for shard in json.loads((folder / "index.json").read_text())["shards"]:
            file, size = folder / shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file} is damaged: expected {size:,} bytes. Delete {folder}")
            written += shard["samples"]
        if (folder / "bad.json").exists():
            bad += json.loads((folder / "bad.json").read_text())
    return written, bad


def stored(recipe: Recipe, name: str) -> LocalDataset | None:
    """The samples of a source's shards, or None if the shards are not written yet."""
    folder = shard_folder(recipe, name)
    return LocalDataset(local=str(folder)) if folder.is_dir() else None


def split_images(data: bytes, sizes: list[int]) -> list[bytes]:
    """A sample's images, which the shards keep end to end -> one by one."""
    file = io.BytesIO(data)
    return [file.read(size) for size in sizes]


class Documents(StreamingDataset):
    """Shards of several sources -> documents, made in the loader's worker processes."""

    def __init__(self, writer: Writer, **kwargs):
        super().__init__(**kwargs)
        self.writer = writer

    def __getitem__(self, i: int) -> Document:
        sample = super().__getitem__(i)
        try:
            images = [open_image(data) for data in split_images(sample["image"], sample["sizes"])]
        except ValueError as error:  # `prepare` could read it: it was damaged on disk later
            place = f"source {sample['source']} has damaged shards at sample {sample['id']}"
            raise ValueError(f"{place}: {error}. Delete their folder and start again") from error
        turns = read_turns(sample["conversations"], len(images))
        return self.writer(turns, images, sample["id"], sample["source"])


class Bundle(NamedTuple):
    """A batch on its way from a worker process: the documents' tensors end to end.

    Each tensor that travels between processes needs a file descriptor. Three for each of 256
    documents would exceed the usual limit of 1,024; a bundle needs three in all.
    """

    documents: list[Document]  # without their tensors. Streaming counts them: the first field
    tensors: list[torch.Tensor]  # all documents' ids, labels and views, end to end
    lengths: list[list[int]]  # of each document's share of them

    @classmethod
    def of(cls, documents: list[Document]) -> "Bundle":
        """Documents -> a bundle. The workers collate a batch with it."""
        columns = [[getattr(document, name) for document in documents] for name in EMPTY]
        return cls(
            [replace(document, **EMPTY) for document in documents],
            [torch.cat(column) for column in columns],
            [list(map(len, column)) for column in columns],
        )

    def open(self) -> list[Document]:
        """The bundle -> the documents as they were."""
        columns = map(torch.Tensor.split, self.tensors, self.lengths)
        shares = zip(self.documents, *columns, strict=True)
        return [replace(document, **dict(zip(EMPTY, share))) for document, *share in shares]


class Loader(StreamingDataLoader):
    """Yields batches as lists of documents."""

    def __iter__(self) -> Iterator[list[Document]]:
        for bundle in super().__iter__():
            yield bundle.open()


def ignore_stop_signals(worker: int) -> None:
    """Leave stopping to the trainer: it still needs this worker of the loader for the current
    step, after which it writes a checkpoint and ends the worker.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """Let one run at a time open its shards: streaming gives its shared memory the next free name,
    and two runs that look for one at the same moment would take the same.
    """
    lock = FileLock(f"{tempfile.gettempdir()}/nanollava-{getpass.getuser()}.lock")
    with lock if os.environ.get("LOCAL_RANK", "0") == "0" else nullcontext():
        if dist.is_initialized():
            dist.barrier()  # the run's other processes wait until the first one has the lock
        yield


def make_loader(recipe: Recipe, stage: Stage, writer: Writer, processes: int) -> Loader:
    """One stage's mix. The order depends on the seed alone, not on the number of processes."""
    if stage.batch_size % processes:
        problem = f"batch_size {stage.batch_size} does not divide among {processes} processes"
        raise ValueError(f"{problem}. Choose a multiple of {processes}")
    batch_size = stage.batch_size // processes
    streams = [
        Stream(local=str(shard_folder(recipe, name)), repeat=times)
        for name, times in stage.mix.items()
    ]
    with alone_on_this_machine():
        dataset = Documents(
            writer, streams=streams, shuffle_seed=recipe.seed, batch_size=batch_size, **ORDER
        )
    return Loader(
        dataset,
        batch_size=batch_size,
        num_workers=recipe.workers,
        collate_fn=Bundle.of,
        drop_last=True,
        prefetch_factor=4 if recipe.workers else None,
        worker_init_fn=ignore_stop_signals,
    )
