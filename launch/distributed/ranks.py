"""The ranks of a training job: their process group, and work that rank 0 or all of them do.

The only file that makes process groups for training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from launch.distributed.device import choose_device

Result = TypeVar("Result")

GROUP_TIMEOUT = timedelta(minutes=60)  # ranks wait this long for rank 0 to check or digest a large checkpoint


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all training processes. Every method that talks to others must be called by all ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, on the CPU in the dtype given."""
        return self.total(values.to(self.device, copy=True)).cpu()

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on this rank's device."""
        dist.all_reduce(values)
        return values

    def gather(self, value: Result) -> list[Result]:
        """What every rank has, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Result) -> Result:
        """What rank 0 has."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def run_on_rank0(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 and give its result to every rank; where it raises, rank 0 raises and the others exit silently."""
        result, error = _attempt(action) if self.is_main else (None, None)
        result, code = self.broadcast((result, _exit_code(error)))
        _raise_collectively([code], own=error)
        return result  # pyright: ignore[reportReturnType]  (None only where _raise_collectively has raised)

    def run_on_all_ranks(self, action: Callable[[], Result]) -> Result:
        """Run an `action` that talks to nobody on every rank; where some raise, the first of them does and the others exit silently."""
        result, error = _attempt(action)
        codes = self.gather(_exit_code(error))
        first = next((rank for rank, code in enumerate(codes) if code is not None), None)
        _raise_collectively(codes, own=error if first == self.rank else None)
        return result  # pyright: ignore[reportReturnType]  (None only where _raise_collectively has raised)


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # raised again by _raise_collectively
        return None, error


def _exit_code(error: Exception | None) -> int | None:
    return None if error is None else 2 if isinstance(error, ValueError) else 1


def _raise_collectively(codes: Sequence[int | None], *, own: Exception | None) -> None:
    """One line says what is wrong, not one from every rank."""
    if own is not None:
        raise own
    code = next((code for code in codes if code is not None), None)
    if code is not None:
        raise SystemExit(code)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torchrun started (or be the only one), and leave cleanly at the end.

    CUDA with NCCL where a GPU is visible, else the CPU with gloo. The group is destroyed also when the body fails: ZeRO-3 aborts otherwise.
    """
    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if device.type == "cuda" else "gloo"
    is_alone = "RANK" not in os.environ
    if not is_alone:
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    else:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed wants to read it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=GROUP_TIMEOUT)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        owner = sys.modules.get("deepspeed.comm")  # forgets its copies of the groups, too, so that this process can train again
        (owner if owner is not None and owner.is_initialized() else dist).destroy_process_group()
        if is_alone:
            os.environ.pop("LOCAL_RANK", None)  # accelerate would take this process for one of several
