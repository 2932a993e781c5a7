"""MosaicML MDS shards and litdata chunks as sources: `index.json` and files of packed samples. The formats differ mainly in their index.

A file begins with its number of samples and their offsets; a sample is the lengths of its values, then the values. Both libraries unpickle
values, and litdata deletes compressed chunks after unpacking; here, pickled columns are left out, and files are only read.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import zstandard
from PIL import Image

from dataprep.sources.column_mapping import ColumnConfig, choose, describe
from dataprep.sources.files.file_listing import Listing
from dataprep.sources.files.paths import facts, is_unreachable, join, open_file
from dataprep.sources.image_list import sample_of
from dataprep.sources.raw_sample import RawSample
from pipeline.corpus.text_decoding import decode_text
from pipeline.errors import kind_and_line, one_line
from pipeline.storage.remote import is_remote

INDEX = "index.json"
_IMAGES = ("jpeg", "png", "image", "pil", "bytes", "file")  # formats of values, likely ones first
_TEXTS, _PICKLES = ("str", "text"), ("pickle", "pkl")
_NUMBERS = {"int": np.int64, "float": np.float64, "bool": np.bool_}
_MAX_BYTES = 1 << 31  # of an unpacked file
_BROKEN = (OSError, EOFError, ValueError, struct.error, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file. `lengths`: the length of each value of constant length, which samples do not repeat; None for others."""

    name: str
    count: int
    compression: str
    names: tuple[str, ...]
    formats: tuple[str, ...]
    lengths: tuple[int | None, ...]


class PackedSamples:
    """A folder or URL with an `index.json` of MDS or litdata. Images in uncompressed local files are not copied."""

    tags: tuple[str, ...] = ()

    def __init__(self, folder: str, *, name: str, columns: ColumnConfig) -> None:
        self.name = name
        self.path = folder
        self.root = None if is_remote(folder) else Path(folder).resolve()
        index = _read_index(folder)
        self.layout, self.files = _files_of(index, origin=join(folder, INDEX))
        first = self.files[0]
        kinds = dict(zip(first.names, first.formats, strict=True))
        images = [column for kind in _IMAGES for column, own in kinds.items() if own.partition(":")[0] == kind]
        self.columns = choose(columns, names=first.names, images=images, origin=folder)
        self._pickled = sorted(column for column, kind in kinds.items() if kind in _PICKLES)

    def reads(self) -> str:
        """One sentence on what is read, and from which columns."""
        return f"{self.name}: {len(self.files)} file(s) of {self.layout}, {describe(self.columns)}"

    def expected(self) -> int | None:
        """Number of inputs, from the index."""
        return sum(file.count for file in self.files)

    def digest(self) -> str:
        """Digest of the index, and of names and sizes of the files that exist."""
        files = [join(self.path, file.name) for file in self.files]
        existing = [file for file in files if is_remote(file) or os.path.exists(file)]
        return hashlib.sha256(facts([join(self.path, INDEX), *existing]).encode()).hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All samples of all files. Unreadable ones are rejected samples."""
        for file in self.files:
            done = 0
            try:
                for sample in self._samples_of(file):
                    done += 1
                    yield sample
            except _BROKEN as error:
                if is_unreachable(self.path, error):
                    raise
                detail = f"{file.name} breaks off: {one_line(error)}"
                yield RawSample(source=self.name, path=f"{file.name}:{done + 1}", reason="bad-record", detail=detail)

    def notes(self) -> list[str]:
        """One sentence for each column that is not read."""
        return [f"{self.name}: {column} is pickled and was left out, because a pickle can run code" for column in self._pickled]

    def _samples_of(self, file: PackedFile) -> Iterator[RawSample]:
        path = join(self.path, file.name)
        if is_remote(path) or file.compression:
            with open_file(path) as stream:
                yield from self._unpacked(memoryview(_UNPACK[file.compression](stream.read())), file=file, mapped="")
            return
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            yield from self._unpacked(view, file=file, mapped=path)

    def _unpacked(self, data: memoryview, *, file: PackedFile, mapped: str) -> Iterator[RawSample]:
        """`mapped`: the local file of the data, if its images can be read again from it."""
        (count,) = struct.unpack_from("<I", data)
        if count != file.count or 4 + 4 * (count + 1) > len(data):
            raise ValueError(f"begins with {count} samples where the index has {file.count}")
        for number in range(count):
            where = f"{file.name}:{number + 1}"
            begin, end = struct.unpack_from("<II", data, 4 + 4 * number)
            try:
                ranges = _value_ranges(data, begin=begin, end=end, file=file)
                values = {
                    name: _value(data[start:stop], kind=kind, encoding=self.columns.encoding)
                    for name, kind, (start, stop) in zip(file.names, file.formats, ranges, strict=True)
                    if kind not in _PICKLES and not (mapped and name == self.columns.image and kind not in _TEXTS and kind != "pil")
                }
            except (ValueError, struct.error) as error:
                yield RawSample(source=self.name, path=where, reason="bad-record", detail=f"{where}: {one_line(error)}")
                continue
            if self.columns.image in values:
                yield sample_of(values, source=self.name, columns=self.columns, where=where, folder=self.path)
                continue
            start, stop = ranges[file.names.index(self.columns.image)]
            sample = sample_of(
                {**values, self.columns.image: b"here"}, source=self.name, columns=self.columns, where=where, folder=self.path
            )
            yield replace(sample, data=None, file=mapped, offset=start, length=stop - start)


def is_packed(folder: str, files: Listing) -> bool:
    """Whether a folder's `index.json` is one of MDS or litdata."""
    if INDEX not in files:
        return False
    index = _read_index(folder)
    return "chunks" in index or (index.get("version") == 2 and "shards" in index)


