"""Worker processes that read planned packs, and what happens to a sample that crashes them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from pipeline.loading.pack_reader import DecodePack, FetchedPack, ReadPack
from pipeline.planned_steps import PlannedSample
from pipeline.workers.pool import WorkerDied, WorkerPool, WorkerStuck
from pipeline.workers.process import NO_ITEM, Report, Stages, start_fork_server

logger = logging.getLogger(__name__)

Samples = tuple[PlannedSample, ...]

_PRELOAD = "pipeline.loading.pack_reader"  # imports torch
_FAR_AHEAD = 1 << 30  # the loader limits what it puts


class _PackTask(NamedTuple):
    """A pack to read. `lost`: positions of samples at which two workers died, with the reasons."""

    samples: Samples
    lost: Mapping[int, str] = {}


class PackWorkers:
    """`workers` processes that read packs ahead. Tensors are returned through shared memory.

    If workers die twice at the same sample, or hang there twice for `timeout` seconds, `decode` has to skip it. Which samples are lost
    depends only on the packs, not on the number of workers.
    """

    def __init__(self, fetch: Callable[[Samples], FetchedPack], decode: DecodePack, *, workers: int, timeout: float) -> None:
        self._pool = WorkerPool(workers, name="reader", timeout=timeout, ahead=_FAR_AHEAD, preload=[_PRELOAD], on_death=_log_death)
        self._work = Stages(fetch=partial(_fetch, fetch), run=partial(_decode, decode))
        self._numbers: deque[int] = deque()

    @staticmethod
    def prepare() -> None:
        """Start to import what the workers need, which takes a second or two."""
        start_fork_server(_PRELOAD)

    def put(self, samples: Samples) -> None:
        """Let a pack be read."""
        self._numbers.append(self._pool.put(self._work, _PackTask(samples), retry=_after_crash))

    def get(self) -> ReadPack:
        """The oldest pending pack.

        Raises RuntimeError if workers keep dying without a sample as the cause, or if nothing is fetched for `timeout` seconds.
        """
        try:
            return self._pool.get(self._numbers.popleft())
        except WorkerStuck as error:
            raise RuntimeError(f"{error}: is the storage alive?") from error
        except WorkerDied as death:
            raise RuntimeError(f"{death}: after signal 9, memory may be short: try fewer loader.workers") from death

    def close(self) -> None:
        """End all workers."""
        self._pool.close()


def _fetch(fetch: Callable[[Samples], FetchedPack], task: _PackTask) -> tuple[FetchedPack, Mapping[int, str]]:
    return fetch(task.samples), task.lost


def _decode(decode: DecodePack, fetched: tuple[FetchedPack, Mapping[int, str]], report: Report) -> ReadPack:
    torch.set_num_threads(1)
    return decode(fetched[0], begin=report, lost=fetched[1])


def _after_crash(task: _PackTask, death: WorkerDied) -> _PackTask:
    if death.times == 1:
        return task
    reason = f"crashed: the process that decoded it {death.how}, like another one before"
    return task._replace(lost={**task.lost, death.at: reason})


def _log_death(task: _PackTask, death: WorkerDied) -> None:
    at = ""
    if death.at != NO_ITEM:
        sample = task.samples[death.at]
        at = f" at sample {sample.id} of {sample.features_tar or sample.tar}"
    logger.warning("%s%s: a new process retries its work", death, at)
