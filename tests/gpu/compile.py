"""`train.compile`: what it compiles computes the same, once for packs of all sizes."""

from __future__ import annotations

import time
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.case import TINY, Case, Inputs, relative_error
from tests.gpu.network import MIDDLE
from tests.gpu.runner import Result
from tim import TransitionTransformer

GRAPHS = 1 + 4  # with gradient packs are padded to one size, without to quarters of it


def compiled(case: Case) -> Result:
    """Outputs and gradients with and without compilation, and the number of compilations."""
    params = {**case.size(MIDDLE, TINY), "depth": case.size(2, 1)}
    plain, fused = (case.network(params, std=case.size(0.02, 0.1)) for _ in range(2))
    packs = [_inputs(case, params, number) for number in range(case.size(8, 4))]
    full = max(sum(latents[0].numel() for latents in inputs.latents) for inputs in packs) // params["patch_size"] ** 2
    with mock.patch.object(torch, "compile", compiler(case)):
        fused.configure_execution(compile_for=full)
        torch.compiler.reset()
        start, seconds = time.monotonic(), 0.0
        outputs, gradients = [], []
        for inputs in packs:
            with torch.autocast(case.device.type, torch.bfloat16):
                (out, gradient), (wanted, wanted_gradient) = (_both_passes(network, inputs) for network in (fused, plain))
                with torch.no_grad():
                    _forward(fused, inputs)
            outputs.append(relative_error(out, wanted))
            gradients.append(relative_error(gradient, wanted_gradient))
            if not seconds:
                case.synchronize()
                seconds = time.monotonic() - start
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    figures: dict[str, Any] = {"output": max(outputs), "gradient": max(gradients), "graphs": graphs, "seconds of the first pack": seconds}
    bounds = {"output": 3e-2, "gradient": 5e-2, "graphs": GRAPHS}
    return Result(figures, bounds, {"something was compiled": graphs > 0})


def compiler(case: Case) -> Any:
    """torch.compile; for tiny sizes only its tracing and guards, because kernels take a minute to compile."""
    return partial(torch.compile, backend="eager") if case.tiny else torch.compile


def _inputs(case: Case, params: dict[str, Any], number: int) -> Inputs:
    """A pack of 2 to 5 images, different for every number."""
    side = case.size(8, 2)
    count = 2 + number % 4
    grids = [(side + number + i, side + 2 * i) for i in range(count)]
    return case.pack(params, grids, [3 + number + i for i in range(count)], seed=1000 * number)


def _forward(network: TransitionTransformer, inputs: Inputs) -> Tensor:
    t = torch.linspace(0.2, 0.9, len(inputs.latents), device=inputs.latents[0].device)
    return network(inputs.packed(network.patch_size), t, t / 2, inputs.text).tokens


def _both_passes(network: TransitionTransformer, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    out = _forward(network, inputs)
    return out, list(torch.autograd.grad(out.square().mean(), list(network.parameters())))
