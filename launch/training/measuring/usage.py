"""Use of the devices and the machine, for the metrics: share of the matmul rate, peak memory, the time of day."""

from __future__ import annotations

import resource
import time

import torch

from launch.distributed.ranks import Ranks
from launch.hardware.matmul import measure_matmul_rate
from tim.model_kinds import Precision

CPU_PATIENCE = 20.0  # seconds of training before the matmul rate of a CPU is measured, which takes half a second
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Usage:
    """Measures what all ranks use."""

    def __init__(self, ranks: Ranks, *, precision: Precision) -> None:
        self._ranks = ranks
        self._dtype = _DTYPES[precision]
        self._rate: float | None = None
        if ranks.device.type == "cuda":  # now, while memory is free
            self.measure_rate(trained=CPU_PATIENCE)

    def measure_rate(self, *, trained: float) -> bool:
        """Measure this rank's matmul rate, if that is due after so many seconds of training. Returns whether it was measured."""
        if self._rate is not None or trained < CPU_PATIENCE:
            return False
        device = self._ranks.device
        self._rate = measure_matmul_rate(device, self._dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return True

    def columns(self, flops_per_second: float) -> dict[str, float | None]:
        """Columns of a row. Must be called by all ranks. flops_per_second: of all ranks together."""
        size, rank, device = self._ranks.size, self._ranks.rank, self._ranks.device
        values = torch.zeros(2 + 2 * size, dtype=torch.float64)
        values[0], values[1] = self._rate or 0.0, self._rate is not None
        values[2 + rank] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        values[2 + size + rank] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rate, measured, *peaks = self._ranks.sum(values).tolist()
        return {
            "matmul_share": flops_per_second / rate if measured == size else None,
            "peak_memory_device": round(max(peaks[:size])) if device.type == "cuda" else None,
            "peak_memory_host": round(max(peaks[size:])),
            "time": time.time(),
        }
