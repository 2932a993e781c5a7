"""Sound files of every kind, and ways to break them."""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from tests.dataprep.helpers import photo

_VALUES = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80\0\0\0",
    b"\xff\xd8",
    b"\xff\xff",
    b"9" * 11,
    b"\n",
    b'"',
    b"[" * 40,
)


def damaged(files: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """One of some files with bytes overwritten, cut out, doubled, cut off or taken from another of them."""
    place = st.floats(0, 1, exclude_max=True)
    edits = st.lists(
        st.one_of(
            st.tuples(st.just("write"), place, st.sampled_from(_VALUES) | st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("insert"), place, st.sampled_from(_VALUES) | st.binary(min_size=1, max_size=64)),
            st.tuples(st.just("cut"), place, st.integers(1, 600)),
            st.tuples(st.just("double"), place, st.integers(1, 600)),
            st.tuples(st.just("end"), place, st.none()),
            st.tuples(st.just("splice"), place, st.integers(0, len(files) - 1)),
        ),
        max_size=6,
    )
    return st.builds(lambda which, changes: _apply(files, which, changes), st.integers(0, len(files) - 1), edits)


def _apply(files: tuple[bytes, ...], which: int, changes: list[tuple[str, float, Any]]) -> bytes:
    data = files[which]
    for what, place, value in changes:
        at = int(place * len(data))
        if what == "write":
            data = data[:at] + value + data[at + len(value) :]
        elif what == "insert":
            data = data[:at] + value + data[at:]
        elif what == "cut":
            data = data[:at] + data[at + value :]
        elif what == "double":
            data = data[: at + value] + data[at:]
        elif what == "end":
            data = data[:at]
        else:
            other = files[value]
            data = data[:at] + other[int(place * len(other)) :]
    return data


@cache
def images() -> tuple[bytes, ...]:
    """A small image in every format and most of their ways."""
    image = Image.open(io.BytesIO(photo(1, height=24, width=40, format="PNG")))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    frames = [image, image.rotate(180)]
    made = [
        _saved(image, "JPEG"),
        _saved(image, "JPEG", progressive=True, quality=30),
        _saved(image.convert("L"), "JPEG"),
        _saved(image.convert("CMYK"), "JPEG"),
        _saved(image, "JPEG", exif=exif, icc_profile=profile, comment=b"none"),
        _saved(image, "PNG"),
        _saved(image.convert("P"), "PNG", transparency=3),
        _saved(image.convert("RGBA"), "PNG", icc_profile=profile, exif=exif),
        _saved(image.convert("L").convert("I").point(lambda level: level * 257).convert("I;16"), "PNG"),
        _saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        _saved(image, "WEBP"),
        _saved(image.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        _saved(image, "BMP"),
        _saved(image.convert("P"), "BMP"),
        *(_saved(image, "TIFF", compression=how) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        _saved(image.convert("1"), "TIFF", compression="group4"),
        _saved(image, "PPM"),
        _saved(image.convert("L"), "PPM"),
    ]
    made += [_saved(image, name) for name, feature in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(feature)]
    return tuple(made)


@cache
def tars() -> tuple[bytes, ...]:
    """Samples of several kinds in every tar format."""
    members = [
        ("a/0001.jpg", photo(1)),
        ("a/0001.txt", b"a caption"),
        ("a/0001.json", json.dumps({"key": "0001", "caption": "a caption", "width": 48, "nested": {"x": [1]}}).encode()),
        ("0002.png", photo(2, format="PNG")),
        ("0002.cls", b"7"),
        ("0002.pyd", b"cos\nsystem\n(S'true'\ntR."),
        ("n" * 120 + ".jpg", photo(3)),
        ("n" * 120 + ".txt", "ünï".encode()),
    ]
    return tuple(_tar(members, format=format) for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))


@cache
def tables() -> tuple[bytes, ...]:
    """Metadata in lines and in columns."""
    rows = [
        {"file_name": f"{number}.jpg", "text": "a caption", "captions": ["one", "two"], "label": number, "n": 0.5} for number in range(4)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return lines, b'file_name,text,label\n0.jpg,"a ""quoted"" one",3\n1.jpg,"two\nlines",4\n', "\ufeff".encode() + lines, b"\n\n{}\n[]\n"


@cache
def parquets() -> tuple[bytes, ...]:
    """Tables of images, small and compressed."""
    rows = {"image": [{"bytes": photo(1), "path": "1.jpg"}] * 2, "text": ["one", "two"], "label": [1, 2]}
    plain = {"file_name": ["0.jpg", "1.jpg"], "text": ["one", "two"], "captions": [["a"], []]}
    made = []
    for columns in (rows, plain):
        for compression in ("none", "zstd"):
            buffer = io.BytesIO()
            pq.write_table(pa.table(columns), buffer, compression=compression)
            made.append(buffer.getvalue())
    return tuple(made)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _tar(members: list[tuple[str, bytes]], *, format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # too long a name for USTAR
                assert format == tarfile.USTAR_FORMAT
    return buffer.getvalue()
