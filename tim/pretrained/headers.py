"""Names and shapes of the tensors in weight files, from their headers: no weights are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tim.pretrained.official import unnested, unreadable
from tim.pretrained.safetensors_files import INDEX, SUFFIX, ShardsError, read_shards


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, an index of such files, or a pickle, on the meta device: shapes without values.

    Raises ValueError naming the file if it cannot be read.
    """
    try:
        return unnested(_content(path))
    except ShardsError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename or path}: no such file") from None
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: {unreadable(error)}") from error


def _content(path: Path) -> Any:
    if path.name.endswith(INDEX):
        return read_shards(path, read=_content)
    if path.suffix == SUFFIX:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return torch.load(path, map_location="meta", mmap=True, weights_only=True)
