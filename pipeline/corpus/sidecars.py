"""Sidecar tables: columns and captions added to a finished corpus (`tim score`, `tim annotate`).

`000000.NAME.parquet` has a row for every kept row of `000000.parquet`, in the same order: `key` and the new columns. New captions also have
`000000.NAME.jsonl`, a line {"captions": […]} per sample, which training reads by offset instead of the tar's texts. `sidecars.json`,
written last, lists the sidecars in the order of creation: if two have the same column, the later one is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage.remote import is_remote, read_file

FORMAT = 1
SIDECARS = "sidecars.json"
TAKEDOWN = "takedown"  # a boolean column: marked samples are never planned
TEXT_COLUMNS = ("caption", "captions", "text_offset", "text_length", "json_offset", "json_length")


@dataclass(frozen=True, slots=True)
class SidecarShard:
    """One shard's sidecar table: name and sha256, `of`: sha256 of the shard's own table, and the file of captions."""

    table: str
    sha256: str
    of: str
    texts: str = ""
    texts_bytes: int = 0
    texts_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The sidecar tables of one name, by the name of the shard's own table, and their columns besides `key`."""

    name: str
    columns: tuple[str, ...]
    shards: Mapping[str, SidecarShard]

    @property
    def digest(self) -> str:
        """Digest of all its tables."""
        return hashlib.sha256(json.dumps([[name, shard.sha256] for name, shard in self.shards.items()]).encode()).hexdigest()

    def of(self, table: str, *, digest: str, folder: str) -> SidecarShard:
        """The entry of the shard with this table. Raises ValueError if there is none, or if it was made for another table."""
        shard = self.shards.get(table)
        if shard is None or shard.of != digest:
            problem = "has nothing for" if shard is None else "was made for another"
            raise ValueError(f"corpus {folder}: its sidecar '{self.name}' {problem} {table}: run the command that made the sidecar again")
        return shard


def read_sidecars(folder: str) -> tuple[Sidecar, ...]:
    """All sidecars of a corpus, in the order of creation. Raises ValueError, in one line, if their list is damaged."""
    file = os.path.join(folder, SIDECARS)
    try:
        text = read_file(file) if is_remote(file) else Path(file).read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}): is the storage alive?") from error
    try:
        listed = json.loads(text)
        if listed["format"] != FORMAT:
            raise ValueError(f"it has format {listed['format']!r}, this version of tim reads format {FORMAT}")
        return tuple(_sidecar(entry) for entry in listed["sidecars"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and run the commands that made the sidecars again") from error


def provider(sidecars: Sequence[Sidecar], column: str) -> Sidecar | None:
    """The sidecar with a column, None if the column is the corpus's own."""
    return next((sidecar for sidecar in reversed(sidecars) if column in sidecar.columns), None)


def _sidecar(entry: dict[str, Any]) -> Sidecar:
    shards = {of: SidecarShard(**shard) for of, shard in entry["shards"].items()}
    for shard in shards.values():
        if any("/" in name or name in (".", "..") for name in (shard.table, shard.texts)):
            raise ValueError(f"it names {shard.table!r}, which is outside the folder")
    return Sidecar(name=entry["name"], columns=tuple(entry["columns"]), shards=shards)
