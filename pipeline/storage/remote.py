"""Files behind URLs, through fsspec: what it takes to read and write them over a network that fails.

Credentials, endpoints and other settings come from the environment, where fsspec and its file systems look for them (AWS_*, HF_TOKEN,
FSSPEC_*). Every attempt has a time limit, answers that are too short count as failures, and attempts are repeated with growing pauses.
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
FIRST_PAUSE = 0.25  # seconds; doubled by every attempt: 8 s of pauses together
ATTEMPT_SECONDS = 60
_BLOCK = 4 << 20  # bytes that are read at once from an open file
_SMALL = 32 << 20  # bytes of a file that is read as a whole, which servers without ranges allow, too
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)  # asking again does not help


def is_remote(path: object) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system that serves a URL, and the URL's name in it. Raises ValueError, naming what to install, if there is none."""
    from fsspec.core import url_to_fs  # not needed for local corpora, and slow to import

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        remedy = "pip install 'tim[remote]' is enough for s3, gs and https"
        raise ValueError(f"{url} cannot be read: {one_line(error)} ({remedy})") from error


def size_of(url: str) -> int | None:
    """Bytes of a file, None where its server does not say. Raises OSError, FileNotFoundError among them."""
    return facts_of(url).get("size")


def facts_of(url: str) -> dict[str, Any]:
    """What a server says of a file: its `size`, and more by names of its own. Raises OSError, FileNotFoundError among them."""
    files, name = filesystem(url)
    return _repeated(lambda: files.info(name), url=url)


def list_files(url: str) -> dict[str, int | None]:
    """All files below a folder, by their names in it: their bytes, None where the server does not say. Raises OSError."""
    files, root = filesystem(url)
    found = _repeated(lambda: files.find(root, detail=True), url=url)
    assert isinstance(found, dict)
    start = len(root.rstrip("/")) + 1
    return {name[start:]: facts.get("size") for name, facts in sorted(found.items()) if len(name) > start}


def read_file(url: str) -> bytes:
    """All of a small file. Raises OSError, FileNotFoundError among them."""
    files, name = filesystem(url)
    data = _repeated(lambda: files.cat_file(name), url=url)
    assert isinstance(data, bytes)
    return data


def write_file(url: str, *, source: Path) -> None:
    """Upload a local file, and look that it has arrived in full length. Raises OSError."""
    files, name = filesystem(url)
    size = source.stat().st_size

    def upload() -> None:
        files.put_file(str(source), name)
        files.invalidate_cache()
        found = files.info(name).get("size")
        if found != size:
            raise OSError(f"{found} of {size} bytes arrived")

    _repeated(upload, url=url, what="written")


def file_sizes(url: str) -> dict[str, int]:
    """Name → bytes of what lies directly below a URL, {} if nothing does. Raises OSError."""
    files, name = filesystem(url)
    files.invalidate_cache()
    try:
        found = _repeated(lambda: files.ls(name, detail=True), url=url)
    except FileNotFoundError:
        return {}
    files.invalidate_cache()  # else what other processes write meanwhile is not found
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") or 0
        for entry in found
        if entry["name"].strip("/") != name.strip("/")
    }


def remove_file(url: str) -> None:
    """Remove a file, if it is there. Raises OSError."""
    files, name = filesystem(url)
    with suppress(FileNotFoundError):
        _repeated(lambda: files.rm_file(name), url=url, what="removed")


def read_ranges(ranges: Sequence[Range]) -> list[bytes | OSError]:
    """Parts of files, asked for all at once: for each its bytes, or why it could not be had."""
    results: list[bytes | OSError] = [OSError("not read")] * len(ranges)
    missing = list(range(len(ranges)))
    for _ in _attempts():
        for i, found in zip(missing, _ask([ranges[i] for i in missing]), strict=True):
            url, start, end = ranges[i]
            if isinstance(found, bytes) and (end is None or len(found) == end - start):
                results[i] = found
            elif isinstance(found, bytes) and end is not None:
                results[i] = OSError(f"{url} gave {len(found)} bytes where {end - start} from byte {start} on were asked for")
            elif isinstance(found, BaseException):
                results[i] = _as_os_error(found, url=url)
        missing = [i for i in missing if isinstance(results[i], OSError) and not isinstance(results[i], _FINAL)]
        if not missing:
            break
    return results


def open_file(url: str) -> BinaryIO:
    """A file to read from and to seek in; large ones come in blocks. Raises OSError, FileNotFoundError among them, as its reads do."""
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
        (found,) = read_ranges([(self._url, self._at, end)])
        if isinstance(found, OSError):
            raise found
        view[: len(found)] = found
        self._at = end
        return len(found)


def _ask(ranges: Sequence[Range]) -> list[bytes | BaseException]:
    """One attempt at ranges of files, those of one file system at once."""
    answers: list[bytes | BaseException] = [OSError("not read")] * len(ranges)
    served = [filesystem(url) for url, _, _ in ranges]
    for files in {id(files): files for files, _ in served}.values():
        mine = [i for i, (other, _) in enumerate(served) if other is files]
        starts = [ranges[i][1] or None for i in mine]  # without both ends no range is asked for, which every server understands
        ends = [ranges[i][2] for i in mine]
        limit: dict[str, Any] = {"timeout": ATTEMPT_SECONDS} if files.async_impl else {}  # others have limits of their own
        try:
            found = files.cat_ranges([served[i][1] for i in mine], starts, ends, on_error="return", **limit)
        except Exception as error:  # each library raises its own
            found = [error] * len(mine)
        for i, answer in zip(mine, found, strict=True):
            answers[i] = answer
    return answers


def _repeated(attempt: Callable[[], Result], *, url: str, what: str = "read") -> Result:
    found: Result | OSError = OSError("not tried")
    for _ in _attempts():
        found = _outcome(attempt, url=url, what=what)
        if not isinstance(found, OSError) or isinstance(found, _FINAL):
            break
    if isinstance(found, OSError):
        raise found
    return found


def _outcome(attempt: Callable[[], Result], *, url: str, what: str) -> Result | OSError:
    try:
        return attempt()
    except Exception as error:  # each library raises its own
        return _as_os_error(error, url=url, what=what)


def _attempts() -> Iterator[int]:
    """Count attempts, with pauses between them that many processes do not make in step."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
        yield attempt


def _as_os_error(error: BaseException, *, url: str, what: str = "read") -> OSError:
    kind = type(error) if isinstance(error, _FINAL) else OSError
    return kind(f"{url} cannot be {what}: {kind_and_line(error)}")
