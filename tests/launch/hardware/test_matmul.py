"""The rate of matrix products against products that are timed by hand."""

from __future__ import annotations

import time

import torch

from launch.hardware.matmul import measure_matmul_rate


def test_the_rate_is_that_of_products_timed_by_hand() -> None:
    cpu = torch.device("cpu")
    state = torch.random.get_rng_state()
    rate = measure_matmul_rate(cpu, torch.float32)
    a = torch.randn(256, 256)
    start = time.perf_counter()
    for _ in range(20):
        torch.mm(a, a)
    by_hand = 20 * 2 * 256**3 / (time.perf_counter() - start)
    assert by_hand / 10 < rate < by_hand * 100  # of the same order: the machine may be busy
    assert measure_matmul_rate(cpu, torch.float32) == rate
    torch.random.set_rng_state(state)
    expected = torch.randn(3)
    torch.random.set_rng_state(state)
    measure_matmul_rate.cache_clear()
    measure_matmul_rate(cpu, torch.float32)
    assert torch.equal(torch.randn(3), expected), "draws of the global generator have changed"
