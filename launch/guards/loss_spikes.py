"""Detect loss spikes: several steps in a row whose loss is far above the recent steps' median."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from pipeline.cost import KIND_NAMES

WINDOW = 128  # steps
MIN_STEPS = 32  # in the window, before anything is a spike
STEPS_IN_A_ROW = 3  # a single step may have difficult images
DEVIATIONS = 8.0
MIN_RISE = 0.2  # of the median

_MAD_TO_DEVIATION = 1.4826  # for a normal distribution


class SpikeDetector:
    """Watches the mean loss of each kind of image. The state is plain JSON; equal inputs give equal results on all ranks."""

    def __init__(self) -> None:
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW) for _ in KIND_NAMES]
        self._in_a_row = 0

    def add(self, raw: Sequence[float], images: Sequence[int]) -> str | None:
        """Add a step: error sums and image counts by kind. Returns a description if it completes a spike.

        Steps of a spike do not enter the window, so that the median stays that of the steps before.
        """
        means = [total / count if count else None for total, count in zip(raw, images, strict=True)]
        found = [self._above(kind, mean) for kind, mean in enumerate(means) if mean is not None]
        high = [text for text in found if text]
        if not high:
            self._in_a_row = 0
            for window, mean in zip(self._windows, means, strict=True):
                if mean is not None:
                    window.append(mean)
            return None
        self._in_a_row += 1
        if self._in_a_row < STEPS_IN_A_ROW:
            return None
        self._in_a_row = 0
        return f"{'; '.join(high)}, in {STEPS_IN_A_ROW} steps in a row"

    def restart(self) -> None:
        """Forget all steps: take the present level for normal."""
        for window in self._windows:
            window.clear()
        self._in_a_row = 0

    def _above(self, kind: int, mean: float) -> str | None:
        window = self._windows[kind]
        if len(window) < MIN_STEPS:
            return None
        median = statistics.median(window)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in window)
        limit = median + max(DEVIATIONS * deviation, MIN_RISE * median)
        if math.isfinite(mean) and mean <= limit:
            return None
        return f"loss_{KIND_NAMES[kind]} {mean:.4g} is above {limit:.4g}, the median of {len(window)} steps is {median:.4g}"

    def state_dict(self) -> dict[str, Any]:
        return {"windows": [list(window) for window in self._windows], "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows = [deque(values, maxlen=WINDOW) for values in state["windows"]]
        self._in_a_row = state["in_a_row"]
