"""The tar reader beside Python's own, which is the reference for what a whole tar holds."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.tar import BlockReader, Member, members, split_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(data: bytes, *, block: int = 1024) -> list[Member]:
    return list(members(BlockReader(lambda offset, length: data[offset : offset + length], size=len(data), block=block), tar="t.tar"))


def write(files: list[tuple[str, bytes]], *, format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


names = st.text(st.characters(exclude_characters="\\\0/", exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda name: name != ".."
)
paths = st.lists(names, min_size=1, max_size=12).map("/".join)


@given(st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=6), st.sampled_from(["gnu", "pax"]))
@settings(max_examples=60, deadline=None)
def test_what_tarfile_writes_is_found(files: list[tuple[str, bytes]], format: str) -> None:
    data = write(files, format=FORMATS[format])
    found = read(data)
    assert [(member.name, data[member.offset : member.offset + member.length]) for member in found] == files
    assert not any(member.problem for member in found)


@given(st.binary(max_size=3000), st.integers(0, 3000), st.binary(max_size=600))
@settings(max_examples=60, deadline=None)
def test_no_bytes_do_harm(noise: bytes, at: int, patch: bytes) -> None:
    data = bytearray(write([("a.jpg", bytes(900)), ("b" * 150, b"x")], format=tarfile.GNU_FORMAT))
    data[at : at + len(patch)] = patch
    for broken in (bytes(data), noise, bytes(data) + noise):
        for member in read(broken):
            assert member.problem or 0 <= member.offset <= member.offset + member.length <= len(broken)


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_found(tmp_path: Path, format: str) -> None:
    for number in range(5):
        (tmp_path / "in" / "folder").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "folder" / f"{number}.jpg").write_bytes(os.urandom(300 * number))
    if format != "v7":
        (tmp_path / "in" / ("long" * 20)).mkdir()
        (tmp_path / "in" / ("long" * 20) / f"{'name' * 15}.txt").write_text("text")
    subprocess.run(["tar", "-C", tmp_path / "in", "--sort=name", f"--format={format}", "-cf", tmp_path / "a.tar", "."], check=True)
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(f"./{info.name.removeprefix('./')}", info.offset_data, info.size, None) for info in tar if info.isfile()]
    assert [(member.name, member.offset, member.length, member.problem) for member in read(data)] == expected


def test_a_member_beyond_eight_gigabytes_is_passed_over() -> None:
    """Its payload is never asked for: the file ends long before it."""
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 << 30
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        [member] = read(info.tobuf(format))
        assert (member.name, member.length) == ("a.jpg", 9 << 30)
        assert member.problem == ("damaged", "t.tar is cut off in a.jpg")


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"size": "9" * 5000}, False),
        ({"size": "-1"}, False),
        ({"path": "a\0b.jpg"}, True),
        ({"path": "../b.jpg"}, True),
        ({"size": "x"}, False),
    ],
)
def test_what_pax_headers_say_is_checked(headers: dict[str, str], problem: bool) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = 4, headers
    data = info.tobuf(tarfile.PAX_FORMAT) + b"data".ljust(512, b"\0") + write([("b.jpg", b"x")], format=tarfile.USTAR_FORMAT)
    one, other = read(data)
    assert (one.length, bool(one.problem)) == (4, problem)
    assert (other.name, other.problem) == ("b.jpg", None)


@pytest.mark.parametrize("record", [b"0 path=x=y\n", b"00000000 =", b"1 a=b\n", b"9999999 a=b\n", b" a=b\n"])
def test_a_pax_record_of_no_length_ends_the_reading(record: bytes) -> None:
    """A length of 0 once was read over and over."""
    data = bytearray(write([("a.jpg", b"x")], format=tarfile.PAX_FORMAT))
    info = tarfile.TarInfo("header")
    info.type, info.size = b"x", len(record)
    header = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    assert [member.name for member in read(header + bytes(data))] == ["a.jpg"]


def test_sparse_files_are_problems_and_what_follows_them_is_found(tmp_path: Path) -> None:
    with open(tmp_path / "holes.jpg", "wb") as file:
        for number in range(60):  # more holes than the first header has room for
            file.seek(number << 20)
            file.write(b"x" * 4096)
    (tmp_path / "plain.jpg").write_bytes(b"plain")
    for format in ("gnu", "posix"):
        command = ["tar", "-C", tmp_path, "--sparse", f"--format={format}", "-cf", tmp_path / "a.tar", "holes.jpg", "plain.jpg"]
        subprocess.run(command, check=True)
        data = (tmp_path / "a.tar").read_bytes()
        holes, plain = read(data)
        assert holes.problem is not None
        assert (plain.name, data[plain.offset : plain.offset + 5], plain.problem) == ("plain.jpg", b"plain", None)


def test_names_are_split_as_webdataset_does() -> None:
    assert split_name("a/b.seg.PNG") == ("a/b", "seg.png")
    assert split_name("a.b/c") == ("a.b/c", "")


def test_blocks_are_read_again_only_where_they_have_to_be() -> None:
    asked: list[tuple[int, int]] = []

    def count(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return bytes(range(100))[offset : offset + length]

    file = BlockReader(count, size=100, block=10)
    assert [file.at(3, 2), file.at(5, 8), file.at(4, 3), file.at(95, 10)] == [
        b"\3\4",
        bytes(range(5, 13)),
        b"\4\5\6",
        bytes(range(95, 100)),
    ]
    assert asked == [(3, 10), (95, 5)]
