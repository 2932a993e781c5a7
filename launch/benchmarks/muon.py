"""Our Muon beside DeepSpeed's (`tim bench step --muon`): step time, memory of states, and loss after equal steps.

Both train copies of one network on the same packs, in turns, on one rank under ZeRO 1. DeepSpeed's orthogonalises matrices while gradients
are put into partitions, and scales them otherwise; its learning rates are set so that both take the same step. What it reports as gradient
norm, and clips, are the orthogonalised updates: it is therefore also run with the default of `train.clip`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from launch.benchmarks.network import Bench, Data, Grid, synchronise
from launch.distributed.ranks import Ranks, process_group
from launch.engine.deepspeed_internals import import_deepspeed
from launch.engine.engine import Engine, deepspeed_config
from launch.engine.muon import MOMENTUM, hidden_matrices
from launch.engine.optimizers import ADAM_EPSILON
from pipeline.progress import Progress

LR, CLIP, BETAS = 1e-3, 1.0, (0.9, 0.95)
OURS, THEIRS, CLIPPED = "ours", "DeepSpeed's", "DeepSpeed's, clipped"


class _Variant(NamedTuple):
    forward: Any
    backward: Callable[[Tensor, int], None]
    update: Callable[[], object]
    state_bytes: Callable[[], int]


def compare_muon(grids: Sequence[Grid], *, width: int, depth: int, batch: int, steps: int, progress: Progress) -> Data:
    """Train `steps` steps of one pack of `batch` images each, four packs in turn. The first step warms up and is not timed."""
    bench = Bench(width=width, depth=depth)
    packs = [bench.inputs(grids[i : i + batch]) for i in range(0, min(len(grids), 4 * batch), batch)]
    with process_group() as ranks, ExitStack() as cleanup:
        common = {"precision": bench.precision, "cleanup": cleanup}
        variants = {
            OURS: _ours(copy.deepcopy(bench.network), ranks=ranks, **common),
            THEIRS: _deepspeeds(copy.deepcopy(bench.network), clip=0.0, **common),
            CLIPPED: _deepspeeds(copy.deepcopy(bench.network), clip=CLIP, **common),
        }
        seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
        losses: dict[str, list[float]] = {name: [] for name in variants}
        for step in range(steps):
            for position, (name, variant) in enumerate(variants.items()):
                of_step, loss = _step(bench, variant, packs[step % len(packs)])
                seconds[name].append(of_step)
                losses[name].append(loss)
                progress("measuring", step * len(variants) + position + 1, steps * len(variants))
        return {
            **bench.facts(),
            "steps": steps,
            **_times(seconds),
            "state_bytes": {name: variant.state_bytes() for name, variant in variants.items()},
            "error_before": {name: float(np.mean(of[: len(packs)])) for name, of in losses.items()},
            "error_after": {name: float(np.mean(of[-len(packs) :])) for name, of in losses.items()},
        }


def _times(seconds: dict[str, list[tuple[float, float, float]]]) -> Data:
    """Seconds of the fastest turns and our share of them, and quartiles of the ratios by turn. The first turn warms up."""
    whole, update, cpu = (np.array([[each[kind] for each in of[1:]] for of in seconds.values()]) for kind in range(3))
    others = [name for name in seconds if name != OURS]
    low, high = np.quantile(whole[0] / whole[1:], (0.25, 0.75), axis=1).tolist()
    return {
        "seconds_per_step": dict(zip(seconds, whole.min(axis=1).tolist(), strict=True)),
        "seconds_per_update": dict(zip(seconds, update.min(axis=1).tolist(), strict=True)),
        "ours_over_this": dict(zip(others, (whole[0].min() / whole[1:].min(axis=1)).tolist(), strict=True)),
        "quartiles": {name: f"{a:.3f} to {b:.3f}" for name, a, b in zip(others, low, high, strict=True)},
        "cpu_ours_over_this": dict(zip(others, (cpu[0].min() / cpu[1:].min(axis=1)).tolist(), strict=True)),
    }


def _step(bench: Bench, variant: _Variant, pack: Any) -> tuple[tuple[float, float, float], float]:
    """Seconds of a step, seconds of its update, processor seconds of the step, and the mean error of its images."""
    latents, text, rest = pack
    synchronise()
    start, start_of_cpu = time.perf_counter(), time.process_time()
    with bench.precise():
        found = bench.objective(variant.forward, latents, text, **rest)
    variant.backward(found.loss, len(latents))
    synchronise()
    middle = time.perf_counter()
    variant.update()
    synchronise()
    end = time.perf_counter()
    return (end - start, end - middle, time.process_time() - start_of_cpu), float(found.raw.mean())


def _ours(network: nn.Module, *, ranks: Ranks, precision: Any, cleanup: ExitStack) -> _Variant:
    engine = Engine(network, ranks=ranks, stage=1, precision=precision, optimizer="muon", betas=BETAS, clip=CLIP)
    cleanup.callback(engine.close)

    def state_bytes() -> int:
        return sum(fragment.values.nbytes for kind in engine.moments().values() for fragment in kind.values())

    return _Variant(engine, lambda loss, count: engine.accumulate(loss, count=count), lambda: engine.step(lr=LR), state_bytes)


def _deepspeeds(network: nn.Module, *, clip: float, precision: str, cleanup: ExitStack) -> _Variant:
    """DeepSpeed's Muon, with a group for each shape of matrices whose learning rate gives our scale."""
    library = import_deepspeed()
    hidden = {id(parameter) for parameter in hidden_matrices(network)}
    groups: dict[tuple[int, ...], dict[str, Any]] = {}
    adam = {"params": [], "use_muon": False, "lr": LR, "betas": BETAS, "eps": ADAM_EPSILON, "weight_decay": 0.0}
    for parameter in network.parameters():
        parameter.use_muon = id(parameter) in hidden  # pyright: ignore[reportAttributeAccessIssue]
        if id(parameter) not in hidden:
            adam["params"].append(parameter)
            continue
        rows, columns = shape = tuple(parameter.shape)
        scale = 0.2 * math.sqrt(max(shape)) / math.sqrt(max(1.0, rows / columns))
        settings = {"params": [], "use_muon": True, "lr": LR * scale, "momentum": MOMENTUM, "weight_decay": 0.0, "ns_method": "standard"}
        groups.setdefault(shape, settings)["params"].append(parameter)
    make = library.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam
    arguments = {"betas": BETAS, "eps": ADAM_EPSILON, "weight_decay": 0.0, "fused": True}
    optimizer = make([*groups.values(), adam], adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=arguments)
    config = deepspeed_config(stage=1, precision=precision, clip=clip)
    engine, *_ = library.initialize(model=network, optimizer=optimizer, config=config, dist_init_required=False)
    cleanup.callback(engine.destroy)

    def state_bytes() -> int:
        """Momentum, its copy of the step in hand, which the next step uses again, and Adam's moments."""
        momentum = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters() if id(parameter) in hidden)
        states = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
        return states + momentum

    return _Variant(engine, lambda loss, count: engine.backward(loss / count, scale_wrt_gas=False), engine.step, state_bytes)
