"""Benchmark of torch.compile: whole blocks for padded packs, and norms and MLPs alone, both compared with no compilation."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence

from launch.benchmarks.network import Bench, Data, Grid, synchronise
from pipeline.progress import Progress
from tim import TransitionTransformer
from tim.layers import Block


def bench_compiled(grids: list[Grid], *, width: int, depth: int, batch: int, batches: int, repeats: int, progress: Progress) -> Data:
    """Benchmark a training step of the objective without the optimizer update, on packs as full as a plan's. Half of the images have r < t.

    On a CPU, times are CPU times of all threads, and of the C++ compiler, so that other load on the machine matters less.
    `compile_seconds` is the time of the first step minus that of a later one.
    """
    bench = Bench(width=width, depth=depth)
    full = sum(height * wide for height, wide in grids[:batch])
    packs = [bench.inputs(pack) for pack in full_packs(grids, tokens=full, packs=batches)]
    variants = {
        "not compiled": bench.network,
        "norms and MLPs": copy.deepcopy(bench.network),
        "blocks": copy.deepcopy(bench.network),
    }
    for block in variants["norms and MLPs"].blocks:
        assert isinstance(block, Block)
        block.norm.compile(dynamic=True)
        block.mlp.compile(dynamic=True)
    variants["blocks"].configure_execution(compile_for=full)

    def step(network: TransitionTransformer) -> None:
        for latents, text, rest in packs:
            with bench.precise():
                loss = bench.objective(network, latents, text, **rest).loss
            loss.backward()
        network.zero_grad()

    clock = _cpu_seconds if bench.device.type == "cpu" else time.perf_counter

    def timed(network: TransitionTransformer) -> float:
        start = clock()
        step(network)
        synchronise()
        return clock() - start

    first = {name: timed(network) for name, network in variants.items()}
    seconds = dict(first)
    for turn in range(repeats):
        for name, network in variants.items():
            seconds[name] = min(seconds[name], timed(network))
        progress("measuring", turn + 1, repeats)
    images, tokens = sum(len(pack[0]) for pack in packs), sum(sum(bench.lengths(pack).tokens) for pack in packs)
    return {
        **bench.facts(),
        "images": images,
        "tokens": tokens,
        "fill": tokens / (full * len(packs)),
        "images_per_second": {name: images / each for name, each in seconds.items()},
        "speed_up": {name: seconds["not compiled"] / each for name, each in seconds.items() if name != "not compiled"},
        "compile_seconds": {name: first[name] - each for name, each in seconds.items() if name != "not compiled"},
    }


def full_packs(grids: Sequence[Grid], *, tokens: int, packs: int) -> list[list[Grid]]:
    """Fill packs of at most `tokens` tokens one after another, each with the next images that fit."""
    left, filled = list(grids), []
    while left and len(filled) < packs:
        pack: list[Grid] = []
        others: list[Grid] = []
        room = tokens
        for grid in left:
            fits = grid[0] * grid[1] <= room
            (pack if fits else others).append(grid)
            room -= grid[0] * grid[1] * fits
        left = others
        filled.append(pack)
    return filled


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # of this process and its children, user and system
