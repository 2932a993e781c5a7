"""WebDataset shards as sources: adjacent members of one name are one sample (img2dataset's layout, webdataset's convention)."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataprep.folders import IMAGE_SUFFIXES, MAX_CAPTION_BYTES
from dataprep.records import RawSample, Value, read_fields

_USED = {*(suffix[1:] for suffix in IMAGE_SUFFIXES), "txt", "json", "cls"}


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar. `problem` is the (reason, detail) that makes it unusable, if any."""

    name: str
    key: str
    extension: str
    offset: int
    length: int
    problem: tuple[str, str] | None


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
        image = next((member for member in group if "." + member.extension in IMAGE_SUFFIXES), None)
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
                parsed = _parse(payload)
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
    """All files of a tar. Where it breaks off or cannot be read, a last member says so in its `problem`."""
    end = path.stat().st_size
    position = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                position = tar.offset
                if not info.isdir():
                    yield _member(info, is_cut=position > end, path=path)
                if position > end:
                    return
        # tarfile takes any header that it cannot read, but for the first one, for the end of the archive.
        with open(path, "rb") as stream:
            header = os.pread(stream.fileno(), tarfile.BLOCKSIZE, position)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        where = f"at byte {position}" if position else "not a tar"
        yield _broken(path, reason="bad-record", detail=f"{where}: {' '.join(str(error).split())}")
        return
    if 0 < len(header) < tarfile.BLOCKSIZE:
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace") if len(header) >= 100 else ""
        yield _broken(path, reason="truncated", detail=f"the tar is cut off at byte {end}", name=name)
    elif any(header):
        yield _broken(path, reason="bad-record", detail=f"the header at byte {position} is damaged; what follows it is not read")


def _broken(path: Path, *, reason: str, detail: str, name: str = "") -> Member:
    key, _ = _split(name) if name else (f"broken:{path.name}", "")
    return Member(name=name, key=key, extension="", offset=0, length=0, problem=(reason, f"{path.name}: {detail}"))


def _member(info: tarfile.TarInfo, *, is_cut: bool, path: Path) -> Member:
    problem = None
    if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name or "\0" in info.name:
        problem = ("bad-record", "the member's name leads out of the tar")
    elif not info.isfile() or info.issparse():
        problem = ("bad-record", "the member is a link, a device or a sparse file")
    elif is_cut:  # even if only padding is lost: nobody knows which members the sample would have had
        problem = ("truncated", f"{path.name} is cut off in {info.name}")
    key, extension = _split(info.name)
    return Member(name=info.name, key=key, extension=extension, offset=info.offset_data, length=info.size, problem=problem)


def _split(name: str) -> tuple[str, str]:
    """webdataset's rule: the key goes up to the first dot of the base name, the rest is the extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", extension.lower()


def _read(tar: Path, *, member: Member) -> bytes:
    with open(tar, "rb") as stream:
        return os.pread(stream.fileno(), min(member.length, MAX_CAPTION_BYTES), member.offset)


def _parse(payload: bytes) -> dict[str, Value] | None:
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
