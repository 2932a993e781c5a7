"""Ranks of a training job: process group, collectives, and error handling across ranks.

The only file that creates process groups for training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from launch.distributed.device import training_device
from launch.distributed.heartbeat import HEARTBEAT

Result = TypeVar("Result")

GROUP_TIMEOUT = timedelta(minutes=70)  # above the longest section of a step by default: see TrainConfig.hang_timeout


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's rank in the training job. Collective methods must be called by all ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        with HEARTBEAT.collective():
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks. Returns a CPU tensor of the same dtype."""
        with HEARTBEAT.collective():  # on a GPU, `cpu` waits for the sum
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
            return values.cpu()

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on this rank's device."""
        with HEARTBEAT.collective():
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return float(self.sum(torch.tensor(float(value)))) > 0

    def gather(self, value: Result) -> list[Result]:
        """Values of all ranks, in rank order."""
        values: list[Any] = [None] * self.size
        with HEARTBEAT.collective():
            dist.all_gather_object(values, value)
        return values

    def gather_on_rank0(self, value: Result) -> list[Result]:
        """Values of all ranks, in rank order; empty on other ranks than 0."""
        values: list[Any] | None = [None] * self.size if self.is_main else None
        with HEARTBEAT.collective():
            dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Result) -> Result:
        """Value of rank 0."""
        values = [value]
        with HEARTBEAT.collective():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def run_on_rank0(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 and broadcast its result. If it raises, rank 0 re-raises and the other ranks exit without output."""
        result, error = _attempt(action) if self.is_main else (None, None)
        result, code = self.broadcast((result, _exit_code(error)))
        _raise_collectively([code], error=error)
        return result  # pyright: ignore[reportReturnType]  (None only where _raise_collectively has raised)

    def run_on_all_ranks(self, action: Callable[[], Result]) -> Result:
        """Run `action`, which must not communicate, on every rank. If any raises, the first one re-raises and the others exit silently."""
        result, error = _attempt(action)
        codes = self.gather(_exit_code(error))
        first = next((rank for rank, code in enumerate(codes) if code is not None), None)
        _raise_collectively(codes, error=error if first == self.rank else None)
        return result  # pyright: ignore[reportReturnType]  (None only where _raise_collectively has raised)

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error that every rank has found: on rank 0. The other ranks exit without output."""
        raise error if self.is_main else SystemExit(_exit_code(error))


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # raised again by _raise_collectively
        return None, error


def _exit_code(error: Exception | None) -> int | None:
    return None if error is None else 2 if isinstance(error, ValueError) else 1


def _raise_collectively(codes: Sequence[int | None], *, error: Exception | None) -> None:
    """Raise on one rank and exit on the others, so that an error is reported once."""
    if error is not None:
        raise error
    code = next((code for code in codes if code is not None), None)
    if code is not None:
        raise SystemExit(code)


@contextmanager
def process_group(*, timeout: timedelta = GROUP_TIMEOUT) -> Iterator[Ranks]:
    """Join the process group of torchrun, or create one with a single process. Destroy it at the end.

    timeout: how long a collective operation may wait for another rank.

    Uses NCCL if a GPU is visible, else gloo. The group is destroyed even if the body fails, because ZeRO-3 aborts otherwise.
    """
    device = training_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ["DS_ACCELERATOR"] = device.type  # read by DeepSpeed
    backend = "nccl" if device.type == "cuda" else "gloo"
    is_single = "RANK" not in os.environ
    if not is_single:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts the ranks again, and with it the addresses of those that are gone
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        comm = sys.modules.get("deepspeed.comm")  # also clears DeepSpeed's references to the groups, so that this process can train again
        (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
        if is_single:
            os.environ.pop("LOCAL_RANK", None)  # accelerate would assume several processes
