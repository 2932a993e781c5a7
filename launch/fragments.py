"""Pieces of parameters: how a network's float32 weights lie scattered over the ranks, on disk and in memory.

Each rank writes one safetensors file with its pieces; the files together hold the network, and can be put together by anybody, without
DeepSpeed and whatever the number of ranks was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements start … start + len(values) of a flattened parameter, in float32."""

    start: int
    values: Tensor


def save(path: Path, fragments: Mapping[str, Fragment], *, shapes: Shapes) -> None:
    """Write one rank's fragments, with the shapes of all of the network's parameters."""
    starts = {name: fragment.start for name, fragment in fragments.items()}
    metadata = {"format": "1", "starts": json.dumps(starts), "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()})}
    save_file({name: fragment.values.cpu().contiguous() for name, fragment in fragments.items()}, path, metadata=metadata)


def load(path: Path) -> tuple[dict[str, Fragment], dict[str, tuple[int, ...]]]:
    """Read one rank's fragments and the network's shapes. Raises ValueError where the file is not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "1":
                raise ValueError(f"{path}: unknown format {metadata.get('format')!r}; this version reads 1")
            starts: dict[str, int] = json.loads(metadata["starts"])
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            return {name: Fragment(start, file.get_tensor(name)) for name, start in starts.items()}, shapes
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None


def assemble(pieces: Sequence[Mapping[str, Fragment]], *, shapes: Shapes) -> dict[str, Tensor]:
    """Whole parameters from all ranks' fragments. Raises ValueError naming a parameter that they do not cover exactly once."""
    whole = {}
    for name, shape in shapes.items():
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        position = 0
        for fragment in sorted((piece[name] for piece in pieces if name in piece), key=lambda fragment: fragment.start):
            if fragment.start != position:
                break
            flat[position : position + fragment.values.numel()] = fragment.values
            position += fragment.values.numel()
        if position != flat.numel():
            raise ValueError(f"{name}: the ranks' fragments cover {position} of {flat.numel()} elements")
        whole[name] = flat.view(shape)
    return whole
