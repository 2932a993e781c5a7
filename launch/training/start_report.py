"""First lines of a training log: network, processes, and the checkpoint that the run resumes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from launch.checkpoints.checkpoint import CHECKPOINTS, Checkpoint
from launch.checkpoints.history import History
from launch.checkpoints.initial import context_differences
from launch.config.schema import Config
from launch.distributed.ranks import Ranks
from launch.text_tables import count


def start_report(
    config: Config,
    ranks: Ranks,
    parameters: int,
    *,
    trained: int | None = None,
    step: int,
    history: History,
    found: Checkpoint | None,
    changes: Sequence[str],
) -> Iterator[str]:
    """Lines to log before the first step. trained: number of `parameters` that are not frozen, if some are; found: checkpoint to resume
    from; changes: configuration keys that differ."""
    threads = f"CPU, {count(torch.get_num_threads(), 'thread')} each"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else threads
    processes, packs = _processes(ranks.size), config.plan.at(step).packs_per_step
    settings = f"ZeRO-{config.train.zero} · {config.train.precision} · {count(packs, 'pack')} of {config.plan.tokens_per_pack} tokens"
    yield f"{parameters / 1e6:.2f}M parameters · {processes} on {device} · {settings} per step"
    if empty := -packs % ranks.size:
        idle = f"they may be idle for up to {empty / (packs + empty):.0%} of the time"
        yield f"warning: plan.packs_per_step {packs} is not a multiple of {processes}: {idle}; see `tim plan --ranks {ranks.size}`"
    if trained is not None:
        yield f"training {trained:,} of {parameters:,} parameters: {_what_is_trained(config)}"
    if found is None and history.init is not None:
        yield f"initialized from {history.init}"
        yield from context_differences(config)
        source = Path(history.init.source or "")
        if trained is not None and source.parent.name == CHECKPOINTS:
            remedy = f"give its export instead: tim export {source.parents[1]} --out FOLDER"
            yield f"warning: every resume and export reads the frozen weights in {source} again, which its run may remove: {remedy}"
    if found is not None:
        for problem in found.skipped:
            yield f"skipped damaged checkpoint: {problem}"
        before = found.metadata.world_size
        others = "" if before == ranks.size else f", written by {_processes(before)}: samples and random draws of each step stay the same"
        yield f"continuing from {found.folder}{others}"
        for change in changes:
            yield f"changed since: {change}"
        if step >= config.train.steps:
            yield f"nothing to train: the run has {step} steps, and train.steps is {config.train.steps}; raise it to train on"


def _what_is_trained(config: Config) -> str:
    lora = config.train.lora
    if lora is None:
        return f"all but {', '.join(config.train.freeze)}"
    return f"LoRA of rank {lora.rank}, alpha {lora.strength:g}" + (f", dropout {lora.dropout:g}" if lora.dropout else "")


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"
