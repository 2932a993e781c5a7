"""Checkpoints for tests, by the parts that write those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.checkpoints.checkpoint import CheckpointMetadata, create_partial_folder, publish, step_folder, write_latest
from launch.checkpoints.saving.background import BackgroundSaver, Part
from launch.checkpoints.saving.follow_ups import FollowUps
from launch.config.run_sections import CheckpointConfig
from launch.distributed.ranks import Ranks


def save(run: Path, metadata: CheckpointMetadata, part: Part, *, ranks: Ranks, keep_last: int = 9) -> Path:
    """Save and wait. Must be called by all ranks."""
    section = CheckpointConfig(keep_last=keep_last)
    follow_ups = FollowUps(run, section) if ranks.is_main else None
    with BackgroundSaver(run, section, ranks=ranks, follow_ups=follow_ups, log=lambda line: None) as saver:
        saver.start(metadata, part)
        saver.finish()
    return step_folder(run, metadata.step)


def save_parts(run: Path, metadata: CheckpointMetadata, parts: Sequence[Part]) -> Path:
    """A checkpoint of several ranks, written by this process."""
    partial = create_partial_folder(run, step=metadata.step)
    final = publish(run, partial, metadata, [part.write(partial, rank=rank) for rank, part in enumerate(parts)])
    write_latest(run, final)
    return final
