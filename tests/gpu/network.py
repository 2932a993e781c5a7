"""The network and its objective in half precision against float32: packs, a training step, the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.gpu.case import DTYPES, TINY, Case, Inputs, relative_error
from tests.gpu.runner import Result
from tim import PackedTokens, TransitionObjective, TransitionTransformer, transports
from tim.objective import CONSISTENCY, DIFFUSION, EPSILONS, TRANSITION

MIDDLE = {**TINY, "in_channels": 32, "depth": 8, "hidden_size": 1152, "cap_feat_dim": 1152, "num_heads": 16, "lora_hidden_size": 384}
GRIDS, TEXTS = ((32, 32), (16, 48), (9, 7), (1, 1), (64, 64)), (77, 256, 3, 1, 20)
TINY_GRIDS, TINY_TEXTS = ((4, 4), (2, 6), (3, 5), (1, 1), (5, 3)), (5, 7, 3, 1, 4)
KINDS = (DIFFUSION, TRANSITION, CONSISTENCY, TRANSITION, TRANSITION)
DERIVATIVE_BOUNDS = {"fp32": 0.02, "fp16": 0.1, "bf16": 0.5}


def packed_equals_single(case: Case) -> Result:
    """Outputs and gradients of a pack against those of its images one by one."""
    network, inputs = _network(case), _inputs(case)
    figures: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for precision, bound in (("fp32", 1e-4), ("bf16", 5e-2), ("fp16", 1e-2)):
        with _autocast(case, precision):
            together = _forward(case, network, inputs)
            alone = [_forward(case, network, inputs.image(i), times=slice(i, i + 1)) for i in range(len(inputs.latents))]
        figures[f"{precision} output"] = relative_error(together, torch.cat(alone))
        if precision != "fp16":  # which nobody trains in: gradients would need scaling
            gradients, separate = (_gradients(network, out.square().sum()) for out in (together, torch.cat(alone)))
            figures[f"{precision} gradient"] = relative_error(list(gradients.values()), list(separate.values()))
        bounds |= {name: bound for name in figures if name.startswith(precision)}
    return Result(figures, bounds)


def half_step(case: Case) -> Result:
    """Loss and gradient of a training step in bf16 autocast against float32, also of the part that sums over all tokens of an image."""
    network, inputs = _network(case), _inputs(case)
    loss, gradients = _step(case, network, inputs, "fp32")
    half_loss, half = _step(case, network, inputs, "bf16")
    errors = {"loss": abs(half_loss - loss) / abs(loss)}
    for part, names in _parts(network).items():
        errors[part] = relative_error([half[n] for n in names], [gradients[n] for n in names])
    return Result(errors, dict.fromkeys(errors, 0.1))


def derivative(case: Case) -> Result:
    """df/dt by finite differences in each precision against the exact one in float32, and the repetition after an overflow."""
    network, inputs = _network(case), _inputs(case)
    exact = _rate(case, network, inputs, precision="fp32", method="jvp")
    figures: dict[str, Any] = {"norm": float(exact.norm())}
    for precision, epsilon in EPSILONS.items():
        figures[f"{precision}, epsilon {epsilon}"] = relative_error(_rate(case, network, inputs, precision=precision), exact)
    bounds = {f"{precision}, epsilon {EPSILONS[precision]}": bound for precision, bound in DERIVATIVE_BOUNDS.items()}
    with torch.no_grad():
        network.final_layer.linear.weight.mul_(1e7)
    losses = _objective("fp16")(network, inputs.latents, inputs.text, **_draws(case, inputs))
    return Result(figures, bounds, {"an overflow in fp16 is repeated": losses.repeated and bool(torch.isfinite(losses.loss))})


def _network(case: Case) -> TransitionTransformer:
    return case.network(case.size(MIDDLE, TINY), std=case.size(0.02, 0.1))


def _inputs(case: Case) -> Inputs:
    return case.pack(case.size(MIDDLE, TINY), case.size(GRIDS, TINY_GRIDS), case.size(TEXTS, TINY_TEXTS))


def _autocast(case: Case, precision: str) -> torch.autocast:
    dtype = DTYPES[precision if precision != "fp32" else "bf16"]
    return torch.autocast(case.device.type, dtype, enabled=precision != "fp32")


def _forward(case: Case, network: TransitionTransformer, inputs: Inputs, *, times: slice = slice(None)) -> Tensor:
    t = torch.linspace(0.2, 0.9, len(GRIDS), device=case.device)[times]
    return network(inputs.packed(network.patch_size), t, t / 2, inputs.text).tokens


def _gradients(network: TransitionTransformer, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(network.parameters())), strict=True))


def _objective(precision: str, *, method: str = "finite-difference") -> TransitionObjective:
    return TransitionObjective(
        transports.make("ot_fm"), patch_size=1, pixels_per_cell=32, derivative=method, derivative_precision=precision, equal_forwards=False
    )


def _draws(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The other arguments of the objective. Times and weights are on the host, as the loader gives them."""
    uniforms = torch.rand(len(KINDS), 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return {"noise": inputs.noise, "kinds": torch.tensor(KINDS), "uniforms": uniforms, "weights": torch.ones(len(KINDS))}


def _step(case: Case, network: TransitionTransformer, inputs: Inputs, precision: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients. The derivative is in float32, so that only the step differs."""

    def trained(*arguments: Any) -> Any:
        with _autocast(case, precision):
            return network(*arguments)

    losses = _objective("fp32")(trained, inputs.latents, inputs.text, **_draws(case, inputs), derivative_network=network)
    return float(losses.loss.detach()), _gradients(network, losses.loss)


def _parts(network: TransitionTransformer) -> dict[str, list[str]]:
    """All parameters, and those whose gradient is a sum over the tokens of each image."""
    names = [name for name, _ in network.named_parameters()]
    return {"gradient": names, "gradient of modulation": [n for n in names if "adaLN" in n or "qkv_d" in n]}


def _rate(case: Case, network: TransitionTransformer, inputs: Inputs, *, precision: str, method: str = "finite-difference") -> Tensor:
    """df/dt of a pack, zero where r = t."""
    objective, draws = _objective(precision, method=method), _draws(case, inputs)
    t, r = objective.draw_times(draws["uniforms"], draws["kinds"], inputs.latents)
    noise = PackedTokens.from_latents(inputs.noise, network.patch_size).tokens
    return objective.path_derivative(network, inputs.packed(network.patch_size), noise, inputs.text, t=t, r=r)[0]
