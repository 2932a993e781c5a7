"""Index a tar written by another tool, in the columns of a prepared corpus. The tar is not modified or copied.

Members with the same key form one sample, in any order (`pipeline.corpus.tar_samples`): an image, a text, `.json` (img2dataset's names)
and `.cls`. An unusable sample becomes a rejected row with its reason. One pass over the tar reads texts and the first bytes of images.
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
from pipeline.images.masks import fits
from pipeline.storage.tar import BlockReader, Member, members

_MEMBERS = [f"{member}_{field}" for member in ("image", "text", "cls", "json") for field in ("offset", "length")]
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
_MASK_SCHEMA = pa.schema([(f"mask_{field}", pa.int64()) for field in ("offset", "length")])  # of tables with masks
_CAPTIONS = {"caption", "captions", "text"}
_NO_FIELDS = read_fields({})
_MAX_COLUMNS = 256  # extra columns from JSON files


@dataclass(frozen=True, slots=True)
class ForeignShard:
    """The table of a tar, one row per sample, `key` null if rejected; and the number of left-out members by extension.

    `has_dotted`: whether names with several dots were left out or matched by their last part.
    """

    table: pa.Table
    left_out: Mapping[str, int]
    has_dotted: bool = False


class _Content(NamedTuple):
    """Content of a member: the size of an image or the payload of a text, or the problem with it."""

    size: Size | None = None
    payload: bytes = b""
    problem: tuple[str, str] | None = None


class _Sample:
    """The combined content of the members of one key."""

    __slots__ = ("label", "locations", "path", "problem", "record", "size", "text")

    def __init__(self, path: str, *, problem: tuple[str, str] | None = None) -> None:
        self.path = path
        self.locations: dict[str, tuple[int, int]] = {}
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
        tar: its name in problem messages.
        sidecar: img2dataset's table of the tar, with a column `key`: provides extra columns, and captions if it has them; then texts are
            not read.
        crashed: offsets of images that crash the decoder.
        on_risk: called with the offset of an image before Pillow reads its size.

    Raises OSError if the file cannot be read.
    """
    sidecar_rows = {} if sidecar is None else {key: row for row, key in enumerate(sidecar.column("key").to_pylist())}
    has_captions = sidecar is not None and not _CAPTIONS.isdisjoint(sidecar.column_names)
    contents: dict[int, _Content] = {}

    def read_members() -> Iterator[Member]:
        """All members. Reads their contents in passing."""
        for member in members(file, tar=tar):
            if not is_used(member) or member.problem:
                pass
            elif kind_of(member) == "image":
                contents[member.offset] = _measure(member, file=file, crashed=crashed, on_risk=on_risk)
            elif kind_of(member) == "cls" or not (has_captions and key_of(member) in sidecar_rows):
                contents[member.offset] = _Content(payload=file.at(member.offset, min(member.length, MAX_TEXT_BYTES)))
            yield member

    groups = TarSamples(read_members(), tar=tar)
    samples = {group.key: _read(group, contents=contents, groups=groups, tar=tar) for group in groups}
    table = _table(samples, sidecar_rows=sidecar_rows, sidecar=sidecar)
    return ForeignShard(table=table, left_out=groups.left_out.counts(), has_dotted=groups.has_dotted)


def unreadable(tar: str, *, reason: str, detail: str) -> ForeignShard:
    """The result for an unreadable tar: one rejected row with its name."""
    return ForeignShard(table=_table({tar: _Sample(tar, problem=(reason, detail))}, sidecar_rows={}, sidecar=None), left_out={})


def _measure(member: Member, *, file: BlockReader, crashed: Collection[int], on_risk: Callable[[int], None]) -> _Content:
    offset, length = member.offset, member.length

    def peek(start: int, count: int) -> bytes:
        return file.at(offset + start, min(count, length - start)) if start < length else b""

    if offset in crashed:
        return _Content(problem=("crashed", "its header crashes the decoder"))
    try:
        size = quick_size(peek, length=length)
        if size is None:
            on_risk(offset)
            size = careful_size(peek, length=length)
    except Rejection as rejection:
        return _Content(problem=(rejection.reason, rejection.detail))
    return _Content(size=size)


def _read(group: TarSample, *, contents: dict[int, _Content], groups: TarSamples, tar: str) -> _Sample:
    """Combine the contents of a sample's members. Only the preferred text is used, further texts are left out."""
    sample = _Sample(group.name or tar, problem=group.problem)
    groups.leave_out(group.texts[1:])
    if group.problem:
        return sample
    text = group.texts[0] if group.texts else None
    for kind, member in (("image", group.image), ("text", text), ("cls", group.cls), ("json", group.json)):
        if member is None:
            continue
        sample.locations[kind] = (member.offset, member.length)
        content = contents.pop(member.offset, None)
        if content is None:  # the captions come from img2dataset's table
            continue
        sample.size = content.size or sample.size
        sample.problem = sample.problem or content.problem
        if kind != "image":
            _read_payload(sample, kind, content.payload, name=member.name)
        if kind == "json" and sample.record is None and sample.problem is None:  # an unusable JSON file, not needed with a text
            del sample.locations[kind]
            groups.leave_out([member])
    if group.mask is not None:
        _read_mask(sample, group.mask, content=contents.pop(group.mask.offset, _Content()))
    return sample


