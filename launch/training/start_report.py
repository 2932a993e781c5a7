"""Lines that a training log begins with: the network, the processes, and what the run continues from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from launch.checkpoints.checkpoint import Checkpoint
from launch.checkpoints.history import History
from launch.checkpoints.initial import other_surroundings
from launch.config.schema import Config
from launch.distributed.ranks import Ranks


def start_report(
    config: Config, ranks: Ranks, *, parameters: int, step: int, history: History, found: Checkpoint | None, changes: Sequence[str]
) -> Iterator[str]:
    """What to log before the first step. found: the checkpoint that the run continues from; changes: configuration keys that differ."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads each"
    processes, packs = _processes(ranks.size), config.plan.at(step).packs_per_step
    settings = f"ZeRO-{config.train.zero} · {config.train.precision} · {packs} packs of {config.plan.tokens_per_pack} tokens a step"
    yield f"{parameters / 1e6:.2f}M parameters · {processes} on {device} · {settings}"
    if empty := -packs % ranks.size:
        waiting = f"up to {empty / (packs + empty):.0%} of their time may be waiting"
        yield f"warning: {packs} packs a step do not divide among {processes}: {waiting}; `tim plan --ranks {ranks.size}` says how much"
    if found is None and history.init is not None:
        yield f"beginning with {history.init}"
        yield from other_surroundings(config)
    if found is not None:
        for passed_over in found.passed_over:
            yield f"passed over: {passed_over}"
        before = found.metadata.world_size
        others = "" if before == ranks.size else f", which {_processes(before)} wrote: samples and draws of a step stay the same"
        yield f"continuing from {found.folder}{others}"
        for change in changes:
            yield f"changed since: {change}"


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"
