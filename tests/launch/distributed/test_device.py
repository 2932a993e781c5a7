from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from launch.distributed.device import training_device
device = training_device()
def product():
    return torch.ones(12_000_000, device=device) * 2
for _ in range(10):
    product()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        product()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(device.type, min(faults() for _ in range(3)))  # the allocator may still take one more block
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_memory_of_large_tensors_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=True)
    device, faults = done.stdout.split()
    assert device == "cuda" or int(faults) < 10_000, "5 products of 48 MB touch 117,000 pages if the memory of none is kept"
