"""Members of a feature shard: safetensors files, optionally compressed, with tensors named by their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors.torch import load, save
from torch import Tensor

EXTENSION = "features.safetensors"
_ZSTD = b"\x28\xb5\x2f\xfd"  # magic of a zstd frame; as the length of a safetensors header it would be 4 GB
_ZSTD_LEVEL = 3


def latent_name(crop: Sequence[int], *, flipped: bool = False, deviation: bool = False) -> str:
    """Name of an image's latent at one size: (C, h/factor, w/factor). With `deviation`, of its standard deviation.

    `crop` is resize_height, resize_width, height, width in pixels: latents are the same only if all four are.
    """
    return f"latent{'_std' if deviation else ''}.{_crop_name(crop, flipped=flipped)}"


def tokens_name(crop: Sequence[int], *, flipped: bool = False) -> str:
    """Name of the alignment teacher's tokens of an image at one size: (N, D)."""
    return f"teacher.{_crop_name(crop, flipped=flipped)}"


def text_name(caption: int) -> str:
    """Name of a caption's features: (M, F)."""
    return f"text.{caption}"


def pack(tensors: Mapping[str, Tensor], *, zstd: bool = False) -> bytes:
    """Serialise the tensors of a sample as a tar member."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    if not zstd:
        return data
    import zstandard

    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)


def unpack(data: memoryview) -> dict[str, Tensor]:
    """The inverse of `pack`, compressed or not. Raises safetensors' and zstd's errors for damaged data."""
    if data[:4] != _ZSTD:
        return load(bytes(data))
    import zstandard

    return load(zstandard.ZstdDecompressor().decompress(data))


def _crop_name(crop: Sequence[int], *, flipped: bool) -> str:
    resize_height, resize_width, height, width = crop
    return f"{height}x{width}.of.{resize_height}x{resize_width}{'.flipped' if flipped else ''}"
