"""Rate of matrix products on a device, by measurement."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of the square matrices
SECONDS = 0.1  # per round
ROUNDS = 3


@cache
def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products: the fastest of several rounds. Measured once per process, in a fraction of a second.

    The matrices are the largest whose product takes no more than a few hundredths of a second. On a GPU these are 8192 wide.
    """
    a, b, out, seconds = _matrices(device, dtype, side=SIDES[0])
    for side in SIDES[1:]:
        if 8 * seconds > SECONDS / 2:
            break
        a, b, out, seconds = _matrices(device, dtype, side=side)
    times = max(1, int(SECONDS / seconds))
    fastest = min(_seconds(a, b, out, times=times) for _ in range(ROUNDS)) / times
    return 2 * len(a) ** 3 / fastest


def _matrices(device: torch.device, dtype: torch.dtype, *, side: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Two matrices, room for their product, and the seconds it takes the second time."""
    random = torch.Generator(device).manual_seed(0)  # constant numbers take less power, and the clock of a GPU rises
    a, b, out = (torch.randn(side, side, device=device, dtype=dtype, generator=random) for _ in range(3))
    _seconds(a, b, out, times=1)
    return a, b, out, _seconds(a, b, out, times=1)


def _seconds(a: Tensor, b: Tensor, out: Tensor, *, times: int) -> float:
    """Duration of products of a and b."""
    _wait(a.device)
    start = time.perf_counter()
    for _ in range(times):
        torch.mm(a, b, out=out)
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
