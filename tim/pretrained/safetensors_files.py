"""Write safetensors files one tensor at a time, in shards with an index as Hugging Face writes them, and read such shards.

    model.safetensors                     up to 5 GB
    model-00001-of-00002.safetensors      above; model.safetensors.index.json names the file of each tensor

The digest of a file is computed while it is written. Memory: one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000
SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
_BLOCK = 16 << 20  # bytes per write
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardsError(ValueError):
    """An index that does not fit its shards. The message is one line."""


@dataclass(frozen=True, slots=True)
class LazyTensors:
    """Tensors that are read one at a time. `read` returns the tensor of a name, in any dtype; it is stored in that of `dtypes`."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LazyTensors:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(shapes, {name: tensor.dtype for name, tensor in tensors.items()}, tensors.__getitem__)

    def all(self) -> dict[str, Tensor]:
        """Read all tensors."""
        return {name: self.read(name) for name in self.shapes}

    def bytes_of(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


def write_file(path: Path, tensors: LazyTensors, *, metadata: Mapping[str, str], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Write tensors (by default all) and flush them to the disk. Returns the file's `bytes` and `sha256`.

    Raises OSError naming the file.
    """
    order = sorted(tensors.shapes if names is None else names, key=lambda name: -tensors.dtypes[name].itemsize)  # keeps tensors aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors.bytes_of(name)
        header[name] = {"dtype": DTYPES[tensors.dtypes[name]], "shape": list(tensors.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as stream:
            for block in _blocks(text, order, tensors):
                digest.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def write_shards(
    folder: Path, tensors: LazyTensors, *, stem: str, metadata: Mapping[str, str], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, dict[str, Any]]:
    """Write tensors to `folder`, above `max_bytes` in shards with an index. Returns `bytes` and `sha256` by file name."""
    groups = _groups(tensors, max_bytes=max_bytes)
    if len(groups) == 1:
        name = f"{stem}.safetensors"
        return {name: write_file(folder / name, tensors, metadata=metadata)}
    files, weight_map = {}, {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        files[name] = write_file(folder / name, tensors, metadata=metadata, names=group)
        weight_map.update(dict.fromkeys(group, name))
    total = sum(tensors.bytes_of(name) for name in tensors.shapes)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    path = folder / f"{stem}{INDEX}"
    path.write_text(index, encoding="utf-8")
    files[path.name] = file_facts(path)
    return files


def file_digest(path: Path) -> str:
    """sha256 of a file in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_weights(folder: Path, *, stems: Sequence[str]) -> Path | None:
    """The weights of a folder: STEM.safetensors, or the index of its shards."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in (SUFFIX, INDEX)]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, source: str, digest: Callable[[Path], str] = file_digest) -> None:
    """Compare files with their `bytes` and `sha256`, which `source` states. Raises ValueError for the first difference.

    digest: sha256 of a file in hexadecimal.
    """
    remedy = f'copy or export the folder again, or remove "files" from {source} if you changed the file yourself'
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
        if path.stat().st_size != facts["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, but {facts['bytes']} in {source}: {remedy}")
    for name, facts in files.items():
        if digest(folder / name) != facts["sha256"]:
            raise ValueError(f"{folder / name} does not match its digest in {source}: {remedy}")


def file_facts(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_shards(index: Path, *, read: Callable[[Path], Mapping[str, Tensor]] = load_file) -> dict[str, Tensor]:
    """All tensors of an index file's shards. read: the tensors of one shard. Raises ShardsError, and what `read` raises."""
    weight_map = read_index(index)
    tensors: dict[str, Tensor] = {}
    for path in sorted(set(weight_map.values())):
        found = read(path)
        check_shard(path, found, weight_map=weight_map, index=index)
        tensors.update(found)
    return {name: tensors[name] for name in weight_map}


def read_index(index: Path) -> dict[str, Path]:
    """The shard of each tensor that an index file names.

    Raises ShardsError if it is no such file, or if a shard is missing or not beside it.
    """
    weight_map = _weight_map(index)
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise ShardsError(f"{index.parent / shard} is missing, but {index.name} names it: copy the whole folder again")
    return {name: index.parent / shard for name, shard in weight_map.items()}


def read_shard_names(index: Path) -> list[str]:
    """Names of the files that an index names. Raises ShardsError."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        weight_map = {str(name): str(shard) for name, shard in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardsError(f"{index}: not an index of safetensors shards ({type(error).__name__}: {error})") from error
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or not shard.endswith(SUFFIX):
            raise ShardsError(f"{index}: names {shard!r}, but shards are {SUFFIX} files beside it: download the whole folder again")
    return weight_map


def check_shard(path: Path, names: Collection[str], *, weight_map: Mapping[str, Path], index: Path) -> None:
    """Raise ShardsError if a shard lacks a tensor that the index has in it. names: its tensors."""
    absent = [name for name, shard in weight_map.items() if shard == path and name not in names]
    if absent:
        count = f"{len(absent)} tensors are" if len(absent) > 1 else "a tensor is"
        raise ShardsError(f"{index}: {count} not in {path.name}, for example {absent[0]}: copy the whole folder again")


def _blocks(header: bytes, order: Sequence[str], tensors: LazyTensors) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for name in order:
        tensor = tensors.read(name).detach().to("cpu", tensors.dtypes[name]).contiguous()
        if tuple(tensor.shape) != tuple(tensors.shapes[name]):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} instead of {tuple(tensors.shapes[name])}")
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _BLOCK):
            yield data[start : start + _BLOCK]


def _groups(tensors: LazyTensors, *, max_bytes: int) -> list[list[str]]:
    """Consecutive tensors of at most `max_bytes` together; a larger tensor has a shard of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in tensors.shapes:
        count = tensors.bytes_of(name)
        if groups[-1] and size + count > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups
