"""Fragments of parameters: float32 tensors sharded over ranks, on disk and in memory.

Each rank writes one safetensors file with its fragments; together the files hold the full tensors. They can be read without DeepSpeed and
by any number of ranks with any sharding. Used for weights, their moving average and the optimizer's moments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tim.pretrained.safetensors_files import LazyTensors, write_file

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements start … start + len(values) of a flattened parameter, in float32 (8-bit moments: see `launch.engine.eight_bit`)."""

    start: int
    values: Tensor


def save(path: Path, fragments: Mapping[str, Fragment], *, shapes: Shapes) -> dict[str, Any]:
    """Write one rank's fragments, with the shapes of all network parameters. Returns the file's `bytes` and `sha256`."""
    starts = {name: fragment.start for name, fragment in fragments.items()}
    metadata = {"format": "1", "starts": json.dumps(starts), "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()})}
    return write_file(path, LazyTensors.of({name: fragment.values for name, fragment in fragments.items()}), metadata=metadata)


class ShardedTensors:
    """Tensors stored as one file per rank. Reads lazily."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises ValueError if a file does not have the expected format."""
        self.shapes: Shapes = {}
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        for path in paths:
            starts, self.shapes, slices = _open(path)
            for name, start in starts.items():
                self._pieces.setdefault(name, []).append((start, slices[name]))

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def pieces(self, name: str) -> list[tuple[int, Any]]:
        """Start and lazy slice of each rank's fragment of a parameter, in the order of ranks."""
        return self._pieces.get(name, [])

    def read(self, name: str, *, start: int, stop: int) -> Tensor:
        """Elements start … stop of a flattened parameter. Raises ValueError unless the files cover the parameter exactly once."""
        size, position, parts = math.prod(self.shapes[name]), 0, []
        for first, values in sorted(self._pieces.get(name, []), key=lambda piece: piece[0]):
            if first != position:
                break
            (count,) = values.get_shape()
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                parts.append(values[low:high])
            position += count
        if position != size:
            raise ValueError(f"{name}: the ranks' fragments cover {position} of {size} elements")
        return torch.cat(parts)

    def tensor(self, name: str) -> Tensor:
        """Read a full parameter in its shape. Raises ValueError like `read`."""
        shape = self.shapes[name]
        return self.read(name, start=0, stop=math.prod(shape)).view(shape)

    @torch.no_grad()
    def read_into(self, fragments: Mapping[str, Fragment]) -> None:
        """Fill fragments of any sharding from the files. Raises ValueError like `read`."""
        for name, fragment in fragments.items():
            fragment.values.copy_(self.read(name, start=fragment.start, stop=fragment.start + len(fragment.values)))


def _open(path: Path) -> tuple[dict[str, int], Shapes, dict[str, Any]]:
    """Open one rank's file. Returns the start of each fragment, the network's shapes, and lazy slices of the fragments."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "1":
                raise ValueError(f"{path}: unknown format {metadata.get('format')!r}; this version reads 1")
            starts: dict[str, int] = json.loads(metadata["starts"])
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            return starts, shapes, {name: file.get_slice(name) for name in starts}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