def _read_index(folder: str) -> dict[str, Any]:
    try:
        with open_file(join(folder, INDEX)) as stream:
            index = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{join(folder, INDEX)}: cannot be read: {one_line(error)}") from error
    return index if isinstance(index, dict) else {}


def _files_of(index: Mapping[str, Any], *, origin: str) -> tuple[str, list[PackedFile]]:
    """(name of the format, files). Raises ValueError for an index that cannot be read."""
    try:
        found = _of_litdata(index) if "chunks" in index else _of_mosaic(index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{origin}: is not an index of MDS or litdata: {kind_and_line(error)}") from error
    layout, files = found
    if not files:
        raise ValueError(f"{origin}: lists no files")
    for file in files:
        if "/" in file.name or "\\" in file.name or file.name in ("", ".", ".."):
            raise ValueError(f"{origin}: names a file outside its folder: {file.name}")
        if file.compression not in _UNPACK:
            known = ", ".join(name for name in _UNPACK if name)
            raise ValueError(f"{origin}: {file.name} is compressed by {file.compression}; supported are {known}: write it again")
    return layout, files


def _of_mosaic(index: Mapping[str, Any]) -> tuple[str, list[PackedFile]]:
    files = []
    for shard in index["shards"]:
        if shard["format"] != "mds":
            raise ValueError(f"a shard of format {shard['format']}")
        zipped = shard.get("zip_data")
        names, formats, lengths = shard["column_names"], shard["column_encodings"], shard["column_sizes"]
        files.append(
            PackedFile(
                name=str((zipped or shard["raw_data"])["basename"]),
                count=int(shard["samples"]),
                compression=str(shard["compression"]).partition(":")[0] if zipped else "",
                names=tuple(map(str, names)),
                formats=tuple(map(str, formats)),
                lengths=tuple(length or None for length in lengths),
            )
        )
    return "MDS", files


def _of_litdata(index: Mapping[str, Any]) -> tuple[str, list[PackedFile]]:
    config = index["config"]
    if config.get("encryption") or config.get("ipc_compression") or config.get("item_loader") not in (None, "PyTreeLoader"):
        raise ValueError("encrypted, or not written for litdata's PyTreeLoader")
    if config.get("compression_level") not in (None, "chunk"):
        raise ValueError("compressed within its chunks; write it with compression_level=chunk, or without compression")
    formats = tuple(map(str, config["data_format"]))
    names = tuple(_leaves(json.loads(config["data_spec"])[1]))
    files = [
        PackedFile(
            name=str(chunk["filename"]),
            count=int(chunk["chunk_size"]),
            compression=str(config.get("compression") or "").partition(":")[0],
            names=names,
            formats=formats,
            lengths=(None,) * len(formats),
        )
        for chunk in index["chunks"]
    ]
    return "litdata", files


def _leaves(spec: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the values in the tree of a sample: dictionary keys and list positions, joined by dots."""
    children: Sequence[Mapping[str, Any]] = spec["children_spec"]
    if not children:
        yield prefix or "value"
        return
    keys = json.loads(spec["context"]) if "dict" in str(spec["type"]).lower() else range(len(children))
    for key, child in zip(keys, children, strict=True):
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))


def _value_ranges(data: memoryview, *, begin: int, end: int, file: PackedFile) -> list[tuple[int, int]]:
    """(start, stop) in bytes of each value of a sample."""
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"bytes {begin} to {end} are not in the file")
    is_variable = [length is None for length in file.lengths]
    stored = iter(struct.unpack_from(f"<{sum(is_variable)}I", data[begin:end]))
    start = begin + 4 * sum(is_variable)
    ranges = []
    for length in file.lengths:
        stop = start + (next(stored) if length is None else length)
        ranges.append((start, stop))
        start = stop
    if start > end:
        raise ValueError(f"its values take more bytes than it has: {start - begin} of {end - begin}")
    return ranges


def _value(data: memoryview, *, kind: str, encoding: str) -> Any:
    """Decode a value; None for unsupported formats, such as pickles. Raises ValueError for a damaged value."""
    base = kind.partition(":")[0]
    if base in _TEXTS:
        return decode_text(data, encoding=encoding)
    if base in ("jpeg", "png", "image", "bytes", "file"):
        return bytes(data)
    if base == "pil":
        return _as_file(data)
    if base == "json":
        with_brackets = data[:1] in (b"{", b"[", b'"')
        return json.loads(bytes(data)) if with_brackets else None
    if base in ("str_int", "str_float", "str_decimal"):
        return float(bytes(data)) if base != "str_int" else int(bytes(data)[:20])
    if base in _NUMBERS or (kind.rstrip("0123456789") in ("int", "uint", "float") and kind != "float8"):
        dtype = np.dtype(_NUMBERS.get(base, kind))
        return np.frombuffer(data, dtype.newbyteorder("<"), count=1)[0].item()
    return None


def _as_file(data: memoryview) -> bytes:
    """Raw pixels of a Pillow image, as stored by both libraries → an uncompressed TIFF file."""
    width, height, length = struct.unpack_from("<III", data)
    mode = bytes(data[12 : 12 + length]).decode("ascii")
    buffer = io.BytesIO()
    Image.frombytes(mode, (width, height), bytes(data[12 + length :])).save(buffer, "TIFF")
    return buffer.getvalue()


def _zstd(data: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as stream:
        return _bounded(stream)


def _bounded(stream: Any) -> bytes:
    unpacked = cast(bytes, stream.read(_MAX_BYTES + 1))
    if len(unpacked) > _MAX_BYTES:
        raise ValueError(f"unpacks to more than {_MAX_BYTES} bytes")
    return unpacked


_UNPACK = {
    "": bytes,
    "zstd": _zstd,
    "gz": lambda data: _bounded(gzip.GzipFile(fileobj=io.BytesIO(data))),
    "bz2": lambda data: _bounded(bz2.BZ2File(io.BytesIO(data))),
}
