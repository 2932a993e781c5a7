"""Difference of images sampled in half precision from those of the same noise in float32, in 8-bit levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from launch.distributed.device import training_device
from launch.sampling.model_source import NO_REPLACEMENTS, make_generator, open_model
from pipeline.progress import Progress
from tim import Generator
from tim.model_kinds import Dtype
from tim.sampling.sampler import default_dtype

HALF: tuple[Dtype, ...] = tuple(dtype for dtype in get_args(Dtype) if dtype != "fp32")


def bench_precision(
    model: Path,
    *,
    prompts: Sequence[str | int],
    sizes: Sequence[tuple[int, int]],
    steps: Sequence[int],
    log: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Sample every prompt at every size (height, width) in each dtype. `model` is one that `tim sample` accepts."""
    opened = open_model(model, recipe=None, replacements=NO_REPLACEMENTS, log=log)
    device = training_device()
    generator = make_generator(opened.network, opened.spec, device=device)
    requests = list(product(prompts, sizes))
    levels: dict[str, dict[str, dict[str, float]]] = {dtype: {} for dtype in HALF}
    total = len(steps) * (1 + len(HALF))
    for number, count in enumerate(steps):
        progress("sample", number * (1 + len(HALF)), total)
        exact = _levels(generator, requests, steps=count, dtype="fp32")
        for turn, dtype in enumerate(HALF, 1):
            difference = np.abs(_levels(generator, requests, steps=count, dtype=dtype) - exact)
            levels[dtype][f"{count} step{'s' * (count > 1)}"] = {
                "mean": float(difference.mean()),
                "percentile_99": float(np.percentile(difference, 99)),
                "maximum": int(difference.max()),
            }
            progress("sample", number * (1 + len(HALF)) + turn, total)
    return {"device": device.type, "default": default_dtype(device), "images": len(requests), **levels}


def _levels(generator: Generator, requests: Sequence[tuple[str | int, tuple[int, int]]], *, steps: int, dtype: Dtype) -> NDArray[np.int64]:
    """All pixels of the images, one after another. The n-th image has seed n."""
    generator.dtype = dtype
    images = generator(
        [prompt for prompt, _ in requests],
        height=[height for _, (height, _) in requests],
        width=[width for _, (_, width) in requests],
        steps=steps,
        seed=list(range(len(requests))),
    )
    return np.concatenate([np.asarray(image, dtype=np.int64).ravel() for image in images])
