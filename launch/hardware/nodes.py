"""Speed of every rank and its links before a training starts: the slow ones have names.

One slow node slows down all of them, because ranks wait for each other in every step.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from launch.distributed.ranks import Ranks
from launch.hardware.environment import versions
from launch.hardware.matmul import measure_matmul_rate

SLOW = 0.85  # of the median
BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # copied
REDUCED = {"cuda": 1 << 28, "cpu": 1 << 22}  # bytes of an all-reduce
ROUNDS = 3
SKEW = 1.0  # seconds
LINKS = ("all-reduce", "neighbours")  # measures of several ranks

Measure = Callable[[Ranks], float]
UNITS = {"matmul": "TFLOP/s", "memory": "GB/s", "all-reduce": "GB/s", "neighbours": "GB/s"}
SCALES = {"matmul": 1e12, "memory": 1e9, "all-reduce": 1e9, "neighbours": 1e9}


@dataclass(frozen=True, slots=True)
class RankSpeed:
    """A rank, its node, and its rates: FLOP/s, or bytes per second."""

    rank: int
    node: str
    local_rank: int
    rates: dict[str, float]
    clock: float
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class NodesReport:
    """Rates of all ranks, lines about slow nodes, and lines about other differences. `slow` and `differences` are empty if all is well."""

    ranks: tuple[RankSpeed, ...]
    slow: tuple[str, ...]
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        ranks = [asdict(each) | {"shown": rates_of(each)} for each in self.ranks]
        return {"ranks": ranks, "slow": list(self.slow), "differences": list(self.differences)}


def measure_nodes(ranks: Ranks, *, measures: Mapping[str, Measure] | None = None) -> NodesReport:
    """Measure all ranks at the same time. Must be called by all ranks."""
    rates = {}
    for name, measure in (MEASURES if measures is None else measures).items():
        if ranks.size == 1 and name in LINKS:
            continue
        ranks.barrier()
        rates[name] = measure(ranks)
    ranks.barrier()
    own = RankSpeed(ranks.rank, socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")), rates, time.time(), versions())
    return report_of(ranks.gather(own))


def report_of(speeds: Sequence[RankSpeed]) -> NodesReport:
    """Compare ranks with the median of all."""
    slow = []
    for name in speeds[0].rates:
        median = statistics.median(each.rates[name] for each in speeds)
        for each in speeds:
            share = each.rates[name] / median
            if share < SLOW:
                slow.append(f"{each.node} rank {each.rank}: {name} {_rate(name, each.rates[name])}, {share:.0%} of the median")
    return NodesReport(tuple(speeds), tuple(slow), tuple(_differences(speeds)))


def rates_of(each: RankSpeed) -> str:
    """The rates of a rank in one line."""
    return ", ".join(f"{name} {_rate(name, rate)}" for name, rate in each.rates.items())


def _differences(speeds: Sequence[RankSpeed]) -> list[str]:
    """Versions that are not the same everywhere, and clocks that are apart."""
    found = []
    for name in sorted({name for each in speeds for name in each.versions}):
        by_version: dict[str, list[str]] = {}
        for each in speeds:
            nodes = by_version.setdefault(each.versions.get(name, "not installed"), [])
            nodes.extend([each.node] * (each.node not in nodes))
        if len(by_version) > 1:
            found.append(f"{name}: " + ", ".join(f"{version} on {' '.join(nodes)}" for version, nodes in by_version.items()))
    clocks = [each.clock for each in speeds]
    if max(clocks) - min(clocks) > SKEW:
        late = max(speeds, key=lambda each: abs(each.clock - statistics.median(clocks)))
        found.append(f"clock: {late.node} is {late.clock - statistics.median(clocks):+.1f} s from the median: synchronise clocks")
    return found


def _rate(name: str, rate: float) -> str:
    return f"{rate / SCALES.get(name, 1.0):,.3g} {UNITS.get(name, '')}".rstrip()


def _matmul(ranks: Ranks) -> float:
    return measure_matmul_rate(ranks.device, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)


def _memory(ranks: Ranks) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(BYTES[ranks.device.type], dtype=torch.uint8, device=ranks.device)
    target = torch.empty_like(source)
    return 2 * len(source) / _fastest(lambda: target.copy_(source), ranks)


def _all_reduce(ranks: Ranks) -> float:
    """Bytes per second that a rank sends in a ring of all ranks."""
    values = torch.ones(REDUCED[ranks.device.type] // 4, device=ranks.device)
    sent = 2 * (ranks.size - 1) / ranks.size * values.numel() * 4
    return sent / _fastest(lambda: dist.all_reduce(values), ranks)


def _neighbours(ranks: Ranks) -> float:
    """Bytes per second of an exchange with the next or the previous rank, whichever is faster: a slow link has a slow rank at one end."""
    values = torch.ones(REDUCED[ranks.device.type] // 4, device=ranks.device)
    fastest = 0.0
    for first in (0, 1):
        partner = _partner(ranks, first=first)
        ranks.barrier()
        if partner is not None:
            fastest = max(fastest, 2 * values.numel() * 4 / _fastest(lambda other=partner: _exchange(values, other), ranks))
    return fastest


def _partner(ranks: Ranks, *, first: int) -> int | None:
    """The rank to exchange with, in pairs that begin at rank `first`; None if there is none."""
    offset = (ranks.rank - first) % ranks.size
    other = (ranks.rank + (1 if offset % 2 == 0 else -1)) % ranks.size
    return None if ranks.size % 2 and offset == ranks.size - 1 else other


def _exchange(values: torch.Tensor, other: int) -> None:
    received = torch.empty_like(values)
    operations = [dist.P2POp(dist.isend, values, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _fastest(action: Callable[[], object], ranks: Ranks) -> float:
    """Seconds of the fastest of several rounds, after one to warm up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        _wait(ranks)
        start = time.perf_counter()
        action()
        _wait(ranks)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)


MEASURES: Mapping[str, Measure] = {"matmul": _matmul, "memory": _memory, "all-reduce": _all_reduce, "neighbours": _neighbours}
