"""Local and remote files and folders to read, and patterns that name many of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from glob import escape, glob, has_magic
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from dataprep.sources.files.file_listing import Listing
from dataprep.sources.files.walk import Walk, is_hidden, is_hidden_image
from pipeline.corpus.captions import MAX_TEXT_BYTES
from pipeline.storage import remote
from pipeline.storage.remote import is_remote

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_RANGE = 1_000_000
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "blob_id", "lfs")  # names of a file's version or digest on servers
_TEXTS_AT_ONCE = 64


def expand_braces(pattern: str) -> list[str]:
    """ "a{00..02}b{x,y}" → all names in order, as bash expands them. Raises ValueError for a range that descends or is too long."""
    if _BRACES.search(pattern) is None:
        return [pattern]
    for low, high in _RANGE.findall(pattern):
        if not 0 <= int(high) - int(low) <= _MAX_RANGE:
            raise ValueError(f"{pattern}: the range {{{low}..{high}}} must ascend and have at most {_MAX_RANGE:,} numbers")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:  # braceexpand.UnbalancedBracesError, which its type stubs lack
        raise ValueError(f"{pattern}: its braces are not balanced") from error


def is_pattern(spec: str) -> bool:
    """Whether a name has wildcards and is not the name of an existing file."""
    return has_magic(spec) and not Path(spec).exists()


def names_many(spec: str) -> bool:
    """Whether a name stands for several files, by braces or wildcards. The name of an existing file does not."""
    if is_remote(spec):
        return bool(_BRACES.search(spec))
    return not os.path.exists(os.path.expanduser(spec)) and bool(_BRACES.search(spec) or has_magic(spec))


def named_files(spec: str) -> list[str]:
    """Expand the braces of a path or URL, and the wildcards of a path. Names without wildcards need not exist.

    The name of an existing file or folder, and an existing folder at the start of a path, are taken literally.
    """
    if is_remote(spec):
        return expand_braces(spec)
    path = os.path.expanduser(spec)
    if os.path.exists(path):
        return [path]
    folder = _existing_folder(path)
    found: list[str] = []
    for name in expand_braces(path[len(folder) :]):
        inner = _existing_folder(folder + name)
        is_literal = os.path.exists(folder + name) or not has_magic(name)
        found += [folder + name] if is_literal else sorted(glob(escape(inner) + (folder + name)[len(inner) :]))
    return found


def _existing_folder(path: str) -> str:
    """The longest existing folder at the start of a path, with its slash; "" if there is none."""
    end = len(path)
    while (end := path.rfind("/", 0, end)) >= 0:
        if os.path.isdir(path[: end + 1]):
            return path[: end + 1]
    return ""


def expand(spec: str) -> list[str]:
    """As `named_files`, but raises ValueError if a local file does not exist."""
    found = named_files(spec)
    if not found:
        raise ValueError(f"{spec}: no file matches")
    missing = next((file for file in found if not is_remote(file) and not os.path.exists(file)), None)
    if missing:
        raise ValueError(f"{missing}: no such file or folder")
    return found


def join(folder: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def list_files(folder: str) -> Listing:
    """List all visible files below a folder. Linked folders are followed once. Raises OSError."""
    if is_remote(folder):
        found = remote.list_files(folder)
        hidden = sum(is_hidden_image(base_name(name)) for name in found if is_hidden(base_name(name)))
        listing = Listing.of_files({name: size for name, size in found.items() if not any(map(is_hidden, name.split("/")))})
        listing.notes = (f"{hidden} hidden image(s) were left out",) if hidden else ()
        return listing
    walk = Walk(folder)
    listing = Listing(walk.folders())
    listing.notes = tuple(walk.notes())
    return listing


def open_file(file: str) -> BinaryIO:
    """Open a file at a path or URL, seekable. Raises OSError."""
    return remote.open_file(file) if is_remote(file) else open(file, "rb")


def read_texts(files: Iterator[str | None]) -> Iterator[bytes | OSError | None]:
    """The first megabyte of small files, or the error; None for None. URLs are read in parallel."""
    while group := list(islice(files, _TEXTS_AT_ONCE)):
        urls = [file for file in group if file and is_remote(file)]
        answers = dict(zip(urls, remote.read_ranges([(url, 0, None) for url in urls]), strict=True)) if urls else {}
        yield from (answers[file] if file in answers else _read_head(file) if file else None for file in group)


def facts(files: Sequence[str]) -> str:
    """Digest of the names and sizes of files and, for URLs, of their versions on the server. Raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        found = remote.facts_of(file) if is_remote(file) else {"size": os.path.getsize(file)}
        version = [str(found[name]) for name in _VERSIONS if found.get(name)][:1]
        digest.update("\0".join([base_name(file), str(found.get("size")), *version, "\n"]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def is_unreachable(file: str, error: Exception) -> bool:
    """Whether an error comes from the network or the server, not from the file."""
    return is_remote(file) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def base_name(file: str) -> str:
    """The last part of a path or URL."""
    return file.rstrip("/").rpartition("/")[2]


def _read_head(file: str) -> bytes | OSError:
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_TEXT_BYTES)
    except OSError as error:
        return error