def _read_mask(sample: _Sample, mask: Member, *, content: _Content) -> None:
    """Add the loss mask, of which only the header is read. A mask that cannot be used makes its sample unusable."""
    sample.locations["mask"] = (mask.offset, mask.length)
    problem = content.problem and f"{content.problem[0]}: {content.problem[1]}"
    if content.size and sample.size and not fits(content.size, sample.size):
        height, width = sample.size
        problem = f"is {content.size[1]}x{content.size[0]} pixels, its image {width}x{height}: they need the same aspect ratio"
    if problem:
        sample.problem = sample.problem or ("bad-record", f"its mask {mask.name} {problem}")


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


def _table(samples: Mapping[str, _Sample], *, sidecar_rows: Mapping[str, int], sidecar: pa.Table | None) -> pa.Table:
    """One row per sample, then the extra columns of the sidecar or of the JSON files."""
    rows: list[tuple[Any, ...]] = []
    extras: list[Mapping[str, Value]] = []
    in_sidecar = [sidecar_rows.get(key) for key in samples]
    sidecar_records = [] if sidecar is None else _sidecar_records(sidecar, in_sidecar)
    for number, (key, sample) in enumerate(samples.items()):
        record = {**(sample.record or {}), **(sidecar_records[number] if sidecar_records else {})}
        if sample.label is not None:
            record = {**record, "label": sample.label}
        fields = read_fields(record) if record else _NO_FIELDS
        captions, _ = clean_captions((sample.text, *fields.captions) if sample.text else fields.captions)
        problem = sample.problem or _missing_part(sample, has_condition=bool(captions) or fields.label is not None)
        height, width = sample.size or (None, None)
        members = [value for kind in ("image", "text", "cls", "json") for value in sample.locations.get(kind, (None, None))]
        status = ("rejected", *problem) if problem else ("success", "", "")
        rows.append(
            (
                None if problem else _to_text(key),
                _to_text(sample.path),
                status[0],
                status[1],
                _to_text(status[2]),
                width,
                height,
                captions[0] if captions else "",
                captions,
                fields.label,
                *members,
            )
        )
        extras.append(fields.extra)
    columns = list(zip(*rows, strict=True)) or [() for _ in SCHEMA]
    table = pa.table([pa.array(values, type=field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    if any("mask" in sample.locations for sample in samples.values()):
        places = [sample.locations.get("mask", (None, None)) for sample in samples.values()]
        for number, field in enumerate(_MASK_SCHEMA):
            table = table.append_column(field, pa.array([place[number] for place in places], type=field.type))
    extra_columns = _sidecar_columns(sidecar, in_sidecar) if sidecar is not None else _record_columns(extras)
    for name, values in extra_columns:
        table = table.append_column(name, values)
    return table


def _missing_part(sample: _Sample, *, has_condition: bool) -> tuple[str, str] | None:
    if sample.size is None:
        return "missing", f"no image beside {sample.path}"
    return None if has_condition else ("no-caption", "neither a caption nor a class")


def _sidecar_records(sidecar: pa.Table, rows: Sequence[int | None]) -> list[dict[str, Value]]:
    """Captions and class of each sample in the sidecar."""
    columns = [name for name in sidecar.column_names if name in _CAPTIONS or name in ("label", "class")]
    return sidecar.select(columns).take(pa.array(rows, type=pa.int64())).to_pylist() if columns else [{} for _ in rows]


def _sidecar_columns(sidecar: pa.Table, rows: Sequence[int | None]) -> Iterable[tuple[str, pa.ChunkedArray]]:
    """The sidecar's extra columns of numbers and texts, null for samples that it lacks."""
    indices = pa.array(rows, type=pa.int64())
    known = {*SCHEMA.names, *RECOMPUTED, *TAKEN, "text", "class"}
    for field in sidecar.schema:
        if field.name not in known and not pa.types.is_nested(field.type):
            known.add(field.name)
            yield field.name, sidecar.column(field.name).take(indices)


def _record_columns(extras: list[Mapping[str, Value]]) -> Iterable[tuple[str, pa.Array]]:
    names = sorted({name for extra in extras for name in extra} - set(SCHEMA.names))
    for name in names[:_MAX_COLUMNS]:
        values = [extra.get(name) for extra in extras]
        if all(value is None for value in values):
            continue
        if not any(isinstance(value, (list, dict)) for value in values):
            try:
                yield _to_text(name), pa.array(values)
                continue
            except (pa.ArrowException, UnicodeError):  # mixed types, or not storable directly
                pass
        yield _to_text(name), pa.array([None if value is None else _to_text(value) for value in values], type=pa.string())


def _to_text(value: Value) -> str:
    """Any value as valid UTF-8 text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
