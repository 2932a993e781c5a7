"""Every layout that users bring → one iterator of `RawSample`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Protocol

from dataprep.folders import ImageFolder
from dataprep.records import RawSample
from dataprep.tars import Shards

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Source(Protocol):
    """One place that samples come from. `samples()` may be read again and gives the same samples in the same order."""

    name: str

    @property
    def layout(self) -> str: ...

    @property
    def root(self) -> Path | None:
        """The folder, resolved, that a corpus must not be written into."""
        ...

    def digest(self) -> str: ...

    def samples(self) -> Iterator[RawSample]: ...

    def notes(self) -> list[str]: ...


def open_sources(specs: Sequence[str]) -> list[Source]:
    """Open what the user names: a folder, a tar, or a pattern of tars ("x/{000..009}.tar", "x/*.tar"). Raises ValueError, one line each.

    A source is called by its folder (a single tar by its own name); a name that comes up again gets a number.
    """
    if not specs:
        raise ValueError("no source: name at least one image folder or WebDataset shard")
    sources: list[Source] = []
    names: set[str] = set()
    for spec in specs:
        path = Path(spec).expanduser()
        tars = [] if path.is_dir() else _find_tars(spec)
        names_many = _BRACES.search(spec) or is_pattern(spec)
        place = path if path.is_dir() else tars[0].parent if names_many else tars[0].with_suffix("")
        name = base = place.resolve().name or "data"
        number = 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.add(name)
        sources.append(ImageFolder(path, name=name) if path.is_dir() else Shards(tars, name=name))
    return sources


def expand_braces(pattern: str) -> list[str]:
    """ "a{00..02}b{x,y}" → all names in order; a range keeps the width of its bounds, as in a shell. Raises ValueError."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before, inside, after = pattern[: match.start()], match.group(1), pattern[match.end() :]
    span = _RANGE.fullmatch(inside)
    if span is None:
        choices = inside.split(",")
    else:
        low, high = span.groups()
        if int(high) < int(low) or int(high) - int(low) > 1_000_000:
            raise ValueError(f"{pattern}: the range {{{inside}}} has no order or no end in sight")
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    return [before + choice + rest for choice in choices for rest in expand_braces(after)]


def _find_tars(spec: str) -> list[Path]:
    patterns = [str(Path(pattern).expanduser()) for pattern in expand_braces(spec)]
    names = [name for pattern in patterns for name in (sorted(glob(pattern)) if is_pattern(pattern) else [pattern])]
    if not names:
        raise ValueError(f"{spec}: no file matches")
    tars = [Path(name) for name in names]
    for tar in tars:
        if not tar.exists():
            raise ValueError(f"{tar}: no such file or folder")
        if tar.suffix.lower() != ".tar" or not tar.is_file():
            raise ValueError(f"{tar}: not a source that can be read; give an image folder or .tar shards")
    return tars


def is_pattern(spec: str) -> bool:
    """Whether a name has wildcards, and is not itself the name of a file."""
    return has_magic(spec) and not Path(spec).exists()
