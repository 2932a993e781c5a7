"""Tables as streams of rows: CSV, TSV, JSON and JSON lines (plain, .zst or .gz), Parquet and Arrow files, local or behind a URL.

A row is its number and its values by name, or a sentence with its problem. Tables are not held in memory, except the text of a .json file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dataprep.sources.files.paths import base_name, facts, is_unreachable, open_file
from dataprep.sources.tabular.delimited import MAX_LINE_BYTES, read_delimited, read_header
from dataprep.sources.tabular.json_rows import read_json
from pipeline.corpus.json_record import parse_record
from pipeline.corpus.text_decoding import find_undecodable, open_text
from pipeline.digests import stream_digest
from pipeline.errors import one_line
from pipeline.storage.remote import is_remote

Row = tuple[int, "dict[str, Any] | str"]

TEXTS, COLUMNAR = ("csv", "tsv", "jsonl", "ndjson", "json"), ("parquet", "arrow")
COMPRESSIONS = ("zst", "gz")
_DELIMITERS = {"csv": ",", "tsv": "\t", "psv": "|"}
_PEEK = 1000  # rows read to find the columns of JSON lines
_BATCH, _BATCH_OF_IMAGES = 1024, 16  # rows
_BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)


def kind_of(file: str) -> str | None:
    """The kind of a table by its name, None for other files."""
    name = base_name(file.partition("?")[0] if is_remote(file) else file).lower()
    stem, _, last = name.rpartition(".")
    if last in COMPRESSIONS:
        last = stem.rpartition(".")[2]
        return last if last in TEXTS else None
    return last if stem and last in (*TEXTS, *COLUMNAR) else None


def kind_of_list(file: str) -> str | None:
    """The kind of a file given as a source. A .txt with a delimiter in its first line is a table, too."""
    kind = kind_of(file)
    if kind or not base_name(file).lower().endswith(".txt"):
        return kind
    with open_file(file) as stream:
        text, _ = open_text(stream)
        header = text.readline(MAX_LINE_BYTES)
    return next((kind for kind in ("tsv", "psv", "csv") if _DELIMITERS[kind] in header), None)


class Table:
    """A table at a path or URL.

    `names`: its columns (for JSON, those of the first thousand rows). `images`: columns with bytes, plain or in a struct of the datasets
    library. `count`: number of rows, if known. A table that cannot be opened has no columns, and a `problem`. `encoding`: of a text
    without a byte order mark, UTF-8 if empty.
    """

    def __init__(self, file: str, *, encoding: str = "") -> None:
        self.file = file
        self.name = base_name(file)
        kind = kind_of_list(file)
        assert kind, file
        self.kind = kind
        self.encoding = encoding
        self.names: list[str] = []
        self.images: list[str] = []
        self.count: int | None = None
        self.problem = ""
        if kind not in COLUMNAR:
            records = [record for _, record in islice(self.rows(), _PEEK)]
            self.problem = next((record for record in records if isinstance(record, str)), "")
            found = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
            self.names = list(found) or (self._header() if records else [])
            return
        try:
            with open_file(file) as stream:
                if kind == "parquet":
                    parquet = pq.ParquetFile(stream)
                    schema, self.count = parquet.schema_arrow, parquet.metadata.num_rows
                else:
                    schema = _open_arrow(stream).schema
        except _BROKEN as error:
            self.problem = one_line(error)
            return
        self.names = [str(name) for name in dict.fromkeys(schema.names)]
        self.images = [field.name for field in schema if _holds_bytes(field.type)]

    def digest(self) -> str:
        """Digest of the content of a text, or of the name, size and end of a Parquet or Arrow file. Raises OSError."""
        with open_file(self.file) as stream:
            if self.kind not in COLUMNAR:
                return stream_digest(stream)
            size = stream.seek(0, io.SEEK_END)
            stream.seek(max(0, size - (1 << 16)))
            return hashlib.sha256(facts([self.file]).encode() + stream.read()).hexdigest()

    def rows(self, *, only: Collection[str] = ()) -> Iterator[Row]:
        """All rows: (line of a text or row of a table, from 1; the record, or its problem).

        `only`: the needed columns; others may be left out.
        """
        number = 0
        try:
            with open_file(self.file) as stream, decompressed(stream, name=self.name) as plain:
                for number, record in self._read(plain, only=only):
                    yield number, record
        except _BROKEN as error:
            if is_unreachable(self.file, error):
                raise
            yield number + 1, f"{self.name} breaks off: {one_line(error)}"

    def _read(self, stream: BinaryIO, *, only: Collection[str]) -> Iterator[Row]:
        if self.kind == "parquet":
            return self._read_parquet(stream, columns=[name for name in self.names if name in only] or None)
        if self.kind == "arrow":
            return _read_arrow(stream)
        if self.kind == "json":
            return read_json(stream, encoding=self.encoding)
        if self.kind in _DELIMITERS:
            return read_delimited(stream, delimiter=_DELIMITERS[self.kind], encoding=self.encoding)
        return read_jsonl(stream, encoding=self.encoding)

    def _header(self) -> list[str]:
        """The columns of a table without a readable row."""
        if self.kind not in _DELIMITERS:
            return []
        try:
            with open_file(self.file) as stream, decompressed(stream, name=self.name) as plain:
                return read_header(plain, delimiter=_DELIMITERS[self.kind], encoding=self.encoding)
        except _BROKEN:  # reported in `problem`
            return []

    def _read_parquet(self, stream: BinaryIO, *, columns: list[str] | None) -> Iterator[Row]:
        file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        size = _BATCH_OF_IMAGES if self.images and not columns else _BATCH
        number = 0
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
                    for record in _records(batch):
                        number += 1
                        yield number, record
            except (OSError, pa.ArrowException) as error:
                if is_unreachable(self.file, error):
                    raise
                yield number + 1, f"rows {number + 1} to {end} of {self.name} cannot be read: {one_line(error)}"
            number = end


def read_jsonl(stream: BinaryIO, *, encoding: str = "") -> Iterator[Row]:
    """(line number from 1, the record or the problem of the line)"""
    text, codec = open_text(stream, encoding=encoding)
    number = 0
    while line := text.readline(MAX_LINE_BYTES + 1):
        number += 1
        is_long = len(line) > MAX_LINE_BYTES
        rest = line
        while len(rest) > MAX_LINE_BYTES and rest[-1] not in "\r\n":
            rest = text.readline(MAX_LINE_BYTES + 1)
        if is_long:
            yield number, f"a line of more than {MAX_LINE_BYTES} characters"
        elif line.strip():
            problem = find_undecodable(line, codec=codec, is_stated=bool(encoding))
            yield number, problem or parse_record(line, line=number)


def plain(value: Any) -> Any:
    """A value as JSON; bytes and other values without a JSON form become None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else None


