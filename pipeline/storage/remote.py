"""Read and write files at URLs through fsspec, over unreliable networks.

fsspec and its file systems take credentials, endpoints and other settings from the environment (AWS_*, HF_TOKEN, FSSPEC_*). Every
attempt has a time limit, short answers count as failures, and attempts are repeated with growing pauses.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pipeline.errors import kind_and_line, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")
Range = tuple[str, int, int | None]  # URL, first byte, byte after the last (None: all that follow)

ATTEMPTS = 6
FIRST_PAUSE = 0.25  # seconds, doubled after every attempt: 8 s of pauses in total
ATTEMPT_SECONDS = 60
_BLOCK = 4 << 20  # bytes per read of an open file
_SMALL = 32 << 20  # bytes; smaller files are read as a whole, which also works without range requests
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)  # not worth repeating


def is_remote(path: object) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. Raises ValueError, naming the package to install, if there is none."""
    from fsspec.core import url_to_fs  # not needed for local corpora, and slow to import

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        remedy = "pip install 'tim[remote]' is enough for s3, gs and https"
        raise ValueError(f"{url} cannot be read: {one_line(error)} ({remedy})") from error


def size_of(url: str) -> int | None:
    """Size of a file in bytes, None if the server does not report it. Raises OSError, including FileNotFoundError."""
    return facts_of(url).get("size")


def facts_of(url: str) -> dict[str, Any]:
    """A server's information about a file: its `size`, and server-specific keys. Raises OSError, including FileNotFoundError."""
    files, name = filesystem(url)
    return _retry(lambda: files.info(name), url=url)


def list_files(url: str) -> dict[str, int | None]:
    """Sizes in bytes of all files below a folder, by relative path; None if the server does not report it. Raises OSError."""
    files, root = filesystem(url)
    entries = _retry(lambda: files.find(root, detail=True), url=url)
    assert isinstance(entries, dict)
    start = len(root.rstrip("/")) + 1
    return {name[start:]: facts.get("size") for name, facts in sorted(entries.items()) if len(name) > start}


def read_file(url: str) -> bytes:
    """Read a small file. Raises OSError, including FileNotFoundError."""
    files, name = filesystem(url)
    data = _retry(lambda: files.cat_file(name), url=url)
    assert isinstance(data, bytes)
    return data


def write_file(url: str, *, source: Path) -> None:
    """Upload a local file and check the size of the copy. Raises OSError."""
    files, name = filesystem(url)
    size = source.stat().st_size

    def upload() -> None:
        files.put_file(str(source), name)
        files.invalidate_cache()
        arrived = files.info(name).get("size")
        if arrived != size:
            raise OSError(f"{arrived} of {size} bytes arrived")

    _retry(upload, url=url, action="written")


def file_sizes(url: str) -> dict[str, int]:
    """Name → size in bytes of the direct children of a URL, {} if there are none. Raises OSError."""
    files, name = filesystem(url)
    files.invalidate_cache()
    try:
        entries = _retry(lambda: files.ls(name, detail=True), url=url)
    except FileNotFoundError:
        return {}
    files.invalidate_cache()  # otherwise later files of other processes are not found
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") or 0
        for entry in entries
        if entry["name"].strip("/") != name.strip("/")
    }


def remove_file(url: str) -> None:
    """Remove a file if it exists. Raises OSError."""
    files, name = filesystem(url)
    with suppress(FileNotFoundError):
        _retry(lambda: files.rm_file(name), url=url, action="removed")


def read_ranges(ranges: Sequence[Range]) -> list[bytes | OSError]:
    """Read byte ranges of files concurrently. Returns bytes or an error for each."""
    results: list[bytes | OSError] = [OSError("not read")] * len(ranges)
    missing = list(range(len(ranges)))
    for _ in _attempts():
        for i, answer in zip(missing, _request([ranges[i] for i in missing]), strict=True):
            url, start, end = ranges[i]
            if isinstance(answer, bytes) and (end is None or len(answer) == end - start):
                results[i] = answer
            elif isinstance(answer, bytes) and end is not None:
                results[i] = OSError(f"{url} returned {len(answer)} of the {end - start} bytes requested from byte {start}")
            elif isinstance(answer, BaseException):
                results[i] = _as_os_error(answer, url=url)
        missing = [i for i in missing if isinstance(results[i], OSError) and not isinstance(results[i], _FINAL)]
        if not missing:
            break
    return results


def open_file(url: str) -> BinaryIO:
    """Open a seekable file for reading; large files are read in blocks. It and its reads raise OSError, including FileNotFoundError."""
    size = size_of(url)
    if size is None or size <= _SMALL:
        return io.BytesIO(read_file(url))
    return io.BufferedReader(_OpenFile(url, size=size), _BLOCK)


class _OpenFile(io.RawIOBase):
    def __init__(self, url: str, *, size: int) -> None:
        self._url = url
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        end = min(self._at + len(view), self._size)
        if end <= self._at:
            return 0
        (data,) = read_ranges([(self._url, self._at, end)])
        if isinstance(data, OSError):
            raise data
        view[: len(data)] = data
        self._at = end
        return len(data)


def _request(ranges: Sequence[Range]) -> list[bytes | BaseException]:
    """One attempt at byte ranges, all of a file system at once."""
    answers: list[bytes | BaseException] = [OSError("not read")] * len(ranges)
    served = [filesystem(url) for url, _, _ in ranges]
    for files in {id(files): files for files, _ in served}.values():
        indices = [i for i, (other, _) in enumerate(served) if other is files]
        starts = [ranges[i][1] or None for i in indices]  # without both ends no range is requested, which every server supports
        ends = [ranges[i][2] for i in indices]
        limit: dict[str, Any] = {"timeout": ATTEMPT_SECONDS} if files.async_impl else {}  # others have their own limits
        try:
            contents = files.cat_ranges([served[i][1] for i in indices], starts, ends, on_error="return", **limit)
        except Exception as error:  # every library raises its own types
            contents = [error] * len(indices)
        for i, answer in zip(indices, contents, strict=True):
            answers[i] = answer
    return answers


def _retry(attempt: Callable[[], Result], *, url: str, action: str = "read") -> Result:
    outcome: Result | OSError = OSError("not tried")
    for _ in _attempts():
        outcome = _outcome(attempt, url=url, action=action)
        if not isinstance(outcome, OSError) or isinstance(outcome, _FINAL):
            break
    if isinstance(outcome, OSError):
        raise outcome
    return outcome


def _outcome(attempt: Callable[[], Result], *, url: str, action: str) -> Result | OSError:
    try:
        return attempt()
    except Exception as error:  # every library raises its own types
        return _as_os_error(error, url=url, action=action)


def _attempts() -> Iterator[int]:
    """Count attempts, with randomised pauses between them, so that many processes do not retry at the same time."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
        yield attempt


def _as_os_error(error: BaseException, *, url: str, action: str = "read") -> OSError:
    kind = type(error) if isinstance(error, _FINAL) else OSError
    return kind(f"{url} cannot be {action}: {kind_and_line(error)}")
