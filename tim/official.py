"""The published networks' files: reading their weights, safely and however they are nested."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

NESTS = ("ema", "state_dict", "model")  # where a training checkpoint keeps its weights, the averaged ones first
PICKLES = (".bin", ".pt", ".pth")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a `.safetensors`, `.bin`, `.pt` or `.pth` file, on the CPU. Pickles are read as tensors only: no code in them runs.

    Raises ValueError naming the file where it is missing, damaged, of another kind, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)} files")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        return unnested(content)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: no weights can be read from it ({_first_line(error)})") from error


def unnested(content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors in what a checkpoint holds: itself, or under `ema`, `state_dict` or `model`, in this order.

    Raises ValueError where there is none.
    """
    if isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        nest = next((name for name in NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is not None:
            return unnested(content[nest])
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"expected names and tensors, by themselves or under {', '.join(NESTS)}; found {found or 'nothing'}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
