"""Files behind URLs, through fsspec: what it takes to read them over a network that fails.

Credentials, endpoints and other settings come from the environment, where fsspec and its file systems look for them (AWS_*, HF_TOKEN,
FSSPEC_*). Every attempt has a time limit, answers that are too short count as failures, and attempts are repeated with growing pauses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")
Range = tuple[str, int, int]  # URL, first byte, byte after the last

ATTEMPTS = 6
FIRST_PAUSE = 0.25  # seconds; doubled by every attempt: 8 s of pauses together
ATTEMPT_SECONDS = 60
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
    files, name = filesystem(url)
    return _repeated(lambda: files.info(name), url=url).get("size")


def read_file(url: str) -> bytes:
    """All of a small file. Raises OSError, FileNotFoundError among them."""
    files, name = filesystem(url)
    data = _repeated(lambda: files.cat_file(name), url=url)
    assert isinstance(data, bytes)
    return data


def read_ranges(ranges: Sequence[Range]) -> list[bytes | OSError]:
    """Parts of files, asked for all at once: for each its bytes, or why it could not be had."""
    results: list[bytes | OSError] = [OSError("not read")] * len(ranges)
    missing = list(range(len(ranges)))
    for _ in _attempts():
        for i, found in zip(missing, _ask([ranges[i] for i in missing]), strict=True):
            url, start, end = ranges[i]
            if isinstance(found, bytes) and len(found) == end - start:
                results[i] = found
            elif isinstance(found, bytes):
                results[i] = OSError(f"{url} gave {len(found)} bytes where {end - start} from byte {start} on were asked for")
            else:
                results[i] = _as_os_error(found, url=url)
        missing = [i for i in missing if isinstance(results[i], OSError) and not isinstance(results[i], _FINAL)]
        if not missing:
            break
    return results


def _ask(ranges: Sequence[Range]) -> list[bytes | BaseException]:
    """One attempt at ranges of files, those of one file system at once."""
    answers: list[bytes | BaseException] = [OSError("not read")] * len(ranges)
    served = [filesystem(url) for url, _, _ in ranges]
    for files in {id(files): files for files, _ in served}.values():
        mine = [i for i, (other, _) in enumerate(served) if other is files]
        starts, ends = ([ranges[i][which] for i in mine] for which in (1, 2))
        limit: dict[str, Any] = {"timeout": ATTEMPT_SECONDS} if files.async_impl else {}  # others have limits of their own
        try:
            found = files.cat_ranges([served[i][1] for i in mine], starts, ends, on_error="return", **limit)
        except Exception as error:  # each library raises its own
            found = [error] * len(mine)
        for i, answer in zip(mine, found, strict=True):
            answers[i] = answer
    return answers


def _repeated(attempt: Callable[[], Result], *, url: str) -> Result:
    found: Result | OSError = OSError("not read")
    for _ in _attempts():
        found = _outcome(attempt, url=url)
        if not isinstance(found, OSError) or isinstance(found, _FINAL):
            break
    if isinstance(found, OSError):
        raise found
    return found


def _outcome(attempt: Callable[[], Result], *, url: str) -> Result | OSError:
    try:
        return attempt()
    except Exception as error:  # each library raises its own
        return _as_os_error(error, url=url)


def _attempts() -> Iterator[int]:
    """Count attempts, with pauses between them that many processes do not make in step."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
        yield attempt


def _as_os_error(error: BaseException, *, url: str) -> OSError:
    kind = type(error) if isinstance(error, _FINAL) else OSError
    return kind(f"{url} cannot be read: {type(error).__name__}: {one_line(error)}")
