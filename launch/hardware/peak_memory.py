"""Peak memory of a part of a program: of its GPU, or of its process."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def restart_peak(device: torch.device) -> None:
    """Begin a new measurement. Where the system cannot forget a process's peak, `peak_bytes` is the most since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _RESET.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The most bytes since `restart_peak`: of tensors on a GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        found = _PEAK.search(_STATUS.read_text())
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
