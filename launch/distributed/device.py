"""The device of this process: a CUDA device where one is visible, else the CPU."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def choose_device(index: int = 0) -> torch.device:
    """CUDA device `index` of this machine, or the CPU with an allocator that suits training."""
    if torch.cuda.is_available():
        return torch.device("cuda", index)
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Reuse the memory of large tensors instead of giving it back to the kernel, as glibc does with every block above 32 MB.

    The kernel zeroes each page that it hands out, which made an elementwise product of 86 MB take 52 ms instead of 27, and a training
    step of `tim bench step` 12 % longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
