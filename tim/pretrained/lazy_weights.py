"""Read the weights of a published file one tensor at a time."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tim.pretrained.official import WEIGHTS, unnested, unprefixed, unreadable
from tim.pretrained.safetensors_files import DTYPES, INDEX, SUFFIX, LazyTensors, ShardsError, check_shard, read_index


def lazy_weights(path: Path) -> LazyTensors:
    """The weights of a `.safetensors`, `.bin`, `.pt` or `.pth` file or of an index of safetensors, under the network's own names.

    Pickles are read as tensors only. Raises ValueError naming the file if it is missing, damaged, of another type, or has no weights.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in WEIGHTS and not path.name.endswith(INDEX):
        raise ValueError(f"{path}: weights are read from {', '.join(WEIGHTS)} files")
    try:
        return _safetensors(path) if path.name.endswith((SUFFIX, INDEX)) else LazyTensors.of(unnested(_pickle(path)))
    except ShardsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot read weights ({unreadable(error)})") from error


def _safetensors(path: Path) -> LazyTensors:
    weight_map = read_index(path) if path.name.endswith(INDEX) else {}
    shards = sorted(set(weight_map.values())) or [path]
    opened = {shard: safe_open(shard, framework="pt") for shard in shards}
    for shard, file in opened.items():
        check_shard(shard, set(file.keys()), weight_map=weight_map, index=path)
    stored = weight_map or dict.fromkeys(opened[path].keys(), path)
    places = unprefixed({name: (opened[shard], name) for name, shard in stored.items()})
    torch_dtypes = {name: dtype for dtype, name in DTYPES.items()}
    headers = {name: file.get_slice(original) for name, (file, original) in places.items()}

    def read(name: str) -> Tensor:
        file, original = places[name]
        return file.get_tensor(original)

    shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
    return LazyTensors(shapes, {name: torch_dtypes[header.get_dtype()] for name, header in headers.items()}, read)


def _pickle(path: Path) -> object:
    """Tensors of a pickle, mapped from the file where its format allows that."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)
