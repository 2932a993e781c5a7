"""What an evaluation keeps of its images: features and scores, in chunks, and some of the images.

OUT/evaluation.json                      what was asked for: a folder has one evaluation of one model
OUT/features/real-00000.safetensors      features of 64 real images
OUT/features/steps4-guidance1.25-00000.safetensors      features and scores of 64 generated ones
OUT/images/steps4-guidance1.25/00000.png

A chunk is drawn by one process in one call, so that its numbers depend neither on the number of processes nor on a restart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.storage.atomic import publish, publish_text, remove_temporary_files

FORMAT = 1
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
        return f"steps{self.steps}-guidance{self.guidance:g}"


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

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Note what the folder is for, on the main process. Raises ValueError if it has another evaluation, or is a file."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder}: is a file; give a folder")
        path = self.folder / _IDENTITY
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): give another --out, or remove the folder") from error
            differing = [name for name in {**identity, **found} if found.get(name) != identity.get(name)]
            if differing:
                raise ValueError(f"--out {self.folder}: has an evaluation with another {differing[0]}; give another --out")
        for name in ("features", "images"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            remove_temporary_files([self.folder / name, *(self.folder / name).glob("*/")])
        publish_text(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")

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
