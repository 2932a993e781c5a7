"""Every attention backend against a float64 reference, image by image, and what the device has."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gpu.case import DTYPES, Case, relative_error
from tests.gpu.runner import Result
from tim import Segments
from tim.attention.dispatch import BACKENDS, AttentionRequirements, attention, choose_backend

BOUNDS = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 5e-3}
IMAGES, TEXTS = (1024, 300, 17, 1, 4096, 256, 1024), (77, 256, 1, 9, 30, 128, 5)  # tokens
TINY_IMAGES, TINY_TEXTS = (40, 17, 1, 40), (5, 9, 1, 30)


def device(case: Case) -> Result:
    """Rates of matrix products, and the backends that `auto` takes in training, for the derivative, and when sampling."""
    figures: dict[str, Any] = {f"matmul {name} TFLOP/s": case.matmul_rate(dtype) / 1e12 for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        figures[f"auto {name}"] = choose_backend(_needs(case, dtype, backward=True))
        figures[f"auto {name} without gradient"] = choose_backend(_needs(case, dtype, backward=False))
    fused = all(figures[f"auto {name}"] in ("flash", "varlen") for name in ("bf16", "fp16"))
    return Result(figures, expected={"auto takes a fused kernel in half precision": fused or not case.on_gpu})


def backends(case: Case) -> Result:
    """Values and gradients of self-attention and cross-attention of a pack, and the time of both passes."""
    figures: dict[str, Any] = {}
    bounds: dict[str, float] = {}
    expected: dict[str, bool] = {}
    for width in case.size((64, 72), (8,)):
        for precision, dtype in DTYPES.items():
            for backend in BACKENDS:
                label = f"{backend} {precision} width {width}"
                problem = _problem(case, dtype, backend)
                if problem is not None:
                    figures[label] = problem
                    continue
                try:
                    errors = _errors(case, backend, dtype, heads=case.size(4, 2), width=width)
                    if case.on_gpu:
                        figures[f"{label} ms"] = 1000 * _seconds(case, backend, dtype, width=width)
                except Exception as error:  # of one backend; the others are worth knowing
                    expected[f"{label} runs ({' '.join(str(error).split())[:200]})"] = False
                    continue
                figures |= {f"{label} {part}": error for part, error in errors.items()}
                bounds |= {f"{label} {part}": BOUNDS[precision] for part in errors}
    return Result(figures, bounds, expected)


def new_shapes(case: Case) -> Result:
    """Time of both passes of packs whose number of images and lengths no earlier pack had, and of the same packs again.

    A backend that plans for every shape is slow in training, where no two packs are alike. On Hopper, torch's varlen takes cuDNN.
    """
    figures: dict[str, Any] = {}
    for backend in BACKENDS:
        if _problem(case, torch.bfloat16, backend) is not None:
            continue
        first, again = [], []
        for number in range(case.size(6, 3)):
            lengths = [case.size(200, 4) + 37 * number + 13 * image for image in range(4 + number)]
            run = _both_passes(case, backend, torch.bfloat16, lengths, heads=case.size(16, 2), width=case.size(72, 8))
            first.append(case.seconds(run, repeats=1, warmup=0))
            again.append(case.seconds(run, repeats=3, warmup=0))
        figures[f"{backend}: ms of a new shape"] = 1000 * statistics.median(first[1:])
        figures[f"{backend}: ms of a known shape"] = 1000 * statistics.median(again[1:])
    return Result(figures)


def _needs(case: Case, dtype: torch.dtype, *, backward: bool) -> AttentionRequirements:
    capability = torch.cuda.get_device_capability(case.device) if case.on_gpu else None
    return AttentionRequirements(case.device.type, dtype, backward=backward, capability=capability)


def _problem(case: Case, dtype: torch.dtype, backend: str) -> str | None:
    """Why a backend cannot run both passes; None if it can. On a CPU the forward pass is enough."""
    try:
        choose_backend(_needs(case, dtype, backward=case.on_gpu), backend)
    except ValueError as error:
        return str(error)
    return None


def _errors(case: Case, backend: str, dtype: torch.dtype, *, heads: int, width: int) -> dict[str, float]:
    """Largest relative errors of the output and of the gradients: of self-attention, cross-attention, and with an empty caption."""
    images, texts = list(case.size(IMAGES, TINY_IMAGES)), list(case.size(TEXTS, TINY_TEXTS))
    errors: dict[str, list[float]] = {}
    for keys in (images, texts, [0, *texts[1:]]):
        backward = case.device.type in BACKENDS[backend].backward
        q, k, v = (
            case.randn(sum(lengths), heads, width, seed=seed, dtype=dtype).requires_grad_(backward)
            for seed, lengths in enumerate((images, keys, keys))
        )
        q_segments, kv_segments = (Segments.from_lengths(lengths, case.device) for lengths in (images, keys))
        out = attention(q, k, v, q_segments, kv_segments, backend=backend)
        doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
        expected = reference(doubles[0], doubles[1], doubles[2], images, keys)
        errors.setdefault("forward", []).append(relative_error(out, expected))
        if backward:
            weights = case.randn(*out.shape, seed=9, dtype=dtype)
            actual = torch.autograd.grad(out, (q, k, v), weights)
            wanted = torch.autograd.grad(expected, doubles, weights.double())
            errors.setdefault("backward", []).append(relative_error(actual, wanted))
    return {part: max(values) for part, values in errors.items()}


def _seconds(case: Case, backend: str, dtype: torch.dtype, *, width: int) -> float:
    """Both passes of a pack of 16 images of 1024 tokens with 16 heads."""
    return case.seconds(_both_passes(case, backend, dtype, [1024] * 16, heads=16, width=width))


def _both_passes(case: Case, backend: str, dtype: torch.dtype, lengths: list[int], *, heads: int, width: int) -> Callable[[], object]:
    """Self-attention of a pack with its backward pass, if the backend has one here."""
    backward = case.device.type in BACKENDS[backend].backward
    segments = Segments.from_lengths(lengths, case.device)
    q, k, v = (case.randn(sum(lengths), heads, width, seed=seed, dtype=dtype).requires_grad_(backward) for seed in range(3))
    weights = torch.ones_like(q)

    def run() -> object:
        out = attention(q, k, v, segments, segments, backend=backend)
        return torch.autograd.grad(out, (q, k, v), weights) if backward else out

    return run


def reference(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], kv_lengths: list[int]) -> Tensor:
    """Attention of each segment from matrix products and a softmax; zeros for a segment without keys."""
    outputs = []
    for q_THD, k_SHD, v_SHD in zip(q.split(q_lengths), k.split(kv_lengths), v.split(kv_lengths), strict=True):
        scores = torch.einsum("thd,shd->hts", q_THD, k_SHD) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v_SHD))
    return torch.cat(outputs)
