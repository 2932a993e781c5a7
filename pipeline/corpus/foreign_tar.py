"""Index a tar written by another tool, in the columns of a prepared corpus. The tar is not modified or copied.

Members with the same key form one sample, in any order (`pipeline.corpus.tar_samples`): an image, a text, `.json` (img2dataset's names)
and `.cls`. A sample that cannot be used becomes a row with its reason. One pass over the tar reads texts and the first bytes of images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.corpus.captions import MAX_TEXT_BYTES, clean_captions
from pipeline.corpus.json_record import parse_json
from pipeline.corpus.record_fields import RECOMPUTED, TAKEN, Value, read_fields
from pipeline.corpus.tar_samples import TarSample, TarSamples, is_used, key_of, kind_of
from pipeline.corpus.text_decoding import UndecodableText, decode_text
from pipeline.images import Rejection
from pipeline.images.headers import Size, careful_size, quick_size
from pipeline.storage.tar import BlockReader, Member, members

_MEMBERS = [f"{member}_{what}" for member in ("image", "text", "cls", "json") for what in ("offset", "length")]
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "path", "status", "reason", "detail")),
        *((name, pa.int32()) for name in ("width", "height")),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.int32()),
        *((name, pa.int64()) for name in _MEMBERS),
    ]
)
_CAPTIONS = {"caption", "captions", "text"}
_NO_FIELDS = read_fields({})
_MAX_COLUMNS = 256  # further columns that are taken from JSON files


@dataclass(frozen=True, slots=True)
class ForeignShard:
    """The table of a tar, one row per sample, `key` null where it is rejected; and how many members were left out, by extension.

    `has_dotted`: whether names with several dots are among those that were left out or taken by their last part.
    """

    table: pa.Table
    left_out: Mapping[str, int]
    has_dotted: bool = False


class _Seen(NamedTuple):
    """What a member says: the size of an image, or a text's payload; and what is wrong with it."""

    size: Size | None = None
    payload: bytes = b""
    problem: tuple[str, str] | None = None


class _Sample:
    """What the members of one key say together."""

    __slots__ = ("label", "path", "places", "problem", "record", "size", "text")

    def __init__(self, path: str, *, problem: tuple[str, str] | None = None) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}
        self.problem = problem
        self.size: Size | None = None
        self.text: str | None = None
        self.record: dict[str, Value] | None = None
        self.label: str | None = None


def index_tar(
    file: BlockReader,
    *,
    tar: str,
    sidecar: pa.Table | None = None,
    crashed: Collection[int] = (),
    on_risk: Callable[[int], None] = lambda offset: None,
) -> ForeignShard:
    """Find the samples of a tar.

    Args:
        file: the tar.
        tar: what problems call it.
        sidecar: img2dataset's table of the tar, with a column `key`: further columns come from it, and captions, if it has them; then
            no text is read.
        crashed: offsets of images that take the decoder down.
        on_risk: called with the offset of an image whose size only Pillow can tell, before it is asked.

    Raises OSError where the file cannot be read.
    """
    told = {} if sidecar is None else {key: row for row, key in enumerate(sidecar.column("key").to_pylist())}
    speaks = sidecar is not None and not _CAPTIONS.isdisjoint(sidecar.column_names)
    seen: dict[int, _Seen] = {}

    def look() -> Iterator[Member]:
        """All members, each looked into as it passes."""
        for member in members(file, tar=tar):
            if not is_used(member) or member.problem:
                pass
            elif kind_of(member) == "image":
                seen[member.offset] = _measure(member, file=file, crashed=crashed, on_risk=on_risk)
            elif kind_of(member) == "cls" or not (speaks and key_of(member) in told):
                seen[member.offset] = _Seen(payload=file.at(member.offset, min(member.length, MAX_TEXT_BYTES)))
            yield member

    joined = TarSamples(look(), tar=tar)
    samples = {found.key: _read(found, seen=seen, joined=joined, tar=tar) for found in joined}
    table = _table(samples, told=told, sidecar=sidecar)
    return ForeignShard(table=table, left_out=joined.left_out.counts(), has_dotted=joined.has_dotted)


def unreadable(tar: str, *, reason: str, detail: str) -> ForeignShard:
    """A tar of which nothing can be read: one rejected row in its name."""
    return ForeignShard(table=_table({tar: _Sample(tar, problem=(reason, detail))}, told={}, sidecar=None), left_out={})


def _measure(member: Member, *, file: BlockReader, crashed: Collection[int], on_risk: Callable[[int], None]) -> _Seen:
    offset, length = member.offset, member.length

    def peek(start: int, count: int) -> bytes:
        return file.at(offset + start, min(count, length - start)) if start < length else b""

    if offset in crashed:
        return _Seen(problem=("crashed", "its header takes the decoder down"))
    try:
        size = quick_size(peek, length=length)
        if size is None:
            on_risk(offset)
            size = careful_size(peek, length=length)
    except Rejection as rejection:
        return _Seen(problem=(rejection.reason, rejection.detail))
    return _Seen(size=size)


