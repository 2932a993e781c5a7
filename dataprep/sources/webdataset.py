"""WebDataset shards as sources: members with the same key form one sample, in any order (`pipeline.corpus.tar_samples`)."""

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

from dataprep.sources.column_mapping import ColumnConfig, describe_encoding, of_json, with_file_name
from dataprep.sources.files.paths import base_name, facts, is_unreachable, open_file
from dataprep.sources.raw_sample import RawMask, RawSample
from dataprep.sources.tabular.tables import decompressed, plain
from pipeline.bounded_counter import BoundedCounter, listed
from pipeline.corpus.captions import MAX_TEXT_BYTES
from pipeline.corpus.json_record import parse_json
from pipeline.corpus.record_fields import Value, read_fields
from pipeline.corpus.tar_samples import TarSample, TarSamples
from pipeline.corpus.text_decoding import UndecodableText, decode_text
from pipeline.errors import one_line
from pipeline.storage.remote import is_remote, read_file, read_ranges, size_of
from pipeline.storage.tar import BlockReader, Member, members, split_name

TAR_SUFFIXES = (".tar", *(COMPRESSED := (".tar.gz", ".tgz", ".tar.zst")))
DOTTED = "webdataset's key ends at the first dot of a name: 0000.input.jpg has the extension input.jpg"
DOTTED_TAKEN = f"members whose names have several dots were taken by their last part ({DOTTED})"
_REMOTE_BLOCK, _REQUEST = 16 << 20, 4 << 20  # bytes of a read from a URL, and of each of its parallel requests
_MAX_REMOTE_BYTES = 256 << 20  # of an image in a remote or compressed tar


class Shards:
    """A list of tars, read in the given order. Unreadable samples and tars become rejected samples.

    The values in img2dataset's table beside a tar, if any, are merged into the JSON of its samples.
    """

    layout = "webdataset"
    tags: tuple[str, ...] = ()

    def __init__(
        self, paths: Sequence[str], *, name: str, columns: ColumnConfig, root: Path | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.paths = tuple(paths)
        self.root = root
        self.name = name
        self._columns = of_json(columns)
        self._text_is_first = columns.captions is None
        self._folder_notes = tuple(notes)
        self._empty: list[str] = []
        self._left_out = BoundedCounter()
        self._has_dotted = False
        self._failed = 0

    def reads(self) -> str:
        """One sentence on what is read, and from which columns."""
        texts, columns = ["the text members"], [*self._columns.captions]
        captions = texts + columns if self._text_is_first else columns + texts
        what = base_name(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} tars"
        return f"{self.name}: {what}, captions from {', '.join(captions)}{describe_encoding(self._columns)}"

    def expected(self) -> int | None:
        """None: the number of inputs is unknown before they are read."""
        return None

    def digest(self) -> str:
        """Digest of names and sizes of the tars and, for URLs, of the server's version of them."""
        return facts(self.paths)

    def samples(self) -> Iterator[RawSample]:
        """All samples of all tars, in the order of the first member of each key."""
        self._empty.clear()
        self._left_out = BoundedCounter()
        self._has_dotted = False
        self._failed = 0
        for path in self.paths:
            name = base_name(path)
            is_empty = True
            try:
                with open_tar(path, keep=True) as file:
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
        """One sentence for each kind of member that is not an input. Complete once `samples()` is exhausted."""
        notes = [*self._folder_notes]
        if self._empty:
            count = len(self._empty)
            notes.append(f"{listed(self._empty, count=count)} {'holds' if count == 1 else 'hold'} no samples")
        if self._left_out.total():
            notes.append(members_left_out(self._left_out, has_dotted=self._has_dotted))
        elif self._has_dotted:
            notes.append(DOTTED_TAKEN)
        if self._failed:
            notes.append(f"{self._failed} row(s) of img2dataset's tables have no image: their download had failed")
        return [f"{self.name}: {note}" for note in notes]

    def _samples_of(self, file: BlockReader, *, tar: str) -> Iterator[RawSample]:
        rows = _table_rows(tar)
        joined = TarSamples(members(file, tar=base_name(tar)), tar=base_name(tar))
        try:
            for found in joined:
                yield self._sample(found, file=file, tar=tar, row=rows.pop(found.key, {}))
        finally:
            self._has_dotted |= joined.has_dotted
            for extension, count in joined.left_out.counts().items():
                self._left_out.add(extension, count)
        self._failed += sum(row.get("status", "success") != "success" for row in rows.values())

    def _sample(self, found: TarSample, *, file: BlockReader, tar: str, row: Mapping[str, Value]) -> RawSample:
        path, image = f"{base_name(tar)}/{found.name}" if found.name else base_name(tar), found.image
        is_compressed = tar.lower().endswith(COMPRESSED)
        problem = found.problem
        if image and is_compressed and image.length > _MAX_REMOTE_BYTES:
            problem = problem or ("too-large", f"{image.length} bytes in a compressed tar: unpack it to read images of this size")
        if problem:
            return RawSample(source=self.name, path=path, reason=problem[0], detail=problem[1])

        try:
            record, texts = self._texts_of(found, file=file)
        except ValueError as error:
            return RawSample(source=self.name, path=path, reason="bad-record", detail=str(error))
        stated = with_file_name({**row, **record}, columns=self._columns, name=split_name(found.name)[0])
        fields = read_fields(stated, columns=self._columns)
        captions = tuple(texts)
        data = mask_data = None
        if image and (is_remote(tar) or is_compressed) and image.length <= _MAX_REMOTE_BYTES:
            data = file.at(image.offset, image.length)
            mask_data = file.at(found.mask.offset, found.mask.length) if found.mask else None
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
            detail="" if image else f"no image beside {found.name}",
            mask=RawMask(found.mask.name, file=tar, offset=found.mask.offset, length=found.mask.length, data=mask_data)
            if found.mask
            else None,
        )

    def _texts_of(self, found: TarSample, *, file: BlockReader) -> tuple[dict[str, Value], list[str]]:
        """(values of the sample's JSON and .cls, its texts). Raises ValueError, with the name of the member, for an unusable one."""

        def read(member: Member) -> bytes:
            return file.at(member.offset, min(member.length, MAX_TEXT_BYTES))

        def text_of(member: Member) -> str:
            with _naming(member.name):
                return decode_text(read(member), encoding=self._columns.encoding)

        texts = [text_of(member) for member in found.texts]
        record: dict[str, Value] = {}
        if found.json:
            with _naming(found.json.name):
                parsed = parse_json(read(found.json), encoding=self._columns.encoding)
            if isinstance(parsed, dict):
                record = parsed
            elif any(texts):
                self._left_out.add(".json")
            else:
                raise ValueError(f"{found.json.name} is {parsed}")
        if found.cls:
            record = {**record, "label": text_of(found.cls).strip()}
        return record, texts


