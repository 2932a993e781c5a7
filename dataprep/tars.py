"""WebDataset shards as sources: adjacent members of one name are one sample (img2dataset's layout, webdataset's convention)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataprep.records import RawSample
from pipeline.captions import MAX_TEXT_BYTES
from pipeline.fields import IMAGE_EXTENSIONS, Value, parse_json, read_fields
from pipeline.tar import BlockReader, Member, broken, members

_USED = {*IMAGE_EXTENSIONS, "txt", "json", "cls"}


class Shards:
    """A list of tars, read in the given order. What cannot be read becomes a rejected sample; no tar ends the run."""

    layout = "webdataset"

    def __init__(self, paths: Sequence[Path], *, name: str) -> None:
        self.paths = tuple(paths)
        self.root = None
        self.name = name
        self._empty: list[str] = []
        self._other: set[str] = set()

    def digest(self) -> str:
        """Names and sizes of the tars."""
        listing = "".join(f"{path.name}\0{path.stat().st_size}\n" for path in self.paths)
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All samples of all tars, in the order of their members."""
        self._empty.clear()
        self._other.clear()
        for path in self.paths:
            group: list[Member] = []
            count = 0
            for member in _members(path):
                if member.extension not in _USED and member.problem is None:
                    self._other.add(member.extension)
                    continue
                ends_group = group and (member.key != group[0].key or any(member.extension == other.extension for other in group))
                if ends_group:
                    yield self._sample(group, tar=path)
                    group = []
                group.append(member)
                count += 1
            if group:
                yield self._sample(group, tar=path)
            if not count:
                self._empty.append(path.name)

    def notes(self) -> list[str]:
        """What lies in the tars and is no input, in sentences. Complete once `samples()` has been read to its end."""
        notes = [f"{self.name}: {name} holds no samples" for name in self._empty]
        if self._other:
            notes.append(f"{self.name}: members with other extensions were left out ({', '.join(sorted(self._other))})")
        return notes

    def _sample(self, group: list[Member], *, tar: Path) -> RawSample:
        image = next((member for member in group if member.extension in IMAGE_EXTENSIONS), None)
        named = image or group[0]
        path = f"{tar.name}/{named.name}" if named.name else tar.name
        problem = next((member.problem for member in group if member.problem), None)
        if problem:
            return RawSample(source=self.name, path=path, reason=problem[0], detail=problem[1])

        record: dict[str, Value] = {}
        captions: tuple[str, ...] = ()
        for member in group:
            if member is image:
                continue
            payload = _read(tar, member=member)
            if member.extension == "txt":
                captions = (payload.decode("utf-8-sig", "replace"),)
            elif member.extension == "cls":
                record = {**record, "label": payload.decode("ascii", "replace").strip()}
            elif member.extension == "json":
                parsed = parse_json(payload)
                if parsed is None:
                    return RawSample(source=self.name, path=path, reason="bad-record", detail=f"{member.name} is not a JSON object")
                record = {**parsed, **record}
        fields = read_fields(record)
        return RawSample(
            source=self.name,
            path=path,
            file=str(tar),
            offset=image.offset if image else 0,
            length=image.length if image else 0,
            captions=captions + fields.captions,
            label=fields.label,
            extra=fields.extra,
            reason="" if image else "missing",
            detail="" if image else f"no image beside {named.name}",
        )


def _members(path: Path) -> Iterator[Member]:
    try:
        with open(path, "rb") as stream:
            descriptor = stream.fileno()
            file = BlockReader(lambda offset, length: os.pread(descriptor, length, offset), size=path.stat().st_size)
            yield from members(file, tar=path.name)
    except OSError as error:
        yield broken(path.name, reason="bad-record", detail=f"cannot be read: {error.strerror}")


def _read(tar: Path, *, member: Member) -> bytes:
    with open(tar, "rb") as stream:
        return os.pread(stream.fileno(), min(member.length, MAX_TEXT_BYTES), member.offset)
