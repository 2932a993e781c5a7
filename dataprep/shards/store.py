"""Storage of a corpus: a folder, or a URL of any file system that fsspec supports (s3://bucket/corpus)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.atomic import TEMPORARY_SUFFIX, WORK, publish
from pipeline.storage.remote import file_sizes, filesystem, is_remote, read_file, remove_file, write_file


def open_store(out: str | Path, *, work: str | Path | None) -> tuple[Store, Path]:
    """The store at `out`, and the folder for unfinished work. Raises ValueError if `out` cannot be written to."""
    if not is_remote(out):
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{out}: is a file; give a folder")
        own = Path(work) if work else folder / WORK
        return Store(str(folder), scratch=own), own
    url = str(out).rstrip("/")
    if url.startswith(("http://", "https://")):
        raise ValueError(f"{url}: nothing can be written over HTTP; give a folder, or a URL such as s3://bucket/corpus")
    filesystem(url)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode('utf-8')).hexdigest()[:12]}"
    own = Path(work) if work else cache / "tim" / "prepare" / name
    return Store(url, scratch=own), own


@dataclass(frozen=True, slots=True)
class Store:
    """The files of a corpus at `location`. For a URL, they are written to the folder `scratch`, uploaded, and checked there."""

    location: str
    scratch: Path

    @property
    def is_remote(self) -> bool:
        return is_remote(self.location)

    @contextmanager
    def publish(self, name: str) -> Iterator[BinaryIO]:
        """Write to the stream. The file appears when the block ends without an error, else not at all. Raises OSError."""
        if not self.is_remote:
            with publish(Path(self.location, name)) as stream:
                yield stream
            return
        local = self.scratch / f"upload-{name}{TEMPORARY_SUFFIX}"
        try:
            with publish(local) as stream:
                yield stream
            write_file(f"{self.location}/{name}", source=local)
        finally:
            local.unlink(missing_ok=True)

    def publish_text(self, name: str, text: str) -> None:
        with self.publish(name) as stream:
            stream.write(text.encode("utf-8"))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises OSError, such as FileNotFoundError."""
        return read_file(f"{self.location}/{name}") if self.is_remote else Path(self.location, name).read_bytes()

    def sizes(self) -> dict[str, int]:
        """Name → bytes of all files, without unfinished work; {} if the location does not exist. Folders have 0 bytes."""
        if self.is_remote:
            return file_sizes(self.location)
        folder = Path(self.location)
        entries = list(folder.iterdir()) if folder.is_dir() else []
        return {path.name: path.stat().st_size if path.is_file() else 0 for path in entries if path.name != WORK}

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.is_remote:
            remove_file(f"{self.location}/{name}")
        else:
            Path(self.location, name).unlink(missing_ok=True)
