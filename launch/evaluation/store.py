"""What an evaluation keeps of its images: features and scores, in chunks, and some of the images.

OUT/evaluation.json                      what was asked for: a folder has one evaluation of one model
OUT/features/real-00000.safetensors      features and scores of 64 real images
OUT/features/steps4-guidance1.25-00000.safetensors      features and scores of 64 generated ones
OUT/images/steps4-guidance1.25/00000.png

A chunk is drawn by one process in one call, so that its numbers depend neither on the number of processes nor on a restart.
OUT/features/lock is held while an evaluation writes there.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.storage.atomic import LOCK, publish, publish_text, remove_temporary_files

FORMAT = 2  # 1: without scores of real images
CHUNK = 64  # images
GRID_ROWS = 8  # images that are always kept, for the grid
REAL = "real"
_IDENTITY = "evaluation.json"
_FEATURES, _SCORES = "features", "score"  # first words of the names of tensors


class Setting(NamedTuple):
    """Number of steps and guidance scale of generated images."""

    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """Different for different settings: of file names."""
        return f"steps{self.steps}-guidance{repr(self.guidance).removesuffix('.0')}"


class Measured(NamedTuple):
    """Features (n, F) by extractor and scores (n,) by name, of n images."""

    features: dict[str, Tensor]
    scores: dict[str, Tensor]


class Store:
    """The folder of an evaluation of `count` generated images per setting. save_images: keep all, not only those of the grid."""

    def __init__(self, folder: Path, *, count: int, save_images: bool) -> None:
        self.folder = folder
        self.count = count
        self._kept = count if save_images else min(count, GRID_ROWS)

    @contextmanager
    def claimed(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Note what the folder is for, on the main process, and lock it.

        Raises ValueError if it has another evaluation, or is a file, and RuntimeError while another process has the lock.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder}: is a file; give a folder")
        path, folders = self.folder / _IDENTITY, [self.folder / name for name in ("features", "images")]
        wanted = {**identity, "format": FORMAT}
        if path.exists():
            found = _read_identity(path)
            differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
            if differing:
                raise ValueError(f"--out {self.folder}: has an evaluation with another {differing[0]}; give another --out")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folders[0], place=f"--out {self.folder}"):
            for folder in folders:
                remove_temporary_files([folder, *folder.glob("*/")])
            publish_text(path, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
            yield

    def has(self, name: str, chunk: int) -> bool:
        """Whether a chunk of a setting, or of the real images, is there with the images that are to be kept."""
        first = chunk * CHUNK
        images = [] if name == REAL else [self.image(name, index) for index in range(first, min(first + CHUNK, self._kept))]
        return self._read(name, chunk) is not None and all(path.is_file() for path in images)

    def write(self, name: str, chunk: int, measured: Measured, *, images: Sequence[Image.Image] = ()) -> None:
        """Keep a chunk. images: those that were drawn for it, of which some are kept. Raises OSError."""
        for index, image in enumerate(images, start=chunk * CHUNK):
            if index < self._kept:
                path = self.image(name, index)
                path.parent.mkdir(exist_ok=True)
                with publish(path) as stream:
                    image.save(stream, format="PNG")
        tensors = {f"{_FEATURES} {key}": value.contiguous() for key, value in measured.features.items()}
        tensors |= {f"{_SCORES} {key}": value.contiguous() for key, value in measured.scores.items()}
        with publish(self._path(name, chunk)) as stream:
            stream.write(save(tensors))

    def read(self, name: str, *, count: int) -> Measured:
        """All chunks of a setting, or of the first `count` real images. Raises ValueError if one is missing."""
        parts = [self._read(name, chunk) for chunk in range(-(-count // CHUNK))]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            raise ValueError(f"{self.folder}: a file of {name} is missing or damaged: run the same command again")
        keys = list(found[0])
        joined = {key: torch.cat([part[key] for part in found])[:count] for key in keys}

        def of_kind(kind: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{kind} "): value for key, value in joined.items() if key.startswith(f"{kind} ")}

        return Measured(of_kind(_FEATURES), of_kind(_SCORES))

    def image(self, name: str, index: int) -> Path:
        """The file of an image that is kept."""
        return self.folder / "images" / name / f"{index:05d}.png"

    def _path(self, name: str, chunk: int) -> Path:
        return self.folder / "features" / f"{name}-{chunk:05d}.safetensors"

    def _read(self, name: str, chunk: int) -> dict[str, Tensor] | None:
        """The tensors of a chunk; None if it is not there, or damaged."""
        try:
            return load(self._path(name, chunk).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): give another --out, or remove the folder") from error
    return found


@contextmanager
def _locked(folder: Path, *, place: str) -> Iterator[None]:
    """Lock a folder; the lock ends with the process. Raises RuntimeError if another process has it."""
    with open(folder / LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{place}: another evaluation is writing there; wait for it, or give another --out") from error
        yield