@contextmanager
def decompressed(stream: BinaryIO, *, name: str) -> Iterator[BinaryIO]:
    """The decompressed content of a file, by the suffix of its name."""
    if name.lower().endswith(".zst"):
        with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as frames:
            yield io.BufferedReader(frames, 1 << 20)  # pyright: ignore[reportArgumentType]
    elif name.lower().endswith((".gz", ".tgz")):
        with gzip.open(stream) as members:
            yield members  # pyright: ignore[reportReturnType]
    else:
        yield stream


def _open_arrow(stream: BinaryIO) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    """Arrow's file format, or its stream format, which the datasets library writes."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)


def _read_arrow(stream: BinaryIO) -> Iterator[Row]:
    reader = _open_arrow(stream)
    if isinstance(reader, pa.RecordBatchFileReader):
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        batches = iter(reader)
    number = 0
    for batch in batches:
        batch.validate(full=True)
        for record in _records(batch):
            number += 1
            yield number, record


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    for start in range(0, batch.num_rows, _BATCH_OF_IMAGES):
        part = batch.slice(start, _BATCH_OF_IMAGES)
        try:
            yield from part.to_pylist()
        except (ValueError, pa.ArrowException):  # invalid UTF-8 or an invalid date in one of these rows
            yield from (_record(part.slice(row, 1)) for row in range(part.num_rows))


def _record(row: pa.RecordBatch) -> dict[str, Any] | str:
    try:
        return row.to_pylist()[0]
    except (ValueError, pa.ArrowException) as error:
        return f"cannot be read: {one_line(error)}"


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
