"""What a member of a feature shard is: a safetensors file, compressed or not, with tensors named by the sizes that they were made at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors.torch import load, save
from torch import Tensor

EXTENSION = "features.safetensors"
_ZSTD = b"\x28\xb5\x2f\xfd"  # how zstd's frames begin; as the length of a safetensors header it would be 4 GB
_ZSTD_LEVEL = 3


def latent_name(crop: Sequence[int], *, flipped: bool = False, deviation: bool = False) -> str:
    """The tensor of an image at one size: (C, h/factor, w/factor). With `deviation`, of what the codec draws with.

    `crop` is resize_height, resize_width, height, width in pixels: two sizes are one latent only if all four are the same.
    """
    return f"latent{'_std' if deviation else ''}.{_crop_name(crop, flipped=flipped)}"


def tokens_name(crop: Sequence[int], *, flipped: bool = False) -> str:
    """The tensor of what the alignment teacher sees of an image at one size: (N, D)."""
    return f"teacher.{_crop_name(crop, flipped=flipped)}"


def text_name(caption: int) -> str:
    """The tensor of a caption's features: (M, F)."""
    return f"text.{caption}"


def pack(tensors: Mapping[str, Tensor], *, zstd: bool = False) -> bytes:
    """Tensors of a sample as they lie in a tar."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    if not zstd:
        return data
    import zstandard

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)


def unpack(data: memoryview) -> dict[str, Tensor]:
    """The tensors that `pack` was given, compressed or not. Raises whatever safetensors and zstd make of damage."""
    if data[:4] != _ZSTD:
        return load(bytes(data))
    import zstandard

    return load(zstandard.ZstdDecompressor().decompress(data))


def _crop_name(crop: Sequence[int], *, flipped: bool) -> str:
    resize_height, resize_width, height, width = crop
    return f"{height}x{width}.of.{resize_height}x{resize_width}{'.flipped' if flipped else ''}"