def _read(found: TarSample, *, seen: dict[int, _Seen], joined: TarSamples, tar: str) -> _Sample:
    """A sample from what its members say. A table has one place for texts: the preferred one is used, further ones are left out."""
    sample = _Sample(found.name or tar, problem=found.problem)
    joined.leave_out(found.texts[1:])
    if found.problem:
        return sample
    text = found.texts[0] if found.texts else None
    for kind, member in (("image", found.image), ("text", text), ("cls", found.cls), ("json", found.json)):
        if member is None:
            continue
        sample.places[kind] = (member.offset, member.length)
        said = seen.pop(member.offset, None)
        if said is None:  # img2dataset's table speaks for the sample
            continue
        sample.size = said.size or sample.size
        sample.problem = sample.problem or said.problem
        if kind != "image":
            _read_payload(sample, kind, said.payload, name=member.name)
        if kind == "json" and sample.record is None and sample.problem is None:  # a text says what there is to say
            del sample.places[kind]
            joined.leave_out([member])
    return sample


def _read_payload(sample: _Sample, kind: str, payload: bytes, *, name: str) -> None:
    try:
        if kind == "text":
            sample.text = decode_text(payload)
        elif kind == "cls":
            sample.label = decode_text(payload).strip()
        else:
            parsed = parse_json(payload)
            if isinstance(parsed, dict):
                sample.record = parsed
            elif not sample.text:
                sample.problem = sample.problem or ("bad-record", f"{name} is {parsed}")
    except UndecodableText as error:
        sample.problem = sample.problem or ("bad-record", f"{name} is {error}")


def _table(samples: Mapping[str, _Sample], *, told: Mapping[str, int], sidecar: pa.Table | None) -> pa.Table:
    """One row per sample, then the further columns of the sidecar or of the JSON files."""
    rows: list[tuple[Any, ...]] = []
    extras: list[Mapping[str, Value]] = []
    in_sidecar = [told.get(key) for key in samples]
    said = [] if sidecar is None else _said(sidecar, in_sidecar)
    for number, (key, sample) in enumerate(samples.items()):
        record = {**(sample.record or {}), **(said[number] if said else {})}
        if sample.label is not None:
            record = {**record, "label": sample.label}
        fields = read_fields(record) if record else _NO_FIELDS
        captions, _ = clean_captions((sample.text, *fields.captions) if sample.text else fields.captions)
        problem = sample.problem or _lack(sample, has_condition=bool(captions) or fields.label is not None)
        height, width = sample.size or (None, None)
        places = [place for kind in ("image", "text", "cls", "json") for place in sample.places.get(kind, (None, None))]
        status = ("rejected", *problem) if problem else ("success", "", "")
        rows.append(
            (
                None if problem else _stored(key),
                _stored(sample.path),
                status[0],
                status[1],
                _stored(status[2]),
                width,
                height,
                captions[0] if captions else "",
                captions,
                fields.label,
                *places,
            )
        )
        extras.append(fields.extra)
    columns = list(zip(*rows, strict=True)) or [() for _ in SCHEMA]
    table = pa.table([pa.array(values, type=field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    further = _further_of_sidecar(sidecar, in_sidecar) if sidecar is not None else _further_of_records(extras)
    for name, values in further:
        table = table.append_column(name, values)
    return table


def _lack(sample: _Sample, *, has_condition: bool) -> tuple[str, str] | None:
    if sample.size is None:
        return "missing", f"no image beside {sample.path}"
    return None if has_condition else ("no-caption", "neither a caption nor a class")


def _said(sidecar: pa.Table, rows: Sequence[int | None]) -> list[dict[str, Value]]:
    """Captions and class of each sample, as the sidecar has them."""
    columns = [name for name in sidecar.column_names if name in _CAPTIONS or name in ("label", "class")]
    return sidecar.select(columns).take(pa.array(rows, type=pa.int64())).to_pylist() if columns else [{} for _ in rows]


def _further_of_sidecar(sidecar: pa.Table, rows: Sequence[int | None]) -> Iterable[tuple[str, pa.ChunkedArray]]:
    """Its own columns of numbers and texts, null for samples that it does not know."""
    indices = pa.array(rows, type=pa.int64())
    known = {*SCHEMA.names, *RECOMPUTED, *TAKEN, "text", "class"}
    for field in sidecar.schema:
        if field.name not in known and not pa.types.is_nested(field.type):
            known.add(field.name)
            yield field.name, sidecar.column(field.name).take(indices)


def _further_of_records(extras: list[Mapping[str, Value]]) -> Iterable[tuple[str, pa.Array]]:
    names = sorted({name for extra in extras for name in extra} - set(SCHEMA.names))
    for name in names[:_MAX_COLUMNS]:
        values = [extra.get(name) for extra in extras]
        if all(value is None for value in values):
            continue
        if not any(isinstance(value, (list, dict)) for value in values):
            try:
                yield _stored(name), pa.array(values)
                continue
            except (pa.ArrowException, UnicodeError):  # of several kinds, or not to be stored as they are
                pass
        yield _stored(name), pa.array([None if value is None else _stored(value) for value in values], type=pa.string())


def _stored(value: Value) -> str:
    """Any value as text that UTF-8 can hold."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
