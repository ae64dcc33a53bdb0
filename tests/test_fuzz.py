"""Mutated files through every door (doors.py): a result, or an error that a user can fix.

`pytest -m slow tests/test_fuzz.py` tries twenty times as many.
"""

import io
import json
import resource
import struct
import zipfile

import pytest
from doors import DOORS, RECORDS, seeds_of, through
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nanollava.anyres import open_image
from nanollava.extras.readers import LARGEST
from nanollava.recipe import Source
from nanollava.sources import records

FEW, SLOW = 60, {"run's recipe", "run's config", "run's tokenizer", "weights", "ablation"}


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A seed with a few bytes replaced, put in or left out, or cut off."""
    data = bytearray(draw(st.sampled_from(seeds_of(name))))
    edit = st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=6))
    for place, gone, new in draw(st.lists(edit, min_size=1, max_size=5)):
        at = int(place * len(data))
        data[at : at + gone] = new
    return bytes(data[: int(draw(st.sampled_from([1, 1, 1, 0.9, 0.5])) * len(data))])


def check(name: str, tries: int) -> None:
    """So many mutated files."""

    @settings(
        max_examples=tries,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=mutated(name))
    def one(data):
        through(name, data)

    one()


@pytest.mark.parametrize("name", DOORS)
def test_mutated_files(name):
    for data in seeds_of(name):
        through(name, data, allowed=())  # whole, it goes all the way
    check(name, FEW // 4 if name in SLOW else FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_many_mutated_files(name):
    check(name, FEW * 5 if name in SLOW else FEW * 20)


def test_what_atheris_found():
    """A number for a list; a BMP of 1 KB that says it holds 100 million pixels in run lengths."""
    through("json", b"1")
    Image.new("P", (9, 9)).save(file := io.BytesIO(), "BMP")
    bomb = bytearray(file.getvalue())
    bomb[18:26] = struct.pack("<ii", 2**22, 24)  # width and height
    bomb[30:34] = struct.pack("<I", 1)
    with pytest.raises(ValueError, match="run-length encoded BMP"):
        open_image(bytes(bomb))
    through("image", bytes(bomb))


def grown(run) -> int:
    """By how many bytes the most memory that was ever held grows while `run` runs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def zeros(name: str, size: int) -> bytes:
    """A zip whose member is so many zeros."""
    with (
        zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as box,
        box.open(name, "w", force_zip64=True) as member,
    ):
        for _ in range(size // 2**24):
            member.write(bytes(2**24))
    return out.getvalue()


def test_a_small_file_that_holds_a_lot_is_refused_before_it_is_unpacked(tmp_path):
    """2 GB of zeros in a zip of 2 MB, 900 million pixels in a PNG of 100 KB."""
    image = Image.new("1", (30_000, 30_000))
    image.save(file := io.BytesIO(), "PNG")
    assert len(file.getvalue()) < 200_000
    del image
    with pytest.raises(ValueError, match="900000000 pixels. exceeds limit"):
        open_image(file.getvalue())
    bomb, told = zeros("images/a.png", 2**31), []
    assert len(bomb) < 3e6
    (tmp_path / "list.json").write_text(json.dumps(RECORDS))
    (tmp_path / "own.zip").write_bytes(bomb)

    def read():
        with pytest.raises(ValueError, match="a.png: more than 268,435,456 bytes"):
            told.extend(records(Source(f"json:{tmp_path}/list.json+own.zip"), 0))

    assert grown(read) < 3 * LARGEST
    assert [record["id"] for record in told] == ["7"], "what came before it"
