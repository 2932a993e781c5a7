"""Gradients of an engine as its optimizer gets them."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from launch.engine.engine import Engine, StepResult


def step_with_gradients(engine: Engine, *, lr: float) -> tuple[dict[str, Tensor], StepResult]:
    """`engine.step`, and the full gradients: summed over packs and ranks, before clipping and the update."""
    from deepspeed.utils import safe_get_full_grad

    gradients: dict[str, Tensor] = {}
    optimizer = engine._engine.optimizer
    update = optimizer.step

    def step(*arguments: Any, **settings: Any) -> Any:
        for name, parameter in engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if gradient is not None:
                gradients[name] = gradient.clone()
        return update(*arguments, **settings)

    with mock.patch.object(optimizer, "step", step):
        result = engine.step(lr=lr)
    return gradients, result
