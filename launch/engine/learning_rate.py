"""Learning rate of a step. Depends only on the step, not on the number of ranks or on the loss."""

from __future__ import annotations

import math

from launch.config.schema import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of the update from `step` to `step + 1`: `train.lr` after a linear warm-up, then decayed by the schedule."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    return train.lr * _decay(step, train)


def _decay(step: int, train: TrainConfig) -> float:
    """Share of `train.lr` that is left at a step after the warm-up: 1 at first; 0 at the end of a schedule that decays."""
    if train.schedule == "constant":
        return 1.0
    start = train.steps - train.decay_steps if train.schedule == "wsd" else train.warmup
    progress = max(0, step - start) / max(1, train.steps - start)
    return 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
