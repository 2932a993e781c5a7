"""Exponential moving average of the weights, sharded like the optimizer: each rank averages the float32 masters that it owns.

No communication and no second copy of the network: 4 bytes per parameter, divided by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from launch.checkpoints.tensor_fragments import Fragment


def decay_at(updates: int, *, decay: float) -> float:
    """The decay after `updates` earlier updates: it warms up, so that a short run's average is not its random start."""
    return min(decay, (1 + updates) / (10 + updates))


class ShardedEMA:
    """The average of this rank's fragments; `decay` 0 makes it a copy of the weights."""

    def __init__(self, fragments: Mapping[str, Fragment], *, decay: float) -> None:
        self.decay = decay
        self.average = {name: Fragment(fragment.start, fragment.values.clone()) for name, fragment in fragments.items()}

    def update(self, fragments: Mapping[str, Fragment], *, updates: int) -> None:
        """Move towards the weights. updates: how many updates went before."""
        rate = 1 - decay_at(updates, decay=self.decay)
        for name, fragment in fragments.items():
            self.average[name].values.lerp_(fragment.values, rate)
