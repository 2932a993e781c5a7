"""Tables as streams of rows: CSV, TSV and JSON lines (plain, .zst or .gz), Parquet and Arrow files, on this machine or behind a URL.

A row is its number and its values by name, or a sentence that says what is wrong with it. No table is held in memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from dataprep.places import base_name, facts, is_unreachable, open_file
from pipeline.digests import stream_digest
from pipeline.errors import one_line
from pipeline.remote import is_remote

Row = tuple[int, "dict[str, Any] | str"]

MAX_LINE_BYTES = 16 << 20
TEXTS, COLUMNAR = ("csv", "tsv", "jsonl", "ndjson"), ("parquet", "arrow")
COMPRESSIONS = ("zst", "gz")
_PEEK = 1000  # rows that are looked at to learn the columns of JSON lines
_BATCH, _BATCH_OF_PICTURES = 1024, 16  # rows
_BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException)


def kind_of(file: str) -> str | None:
    """The kind of a table by its name, None for what is no table."""
    name = base_name(file.partition("?")[0] if is_remote(file) else file).lower()
    stem, _, last = name.rpartition(".")
    if last in COMPRESSIONS:
        last = stem.rpartition(".")[2]
        return last if last in TEXTS else None
    return last if stem and last in (*TEXTS, *COLUMNAR) else None


class Table:
    """A table at a path or URL.

    `names` are its columns (of JSON lines, those of the first thousand), `pictures` those that hold bytes, alone or in the struct that
    the datasets library writes, `count` its rows, if it says so. A table that cannot be opened has no columns, and a `problem`.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.name = base_name(file)
        kind = kind_of(file)
        assert kind, file
        self.kind = kind
        self.names: list[str] = []
        self.pictures: list[str] = []
        self.count: int | None = None
        self.problem = ""
        if kind not in COLUMNAR:
            seen = [record for _, record in islice(self.rows(), _PEEK)]
            self.names = list(dict.fromkeys(name for record in seen if isinstance(record, dict) for name in record))
            self.problem = next((record for record in seen if isinstance(record, str)), "")
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
        self.pictures = [field.name for field in schema if _holds_bytes(field.type)]

    def digest(self) -> str:
        """Of a text, its content; of a Parquet or Arrow file, its name, its size, and what lies at its end. Raises OSError."""
        with open_file(self.file) as stream:
            if self.kind not in COLUMNAR:
                return stream_digest(stream)
            size = stream.seek(0, io.SEEK_END)
            stream.seek(max(0, size - (1 << 16)))
            return hashlib.sha256(facts([self.file]).encode() + stream.read()).hexdigest()

    def rows(self) -> Iterator[Row]:
        """All rows: (line of a text or row of a table, from 1; the record, or what is wrong with it)."""
        reader: dict[str, Callable[[BinaryIO], Iterator[Row]]] = {
            "csv": read_csv,
            "tsv": lambda stream: read_csv(stream, delimiter="\t"),
            "parquet": self._read_parquet,
            "arrow": _read_arrow,
        }
        number = 0
        try:
            with open_file(self.file) as stream, decompressed(stream, name=self.name) as plain:
                for number, record in reader.get(self.kind, read_jsonl)(plain):
                    yield number, record
        except _BROKEN as error:
            if is_unreachable(self.file, error):
                raise
            yield number + 1, f"{self.name} breaks off: {one_line(error)}"

    def _read_parquet(self, stream: BinaryIO) -> Iterator[Row]:
        file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        size = _BATCH_OF_PICTURES if self.pictures else _BATCH
        number = 0
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=size, row_groups=[group], use_threads=False):
                    for record in _records(batch):
                        number += 1
                        yield number, record
            except (OSError, pa.ArrowException) as error:
                if is_unreachable(self.file, error):
                    raise
                yield number + 1, f"rows {number + 1} to {end} of {self.name} cannot be read: {one_line(error)}"
            number = end


def read_jsonl(stream: BinaryIO) -> Iterator[Row]:
    """(line number from 1, the record, or what is wrong with the line)"""
    for number, line in enumerate(_lines(stream), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, _parse_line(line)


def read_csv(stream: BinaryIO, *, delimiter: str = ",") -> Iterator[Row]:
    """(line number from 1, the row by its header's names, or what is wrong with it)"""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")  # pyright: ignore[reportArgumentType]
    reader = csv.reader(iter(lambda: text.readline(MAX_LINE_BYTES), ""), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"not CSV: {error}"
            continue
        if header is None:
            header = [name.strip() for name in row]
            repeated = [name for name, count in Counter(header).items() if count > 1]
            if repeated:
                yield 1, f"the header repeats {repeated[0]}"
                return
        elif len(row) == len(header):
            yield reader.line_num, dict(zip(header, row, strict=True))
        elif row:
            yield reader.line_num, f"{len(row)} columns where the header has {len(header)}"


def plain(value: Any) -> Any:
    """A value as JSON can hold it; bytes and what else has no such form become None."""
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
    """What a file holds that was compressed as its name says, to read from."""
    if name.lower().endswith(".zst"):
        with zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True) as frames:
            yield io.BufferedReader(frames, 1 << 20)  # pyright: ignore[reportArgumentType]
    elif name.lower().endswith((".gz", ".tgz")):
        with gzip.open(stream) as members:
            yield members  # pyright: ignore[reportReturnType]
    else:
        yield stream


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, its beginning."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES + 1)
        yield line


def _parse_line(line: bytes) -> dict[str, Any] | str:
    if len(line) > MAX_LINE_BYTES:
        return f"a line of more than {MAX_LINE_BYTES} bytes"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else f"not a JSON object but {type(record).__name__}"


def _open_arrow(stream: BinaryIO) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    """Arrow's file format, or its stream format, which is what the datasets library writes."""
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
    for place in range(0, batch.num_rows, _BATCH_OF_PICTURES):
        part = batch.slice(place, _BATCH_OF_PICTURES)
        try:
            yield from part.to_pylist()
        except (ValueError, pa.ArrowException):  # text that is no UTF-8, dates that are none: some row of these
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
