"""`samples.jsonl`: one line for each image of a folder, appended when the image is written.

{"file": "0000-a-red-fox-….png", "evaluations": 16, "format": 1, "prompt": "a red fox", "width": 512, …}
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from launch.sampling.files.settings import Settings
from pipeline.errors import one_line

NAME = "samples.jsonl"
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of a folder. file: its path in the folder; notes: further values, such as the number of network evaluations."""

    file: PurePosixPath
    settings: Settings
    notes: Mapping[str, Any]


def append_sample(folder: Path, sample: Sample) -> None:
    """Append an image to `samples.jsonl` of a folder. Several processes may append at once.

    A line that a killed process left unfinished is removed first.

    Raises:
        OSError: the file cannot be written; names it.
    """
    path = folder / NAME
    row = json.dumps({"file": str(sample.file), **sample.notes, **sample.settings.as_dict()})
    try:
        with open(path, "a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # released when the file is closed
            end = _end_of_lines(stream.fileno())
            os.ftruncate(stream.fileno(), end)
            try:
                _write(stream.fileno(), row.encode() + b"\n")
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), end)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or one_line(error), str(path)) from error


def read_samples(folder: Path) -> dict[PurePosixPath, Sample]:
    """The images in `samples.jsonl` of a folder, by their path in it; the last line of each counts. Empty without the file.

    Raises:
        ValueError: a line is damaged; names the file and the line. An unfinished last line is left out.
    """
    path = folder / NAME
    found: dict[PurePosixPath, Sample] = {}
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return found
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                sample = _sample(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {one_line(error)}; remove the line or the file") from error
            found.pop(sample.file, None)
            found[sample.file] = sample
    return found


def _sample(line: bytes) -> Sample:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("file"), str):
        raise ValueError("not a JSON object with a `file`")
    settings = Settings.from_dict(values)
    known = {"file", "format", *Settings.__dataclass_fields__}
    return Sample(PurePosixPath(values["file"]), settings, {name: value for name, value in values.items() if name not in known})


def _end_of_lines(descriptor: int) -> int:
    """Size of the file up to the end of its last whole line."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        block = os.pread(descriptor, end - start, start)
        if b"\n" in block:
            return start + block.rindex(b"\n") + 1
        end = start
    return 0


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
