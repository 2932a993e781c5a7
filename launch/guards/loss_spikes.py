"""Detect loss spikes: several steps in a row whose loss is far above the recent steps' median."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from pipeline.cost import KIND_NAMES

WINDOW = 256  # steps
MIN_STEPS = 32  # in the window, before anything is a spike
STEPS_IN_A_ROW = 3  # a single step may have difficult images
DEVIATIONS = 8.0
MIN_RISE = 0.2  # of the median
OUTLIERS = 0.01  # share of a window that may be high without raising the limit

_MAD_TO_DEVIATION = 1.4826  # for a normal distribution


class SpikeDetector:
    """Watches the mean loss of each kind of image. The state is plain JSON; equal inputs give equal results on all ranks.

    A spike is STEPS_IN_A_ROW steps of one kind far above the median of the window. If more than OUTLIERS of the window are that high
    themselves, the loss has heavy tails, as that of steps with few images of a kind: then the steps of a spike must also be above
    everything in the window. Fewer are isolated outliers, which do not hide a spike.

    Both hold for any distribution of independent steps. n steps are followed by k that are higher than all of them with probability
    1 / binomial(n + k, k), 4e-7 for a full window. With a share p of high steps, k in a row and at most OUTLIERS of the window have
    probability p^k · P(binomial(n, p) ≤ OUTLIERS · n), at most 2e-6 for a full window.
    """

    def __init__(self) -> None:
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW) for _ in KIND_NAMES]
        self._high: list[list[float]] = [[] for _ in KIND_NAMES]  # the high steps in a row up to now, not yet in the window

    def add(self, raw: Sequence[float], images: Sequence[int]) -> str | None:
        """Add a step: error sums and image counts by kind. Returns a description if it completes a spike.

        Steps of a spike do not enter the window, so that the median stays that of the steps before. Fewer high steps in a row do.
        """
        found = [self._add(kind, total / count) for kind, (total, count) in enumerate(zip(raw, images, strict=True)) if count]
        spikes = [text for text in found if text]
        return f"{'; '.join(spikes)}, in {STEPS_IN_A_ROW} steps in a row" if spikes else None

    def restart(self) -> None:
        """Forget all steps: take the present level for normal."""
        for window, high in zip(self._windows, self._high, strict=True):
            window.clear()
            high.clear()

    def _add(self, kind: int, mean: float) -> str | None:
        window, high = self._windows[kind], self._high[kind]
        limit = self._limit(window)
        if mean <= limit or math.isinf(limit):
            window.extend(value for value in (*high, mean) if math.isfinite(value))
            high.clear()
            return None
        high.append(mean)
        if len(high) < STEPS_IN_A_ROW:
            return None
        high.clear()
        median = statistics.median(window)
        return f"loss_{KIND_NAMES[kind]} {mean:.4g} is above {limit:.4g}, the median of {len(window)} steps is {median:.4g}"

    @staticmethod
    def _limit(window: Sequence[float]) -> float:
        """The highest mean that is not high."""
        if len(window) < MIN_STEPS:
            return math.inf
        median = statistics.median(window)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in window)
        limit = median + max(DEVIATIONS * deviation, MIN_RISE * median)
        high = sum(value > limit for value in window)
        return limit if high <= math.ceil(OUTLIERS * len(window)) else max(window)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": [list(window) for window in self._windows], "high": [list(high) for high in self._high]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows = [deque(values, maxlen=WINDOW) for values in state["windows"]]
        self._high = [list(values) for values in state.get("high", [[] for _ in KIND_NAMES])]  # not in older checkpoints
