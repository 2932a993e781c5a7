"""WebDataset shards as sources: adjacent members of one name are one sample (img2dataset's layout, webdataset's convention)."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dataprep.columns import ColumnConfig, of_json
from dataprep.places import base_name, facts, is_unreachable, open_file
from dataprep.records import RawSample
from dataprep.tables import decompressed, plain
from pipeline.captions import MAX_TEXT_BYTES
from pipeline.errors import one_line
from pipeline.fields import IMAGE_EXTENSIONS, Value, parse_json, read_fields
from pipeline.remote import is_remote, read_file, read_ranges, size_of
from pipeline.tar import BlockReader, Member, members

TAR_SUFFIXES = (".tar", *(COMPRESSED := (".tar.gz", ".tgz", ".tar.zst")))
_TEXTS = ("txt", "text", "caption")
_USED = {*IMAGE_EXTENSIONS, *_TEXTS, "json", "cls"}
_REMOTE_BLOCK, _REQUEST = 16 << 20, 4 << 20  # bytes that are read along, and bytes of one of the requests for them
_MOST_IN_HAND = 256 << 20  # bytes of a picture in a tar behind a URL


class Shards:
    """A list of tars, read in the given order. What cannot be read becomes a rejected sample; no tar ends the run.

    Where img2dataset's table lies beside a tar, what it says of a sample counts as if it stood in the sample's JSON.
    """

    layout = "webdataset"
    tags: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[str], *, name: str, columns: ColumnConfig, root: Path | None = None) -> None:
        self.paths = tuple(paths)
        self.root = root
        self.name = name
        self._columns = of_json(columns)
        self._text_is_first = columns.captions is None
        self._empty: list[str] = []
        self._other: set[str] = set()
        self._failed = 0

    def reads(self) -> str:
        """What is read, and from which columns, in a sentence."""
        texts, columns = ["the text members"], [*self._columns.captions]
        captions = texts + columns if self._text_is_first else columns + texts
        what = base_name(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} tars"
        return f"{self.name}: {what}, captions from {', '.join(captions)}"

    def expected(self) -> int | None:
        """How many inputs there are, where that is known without reading them."""
        return None

    def digest(self) -> str:
        """Names and sizes of the tars, and behind URLs what the server says of their contents."""
        return facts(self.paths)

    def samples(self) -> Iterator[RawSample]:
        """All samples of all tars, in the order of their members."""
        self._empty.clear()
        self._other.clear()
        self._failed = 0
        for path in self.paths:
            name = base_name(path)
            is_empty = True
            try:
                with open_tar(path) as file:
                    for sample in self._samples_of(file, tar=path):
                        is_empty = False
                        yield sample
            except (OSError, EOFError) as error:
                if is_unreachable(path, error):
                    raise
                is_empty = False
                detail = f"{name}: cannot be read: {getattr(error, 'strerror', None) or one_line(error)}"
                yield RawSample(source=self.name, path=name, reason="bad-record", detail=detail)
            if is_empty:
                self._empty.append(name)

    def notes(self) -> list[str]:
        """What lies in the tars and is no input, in sentences. Complete once `samples()` has been read to its end."""
        notes = [f"{self.name}: {name} holds no samples" for name in self._empty]
        if self._other:
            notes.append(f"{self.name}: members with other extensions were left out ({', '.join(sorted(self._other))})")
        if self._failed:
            notes.append(f"{self.name}: {self._failed} row(s) of img2dataset's tables have no picture: their download had failed")
        return notes

    def _samples_of(self, file: BlockReader, *, tar: str) -> Iterator[RawSample]:
        told = _told(tar)
        group: list[Member] = []
        for member in members(file, tar=base_name(tar)):
            if member.extension not in _USED and member.problem is None:
                self._other.add(member.extension)
                continue
            ends_group = group and (member.key != group[0].key or any(member.extension == other.extension for other in group))
            if ends_group:
                yield self._sample(group, file=file, tar=tar, told=told.pop(group[0].key, {}))
                group = []
            group.append(member)
        if group:
            yield self._sample(group, file=file, tar=tar, told=told.pop(group[0].key, {}))
        self._failed += sum(row.get("status", "success") != "success" for row in told.values())

    def _sample(self, group: list[Member], *, file: BlockReader, tar: str, told: Mapping[str, Value]) -> RawSample:
        image = next((member for member in group if member.extension in IMAGE_EXTENSIONS), None)
        named = image or group[0]
        path = f"{base_name(tar)}/{named.name}" if named.name else base_name(tar)
        problem = next((member.problem for member in group if member.problem), None)
        if problem:
            return RawSample(source=self.name, path=path, reason=problem[0], detail=problem[1])

        record: dict[str, Value] = {}
        texts: dict[str, str] = {}
        data: bytes | None = None
        for member in group:
            if member is image:
                is_in_hand = is_remote(tar) or tar.lower().endswith(COMPRESSED)
                data = file.at(member.offset, member.length) if is_in_hand and member.length <= _MOST_IN_HAND else None
            else:
                payload = file.at(member.offset, min(member.length, MAX_TEXT_BYTES))
                if member.extension in _TEXTS:
                    texts[member.extension] = payload.decode("utf-8-sig", "replace")
                elif member.extension == "cls":
                    record = {**record, "label": payload.decode("ascii", "replace").strip()}
                elif member.extension == "json":
                    parsed = parse_json(payload)
                    if parsed is None:
                        return RawSample(source=self.name, path=path, reason="bad-record", detail=f"{member.name} is not a JSON object")
                    record = {**parsed, **record}
        fields = read_fields({**told, **record}, columns=self._columns)
        captions = tuple(texts[extension] for extension in _TEXTS if extension in texts)
        return RawSample(
            source=self.name,
            path=path,
            file=tar,
            offset=image.offset if image else 0,
            length=image.length if image else 0,
            data=data,
            captions=captions + fields.captions if self._text_is_first else fields.captions + captions,
            label=fields.label,
            extra=fields.extra,
            reason="" if image else "missing",
            detail="" if image else f"no image beside {named.name}",
        )


@contextmanager
def open_tar(tar: str) -> Iterator[BlockReader]:
    """A tar at a path or URL; a compressed one is unpacked into a temporary file. Raises OSError, and at the end EOFError where that was
    not possible to its end."""
    if tar.lower().endswith(COMPRESSED):
        with TemporaryFile(prefix="tim-") as unpacked:
            damage = _unpack(tar, into=unpacked)
            yield BlockReader(lambda offset, length: os.pread(unpacked.fileno(), length, offset), size=os.fstat(unpacked.fileno()).st_size)
        if damage:
            raise EOFError(f"its compression breaks off: {damage}")
        return
    if not is_remote(tar):
        with open(tar, "rb", buffering=0) as stream:
            descriptor = stream.fileno()
            yield BlockReader(lambda offset, length: os.pread(descriptor, length, offset), size=os.fstat(descriptor).st_size)
        return
    size = size_of(tar)
    if size is None:
        raise OSError("its server does not say how long it is")

    def read(offset: int, length: int) -> bytes:
        ends = range(offset + _REQUEST, offset + length + _REQUEST, _REQUEST)
        parts = read_ranges([(tar, end - _REQUEST, min(end, offset + length)) for end in ends])
        for part in parts:
            if isinstance(part, OSError):
                raise part
        return b"".join(part for part in parts if isinstance(part, bytes))

    yield BlockReader(read, size=size, block=_REMOTE_BLOCK)


def _unpack(tar: str, *, into: BinaryIO) -> str:
    """Decompress a tar, as far as it goes; returns what is wrong with the rest, if there is one."""
    with open_file(tar) as stream, decompressed(stream, name=tar) as plain:
        # read() would lose what comes just before the damage
        read: Callable[[int], bytes] = plain.read1  # pyright: ignore[reportAttributeAccessIssue]
        try:
            while part := read(1 << 16):
                into.write(part)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            return one_line(error)
        finally:
            into.flush()
    return ""


def sidecar_table(tar: str) -> pa.Table | None:
    """img2dataset's table beside a tar, if there is one that knows keys."""
    suffix = next((suffix for suffix in TAR_SUFFIXES if tar.lower().endswith(suffix)), "")
    path = f"{tar[: len(tar) - len(suffix)]}.parquet"
    try:
        source = io.BytesIO(read_file(path)) if is_remote(path) else path
        table = pq.ParquetFile(source).read(use_threads=False)
    except (OSError, pa.ArrowException):  # none, or none that can be read: all that is needed is in the tar
        return None
    is_sound = "key" in table.column_names and len({*table.column_names}) == table.num_columns
    return table if is_sound and pa.types.is_string(table.schema.field("key").type) else None


def _told(tar: str) -> dict[str, dict[str, Any]]:
    """What img2dataset's table says of each key."""
    table = sidecar_table(tar)
    return {} if table is None else {row["key"]: plain(row) for row in table.to_pylist() if row["key"]}
