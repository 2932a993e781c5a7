"""Listings of folders: every file once, in one order wherever it lies, found by name, and small."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataprep.sources.files.file_listing import Listing
from dataprep.sources.files.paths import list_files
from tests.dataprep.helpers import write_folder

PARTS = st.text(alphabet="aé-.\udc80\n0", min_size=1, max_size=3)
FILES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(FILES, st.none() | st.integers(0, 9)), FILES)
def test_every_file_is_listed_once_and_found(sizes: dict[str, int | None], other: str) -> None:
    listing = Listing.of_files(sizes)
    assert sorted(listing) == sorted(sizes)
    assert [listing.number(file) for file in listing] == list(range(len(sizes)))
    assert (other in listing) == (other in sizes)
    more = Listing.of_files({**sizes, other: 10})
    assert more.digest().hexdigest() != listing.digest().hexdigest()


def test_a_folder_is_listed_alike_on_disk_and_behind_a_url(tmp_path: Path) -> None:
    names = ["a/b/2.jpg", "a/b/10.jpg", "a/c.jpg", "a/d/e.jpg", "a-b/z.jpg", "a.jpg", "B.jpg"]
    folder = write_folder(tmp_path / "f", {name: name.encode() for name in [*names, ".hidden/x.jpg", "a/.y.jpg"]})
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/listed", recursive=True)
    there = list_files("memory://listed")
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing")
    local = list_files(str(folder))
    assert list(local) == ["B.jpg", "a.jpg", "a/c.jpg", "a/b/10.jpg", "a/b/2.jpg", "a/d/e.jpg", "a-b/z.jpg"]
    assert list(there) == list(local)
    assert there.digest().hexdigest() == local.digest().hexdigest()
    files.rm("/listed", recursive=True)


@pytest.mark.parametrize("folders", [1, 100])
def test_a_file_takes_little_more_memory_than_its_name(folders: int) -> None:
    count = 20_000
    tracemalloc.start()
    listing = Listing((f"{folder:05d}/", {f"{n:09d}.jpg": n for n in range(count // folders)}) for folder in range(folders))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listing) == count
    assert held / count < len("000000000.jpg") + 16
