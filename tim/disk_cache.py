"""Results on disk that can be computed again: features of prompts, live views of codecs, digests of large files.

Each result is one safetensors file, named after what it was computed from, with a checksum of its tensors. Files are written to a temporary
name and renamed, so any number of processes may share a folder. What is damaged is computed again. The least recently used files are
removed first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from tim.pretrained import safetensors_files

FORMAT = "1"
LIMIT = 2_000_000_000  # bytes
_OURS = re.compile(r"[a-z-]+-[0-9a-f]{64}\.safetensors(?P<temporary>\.[0-9a-f]{32}\.tmp)?")  # other files are left alone
_CHECKSUM = "checksum"  # name of a tensor in each file
_BLOCK = 4096  # bytes, the least that a file takes on a disk
_SMALL = 1 << 20  # bytes; the digest of a smaller file is not worth a file
_ABANDONED = 3600  # seconds after which a temporary file is of a process that was killed
log = logging.getLogger(__name__)
_warned: set[Path] = set()


def default_folder() -> Path | None:
    """$TIM_CACHE, or `tim/results` in the user's cache folder (XDG). None if the user has no home folder."""
    if chosen := os.environ.get("TIM_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):
        return Path(caches) / "tim" / "results"
    try:
        return Path.home() / ".cache" / "tim" / "results"
    except RuntimeError:
        return None


def key(*parts: str) -> str:
    """sha256 in hexadecimal of all that a result depends on."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()


class DiskCache:
    """At most `limit` bytes of results in a folder, which is made when it is first needed. A name is KIND-KEY, with a key of `key`.

    A folder that cannot be used costs time only: nothing is found in it, and one warning per process says why.
    """

    def __init__(self, folder: str | Path, *, limit: int = LIMIT) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._until_check = 0  # bytes that may be written before the size of the folder is measured again

    @classmethod
    def default(cls) -> DiskCache | None:
        """The cache in the default folder, None if there is no such folder."""
        folder = default_folder()
        return None if folder is None else cls(folder)

    def make_folder(self) -> bool:
        """Make the folder if it is not there. Returns whether there is one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn("made", error)
            return False
        return True

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a result, on the CPU; None if it is not there or damaged."""
        path = self._path(name)
        try:
            tensors = load(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", error)
            return None
        except (SafetensorError, ValueError, KeyError, RuntimeError):
            return None
        checksum = tensors.pop(_CHECKSUM, None)
        if checksum is None or not torch.equal(checksum, _checksum(tensors)):
            return None
        with suppress(OSError):
            os.utime(path)  # most recently used
        return tensors

    def shape(self, name: str, tensor: str) -> tuple[int, ...] | None:
        """The shape of a tensor of a result, from the header of its file; None if it is not there or damaged."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                return tuple(file.get_slice(tensor).get_shape())
        except (OSError, SafetensorError):
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store a result, replacing a damaged one. Not flushed to the disk: the checksum finds what a crash left incomplete."""
        path = self._path(name)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        stored = {each: tensor.detach().to("cpu", copy=True).contiguous() for each, tensor in tensors.items()}
        content = save({**stored, _CHECKSUM: _checksum(stored)})
        if not self.make_folder():
            return
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
            self._until_check -= len(content) + _BLOCK
            if self._until_check < 0:
                self._make_room()
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._warn("written", error)

    def file_digest(self, file: Path) -> str:
        """sha256 of a file in hexadecimal. That of a large file is remembered by its path, size and times. Raises OSError."""
        before = file.stat()
        if before.st_size < _SMALL:
            return safetensors_files.file_digest(file)
        name = f"digest-{_state_of(file)}"
        found = self.read(name)
        if found is not None:
            return bytes(found["sha256"].tolist()).hex()
        digest = safetensors_files.file_digest(file)
        if name == f"digest-{_state_of(file)}":  # not written to meanwhile
            self.write(name, {"sha256": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)})
        return digest

    def _path(self, name: str) -> Path:
        file = f"{name}.safetensors"
        assert _OURS.fullmatch(file), name
        return self.folder / file

    def _make_room(self) -> None:
        """Remove abandoned temporary files, and the least recently used results above 15/16 of the limit; the rest is for new ones."""
        spare = self.limit // 16
        files: list[tuple[float, int, str]] = []
        now = time.time()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                ours = _OURS.fullmatch(entry.name)
                if ours is None:
                    continue
                with suppress(FileNotFoundError):  # another process removes files, too
                    status = entry.stat()
                    if not ours["temporary"]:
                        files.append((status.st_mtime, -(-status.st_size // _BLOCK) * _BLOCK, entry.path))
                    elif now - status.st_mtime > _ABANDONED:
                        os.unlink(entry.path)
        excess = sum(size for _, size, _ in files) - (self.limit - spare)
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size
        self._until_check = spare

    def _warn(self, action: str, error: OSError) -> None:
        if self.folder not in _warned:
            _warned.add(self.folder)
            why = error.strerror or error
            log.warning("cache %s cannot be %s (%s): results are computed again; set TIM_CACHE to another folder", self.folder, action, why)


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """sha256 of names, types, shapes and values: uint8 (32)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _state_of(file: Path) -> str:
    """Key of a file and its present state."""
    status = file.stat()
    return key(str(file.resolve()), str(status.st_size), str(status.st_mtime_ns), str(status.st_ctime_ns))
