"""Benchmark `tim bench plan`: utilisation of many ranks compared with simpler packing methods, and planning speed.

A simulation: pack costs come from the cost model (`pipeline.cost`, γ = 1, all images of one kind). Utilisation is Σ cost / (ranks · Σ over
synchronisation points of the most expensive rank's cost).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks.network import image_sizes
from pipeline.cost import DIFFUSION, Floats, Ints, image_costs
from pipeline.packing.packing import NO_ROOM, fill_holes
from pipeline.packing.rank_assignment import assign_to_ranks, step_makespan
from pipeline.planned_steps import Step
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.progress import Progress
from pipeline.streams.size_only_corpus import SizeCorpus, Sizes

PLAN = PlanConfig(stride=32, max_tokens=16_384, tokens_per_pack=32_768, packs_per_step=128)
WIDTH = 1152  # of the network
ROWS = 1_000_000  # of each mix
ASPECTS = (4 / 3, 3 / 2, 1.0, 3 / 4, 2 / 3, 16 / 9)
BUCKETS_PER_DOUBLING = 2  # buckets of the padded batches end at 16384, 16384/√2, 8192 … tokens

Draw = Callable[[np.random.Generator, int], Sizes]
Data = dict[str, Any]


def bench_plan(paths: Sequence[Path], *, ranks: int, steps: int, rows: int, progress: Progress) -> Data:
    """Plan `steps` steps of every mix of sizes; `paths`, if any, are an additional mix. Also resume a plan over `rows` rows."""
    if PLAN.packs_per_step % ranks:
        raise ValueError(f"--ranks {ranks}: must divide {PLAN.packs_per_step}, the packs per step, for a fair comparison")
    mixes: dict[str, Draw] = {
        "web": lambda random, count: _lognormal(random, count, megapixels=0.45, sigma=0.9),
        "high-resolution": lambda random, count: _lognormal(random, count, megapixels=2.6, sigma=0.8),
        "two humps": _bimodal,
    }
    if paths:
        sides = np.array([size for path in paths for size in image_sizes(path)])
        if not len(sides):
            raise ValueError(f"{', '.join(map(str, paths))}: no images: give a corpus or a folder of images")
        mixes = {"images": lambda random, count: tuple(sides[random.integers(0, len(sides), count)].T), **mixes}
    data: Data = {"ranks": ranks, "steps": steps, "packs_per_step": PLAN.packs_per_step, "tokens_per_pack": PLAN.tokens_per_pack}
    for done, (name, draw) in enumerate(mixes.items()):
        progress("planning", done, len(mixes) + 1)
        data[name] = _measure(_corpus(name, draw=draw, rows=ROWS), ranks=ranks, steps=steps)
    progress("planning", len(mixes), len(mixes) + 1)
    data["resume"] = _resume(_corpus("web", draw=mixes["web"], rows=rows), ranks=ranks)
    progress("planning", len(mixes) + 1, len(mixes) + 1)
    return data


def _measure(corpus: SizeCorpus, *, ranks: int, steps: int) -> Data:
    """Measure the planner, then the other methods on the same samples."""
    planner = _planner(corpus)
    planner.next_step()  # opens the first window
    start = time.process_time()
    planned = [planner.next_step() for _ in range(steps)]
    planning = time.process_time() - start
    total, images = sum(step.cost for step in planned), sum(step.images for step in planned)
    utilisation, seconds = {}, {}
    for mode in (False, True):
        start = time.process_time()
        rank_packs = [assign_to_ranks(step, ranks=ranks, lockstep=mode) for step in planned]
        seconds[mode] = planning + time.process_time() - start
        utilisation[mode] = total / (ranks * sum(step_makespan(each, lockstep=mode) for each in rank_packs))
    tokens = np.concatenate([step.table.columns.tokens for step in planned])
    tokens = np.random.default_rng(0).permutation(tokens)  # within a step they are sorted by pack
    return {
        "planner": {"fill": _fill(planned), "utilisation": utilisation[False], "utilisation_lockstep": utilisation[True]},
        "next fit": _figures(_next_fit(tokens), tokens=tokens, ranks=ranks),
        "best fit decreasing, random ranks": _figures(_best_fit_decreasing(tokens), tokens=tokens, ranks=ranks),
        "padded buckets": _padded_buckets(tokens, ranks=ranks),
        "images_per_step": images / steps,
        "samples_per_second": images / seconds[False],
        "samples_per_second_lockstep": images / seconds[True],
    }


def _resume(corpus: SizeCorpus, *, ranks: int) -> Data:
    """Seconds from a saved state to the packs of a rank, with a new planner."""
    planner = _planner(corpus)
    for _ in range(3):
        planner.next_step()
    state = json.dumps(planner.state_dict())
    start = time.perf_counter()
    resumed = _planner(corpus)
    resumed.load_state_dict(json.loads(state))
    samples = [pack.samples for pack in assign_to_ranks(resumed.next_step(), ranks=ranks, lockstep=True)[0]]
    seconds = time.perf_counter() - start
    return {"rows": corpus.count, "seconds": seconds, "state_bytes": len(state), "images_of_a_rank": sum(map(len, samples))}


def _planner(corpus: SizeCorpus) -> Planner:
    return Planner([corpus], plan=PLAN, seed=0, width=WIDTH, diffusion_share=1, consistency_share=0)


def _fill(planned: Sequence[Step]) -> float:
    return sum(step.fill for step in planned) / len(planned)


def _next_fit(tokens: Ints) -> Ints:
    """Next fit: pack of each image, the open one or a new one."""
    packs, pack, used = np.empty(len(tokens), dtype=np.int64), 0, 0
    for image, needed in enumerate(tokens.tolist()):
        if used + needed > PLAN.tokens_per_pack:
            pack, used = pack + 1, 0
        used += needed
        packs[image] = pack
    return packs


def _best_fit_decreasing(tokens: Ints) -> Ints:
    """Best fit decreasing: pack of each image. Packs are numbered at random, and so assigned to random ranks."""
    max_packs = int(tokens.sum() / PLAN.tokens_per_pack * 1.02) + 2
    packs = fill_holes(tokens, room=np.full(max_packs, PLAN.tokens_per_pack))
    assert (packs != NO_ROOM).all()
    used, numbers = np.unique(packs, return_inverse=True)
    return np.random.default_rng(0).permutation(len(used))[numbers]


def _figures(packs: Ints, *, tokens: Ints, ranks: int) -> Data:
    """Fill and utilisation of packs in this order, without the last incomplete step."""
    of_images = image_costs(tokens, kinds=np.full_like(tokens, DIFFUSION), gamma=PLAN.gamma, width=WIDTH)
    costs, used = (np.bincount(packs, weights=values).astype(np.float64) for values in (of_images, tokens))
    return _utilisation(costs, used, costs, ranks=ranks)


def _padded_buckets(tokens: Ints, *, ranks: int) -> Data:
    """Batches of similar images, padded to the longest length of their bucket, in random order."""
    steps_down = np.floor(np.log2(PLAN.max_tokens / tokens) * BUCKETS_PER_DOUBLING)
    longest = np.floor(PLAN.max_tokens / 2 ** (steps_down / BUCKETS_PER_DOUBLING)).astype(np.int64)
    costs = image_costs(tokens, kinds=np.full_like(tokens, DIFFUSION), gamma=PLAN.gamma, width=WIDTH)
    padded_costs = image_costs(longest, kinds=np.full_like(tokens, DIFFUSION), gamma=PLAN.gamma, width=WIDTH)
    batches = []
    for length in np.unique(longest):
        bucket = np.flatnonzero(longest == length)
        batches += np.array_split(bucket, range(n := int(PLAN.tokens_per_pack // length), len(bucket), n))
    chosen = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
    return _utilisation(*(np.array([values[batch].sum() for batch in chosen]) for values in (costs, tokens, padded_costs)), ranks=ranks)


def _utilisation(costs: Floats, tokens: Floats, spent: Floats, *, ranks: int) -> Data:
    """Fill and utilisation of packs assigned in this order. costs: per pack, without padding; spent: with padding."""
    steps = len(costs) // PLAN.packs_per_step
    if not steps:
        raise ValueError("too few samples for one step: plan more steps")
    shape = (steps, -1, ranks)  # steps, micro-steps, ranks
    count = steps * PLAN.packs_per_step
    spent_SMR, total = spent[:count].reshape(shape), costs[:count].sum()
    return {
        "fill": float(tokens[:count].sum() / (count * PLAN.tokens_per_pack)),
        "utilisation": float(total / (ranks * spent_SMR.sum(axis=1).max(axis=1).sum())),
        "utilisation_lockstep": float(total / (ranks * spent_SMR.max(axis=2).sum())),
    }


def _corpus(name: str, *, draw: Draw, rows: int) -> SizeCorpus:
    """Corpus of random sizes of a mix, generated per shard."""
    return SizeCorpus(name=name, digest=name, count=rows, sizes=lambda first, last: draw(np.random.default_rng(first), last - first))


def _lognormal(random: np.random.Generator, count: int, *, megapixels: float, sigma: float) -> Sizes:
    area = random.lognormal(np.log(megapixels * 1e6), sigma, count)
    aspect = random.choice(ASPECTS, count)
    return np.rint(np.sqrt(area / aspect)).astype(np.int64), np.rint(np.sqrt(area * aspect)).astype(np.int64)


def _bimodal(random: np.random.Generator, count: int) -> Sizes:
    """Half of the sizes around 0.2, half around 8 megapixels."""
    small, large = (np.stack(_lognormal(random, count, megapixels=megapixels, sigma=0.3)) for megapixels in (0.2, 8))
    heights, widths = np.where(random.random(count) < 0.5, small, large)
    return heights, widths
