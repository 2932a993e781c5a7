"""Exponential moving average (EMA) of the weights, sharded like the optimizer state: each rank averages its own float32 weights.

No communication. Memory: 4 bytes per parameter, divided by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from launch.checkpoints.tensor_fragments import Fragment


def decay_at(updates: int, *, decay: float) -> float:
    """Decay after `updates` updates. It warms up, so that a short run's average is not dominated by the random initialization."""
    return min(decay, (1 + updates) / (10 + updates))


class ShardedEMA:
    """Moving average of this rank's fragments; with `decay` 0 it equals the weights."""

    def __init__(self, fragments: Mapping[str, Fragment], *, decay: float) -> None:
        self.decay = decay
        self.average = {name: Fragment(fragment.start, fragment.values.clone()) for name, fragment in fragments.items()}

    def update(self, fragments: Mapping[str, Fragment], *, updates: int) -> None:
        """Move the average towards the weights. updates: number of previous updates."""
        rate = 1 - decay_at(updates, decay=self.decay)
        for name, fragment in fragments.items():
            self.average[name].values.lerp_(fragment.values, rate)