def members_left_out(left_out: BoundedCounter, *, has_dotted: bool) -> str:
    """A note on members that belong to no sample, by extension."""
    return f"members left out, by extension: {left_out}{f' ({DOTTED})' if has_dotted else ''}"


@contextmanager
def _naming(member: str) -> Iterator[None]:
    try:
        yield
    except UndecodableText as error:
        raise ValueError(f"{member} is {error}") from error


@contextmanager
def open_tar(tar: str, *, keep: bool = False) -> Iterator[BlockReader]:
    """A tar at a path or URL. A compressed tar is unpacked into a temporary file.

    With `keep`, data from a URL are stored in a temporary file, too, so that nothing is requested twice. Raises OSError, and EOFError on
    exit if the compressed data are incomplete.
    """
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

    if not keep:
        yield BlockReader(read, size=size, block=_REMOTE_BLOCK)
        return
    with TemporaryFile(prefix="tim-") as kept:
        yield BlockReader(_StoredBlocks(read, file=kept, size=size).at, size=size)


class _StoredBlocks:
    """Blocks read from a URL, stored in a file."""

    def __init__(self, read: Callable[[int, int], bytes], *, file: BinaryIO, size: int) -> None:
        self._read = read
        self._file = file
        self._size = size
        self._blocks: set[int] = set()

    def at(self, offset: int, length: int) -> bytes:
        for block in range(offset // _REMOTE_BLOCK, -(-(offset + length) // _REMOTE_BLOCK)):
            if block not in self._blocks:
                start = block * _REMOTE_BLOCK
                self._file.seek(start)
                self._file.write(self._read(start, min(_REMOTE_BLOCK, self._size - start)))
                self._blocks.add(block)
        self._file.seek(offset)
        return self._file.read(length)


def _unpack(tar: str, *, into: BinaryIO) -> str:
    """Decompress a tar as far as possible. Returns the error, "" if there is none."""
    with open_file(tar) as stream, decompressed(stream, name=tar) as plain:
        # read() would lose the data just before the damage
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
    """img2dataset's table beside a tar; None without one, or if it has no keys."""
    suffix = next((suffix for suffix in TAR_SUFFIXES if tar.lower().endswith(suffix)), "")
    path = f"{tar[: len(tar) - len(suffix)]}.parquet"
    try:
        source = io.BytesIO(read_file(path)) if is_remote(path) else path
        table = pq.ParquetFile(source).read(use_threads=False)
    except (OSError, pa.ArrowException):  # missing or unreadable: the tar has all that is needed
        return None
    is_usable = "key" in table.column_names and len({*table.column_names}) == table.num_columns
    return table if is_usable and pa.types.is_string(table.schema.field("key").type) else None


def _table_rows(tar: str) -> dict[str, dict[str, Any]]:
    """key → row of img2dataset's table."""
    table = sidecar_table(tar)
    return {} if table is None else {row["key"]: plain(row) for row in table.to_pylist() if row["key"]}
