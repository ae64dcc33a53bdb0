"""16 and 256 processes without any: who gets which sample, and how even their work is.

`pytest -s tests/test_ranks.py` prints the figures; `-m slow` takes all of LLaVA-NeXT's samples.
"""

import time

import numpy as np
import pytest
from launching import ROOT
from streaming import MDSWriter, Stream
from streaming.base.batching import generate_work
from streaming.base.world import World

from nanollava.data import ORDER, Documents, alone_on_this_machine
from nanollava.extras.plan import sketches as sketches_of_plan
from nanollava.recipe import read_recipe
from nanollava.sequence import Writer, split

BATCH, WORKERS, NODE = 256, 2, 8  # samples a step, loader workers a process, processes a node
COUNTS = [1, 16, 256]


@pytest.fixture(
    scope="module",
    params=[
        65_536 + 100,
        pytest.param(779_289, marks=pytest.mark.slow),
    ],
)
def samples(request, tmp_path_factory):
    """Shards of so many samples, opened as a stage does, and the length of each document."""
    folder = tmp_path_factory.mktemp("ranks")
    with MDSWriter(out=str(folder), columns={"id": "int"}, size_limit="64kb") as writer:
        for i in range(request.param):
            writer.write({"id": i})
    with alone_on_this_machine():  # other tests open shards at the same time
        dataset = Documents(
            None,
            streams=[Stream(local=str(folder))],
            **ORDER,
            shuffle_seed=0,
            batch_size=1,
        )
    return dataset, lengths(request.param)


def lengths(n: int) -> np.ndarray:
    """Positions of documents as `plan` takes LLaVA-NeXT's to be, words of any number."""
    recipe, draw = read_recipe(ROOT / "recipes/qwen05b.yaml"), np.random.default_rng(0)
    writer = Writer(None, recipe.visual, 384, 27, recipe.template)
    assumed, *_ = sketches_of_plan(recipe, "llava_next_779k", writer)
    text = recipe.sources["llava_next_779k"].assume.text
    visual = draw.choice([len(sketch.ids) - text for sketch in assumed], n)
    return visual + draw.gamma(2, text / 2, n).astype(int)


def order(dataset: Documents, processes: int, seen: int = 0) -> np.ndarray:
    """Sample ids (step, process, sample) as the loaders of so many processes hand them out."""
    node = min(processes, NODE)
    dataset.batch_size = BATCH // processes
    world = World(processes // node, node, WORKERS, 0)
    dataset._set_shuffle_block_size(world)
    work = generate_work("random", dataset, world, 0, seen)
    ids = work.reshape(processes, WORKERS, -1, BATCH // processes)
    return ids.transpose(2, 1, 0, 3).reshape(-1, processes, BATCH // processes)


@pytest.mark.parametrize("processes", COUNTS)
def test_each_sample_is_seen_once_in_the_same_order(samples, processes):
    dataset, lengths = samples
    alone, shared = order(dataset, 1), order(dataset, processes)
    whole = len(lengths) // BATCH
    seen = shared[:whole].ravel()
    assert len(np.unique(seen)) == len(seen) and seen.min() >= 0
    # The same samples in each step, whoever has them: a step's loss is the mean over all of them.
    steps = [np.sort(ids[:whole].reshape(whole, BATCH)) for ids in (alone, shared)]
    assert (steps[0] == steps[1]).all()
    half = whole // 2  # a run that goes on with so many processes after one had begun it
    later = np.sort(order(dataset, processes, half * BATCH)[: whole - half].reshape(-1, BATCH))
    assert (later == steps[0][half:]).all()


@pytest.mark.parametrize("processes", COUNTS[1:])
def test_processes_have_as_much_to_do(samples, processes):
    """Over an epoch; within a step the longest share is waited for, which is told, not bounded."""
    dataset, lengths = samples
    ids = order(dataset, processes)[: len(lengths) // BATCH]
    work = lengths[ids].sum(2)  # (steps, processes)
    epoch = work.sum(0).max() / work.sum(0).mean() - 1
    step = (work.max(1) / work.mean(1)).mean() - 1
    print(
        f"\n{processes} processes, {len(lengths):,} samples: tokens uneven by {epoch:.2%} over "
        f"an epoch, {step:.0%} in a step"
    )
    assert epoch < 0.03 * np.sqrt(779_289 / len(lengths))  # a mean over more samples is evener


class Sized:
    """As much of a document as the packer looks at."""

    def __init__(self, n: int):
        self.ids = range(n)


@pytest.mark.parametrize("processes", COUNTS)
def test_packs_hold_every_document_once_and_are_full(samples, processes):
    dataset, lengths = samples
    budget, used, room = 16384, 0, 0
    for shares in order(dataset, processes)[:200]:
        documents = [[Sized(n) for n in lengths[ids]] for ids in shares]
        packs = [split(share, budget) for share in documents]
        for share, mine in zip(documents, packs, strict=True):
            assert sorted(map(id, share)) == sorted(id(d) for pack in mine for d in pack)
            assert all(sum(len(d.ids) for d in pack) <= budget or len(pack) == 1 for pack in mine)
        used += lengths[shares].sum()
        room += sum(map(len, packs)) * budget
    print(f"\n{processes} processes: packs of {budget:,} are {used / room:.0%} full")
    assert used / room > (0.85 if processes < 256 else 0.15)  # 256 have one document each


def test_the_first_batch_is_soon_known(samples):
    dataset, lengths = samples
    begin = time.process_time()
    order(dataset, 256)
    seconds = time.process_time() - begin
    print(f"\n{len(lengths):,} samples are dealt out among 256 processes in {seconds:.2f} CPU s")
    assert seconds < 5
