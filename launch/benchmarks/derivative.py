"""Accuracy of the objective's finite difference, over precision, epsilon, time and depth of the network.

Errors are relative to the exact derivative, by forward-mode differentiation in float64: norm of the difference over norm of the exact one,
both over all tokens. Times are drawn evenly in each of `BINS` parts of the transport's range, and r evenly below t.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dataprep.synthetic import figures, random_view
from launch.benchmarks.network import grids_of
from launch.config.load import load_config
from launch.demo import RECIPE
from launch.distributed.device import training_device
from launch.sampling.model_source import NO_REPLACEMENTS, make_generator, open_model
from pipeline.progress import Progress
from tim import Generator, PackedText, PackedTokens, TransitionObjective, TransitionTransformer, codecs, text, transports
from tim.model_kinds import Dtype
from tim.objective import EPSILONS
from tim.packed import Condition
from tim.transports import Transport

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
BINS = 5
Errors = dict[str, dict[str, dict[str, float]]]  # by time bin (or "all"), dtype and epsilon


@dataclass(frozen=True, slots=True)
class Case:
    """A network in float32 on its device, and images with their conditions."""

    weights: str
    network: TransitionTransformer
    transport: Transport
    latents: list[Tensor]
    condition: Condition


def bench_derivative(
    *,
    model: Path | None,
    prompts: Sequence[str | int],
    depths: Sequence[int],
    epsilons: Sequence[float],
    images: int,
    max_tokens: int,
    log: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Measure the demo's network with random weights at each of `depths`, and `model` (any that `tim sample` accepts) with its weights.

    `model` draws the images for its own measurement, from `prompts`.
    """
    tried = sorted({*epsilons, *EPSILONS.values()})
    grids = grids_of([], max_tokens=max_tokens)[:images]
    networks = []
    cases = len(depths) + (model is not None)
    for number, case in enumerate(_cases(model, prompts=prompts, depths=depths, grids=grids, log=log)):
        progress("measuring", number, cases)
        errors, repeated = _errors(case, epsilons=tried)
        networks.append({"weights": case.weights, "depth": case.network.params["depth"], "errors": errors, "repeated": repeated})
        progress("measuring", number + 1, cases)
    return {
        "device": training_device().type,
        "images": len(grids),
        "largest": max(height * width for height, width in grids),
        "defaults": EPSILONS,
        "networks": networks,
    }


def describe_derivative(data: Mapping[str, Any]) -> str:
    """Format one table per network: errors by epsilon over all times, and by time at each dtype's default epsilon (marked with *)."""
    lines = [f"relative error of the derivative on {data['device']}, {data['images']} images of at most {data['largest']} tokens"]
    for network in data["networks"]:
        errors, depth = network["errors"], network["depth"]
        lines += ["", f"{network['weights']} weights, {depth} block{'s' * (depth > 1)}", _row("epsilon", DTYPES)]
        for epsilon in errors["all"]["fp32"]:
            marks = ["*" if float(epsilon) == data["defaults"][dtype] else "" for dtype in DTYPES]
            lines.append(_row(epsilon, [f"{errors['all'][dtype][epsilon]:.2g}{mark}" for dtype, mark in zip(DTYPES, marks, strict=True)]))
        lines.append(_row("t, at *", [""] * len(DTYPES)).rstrip())
        for name in errors:
            if name != "all":
                lines.append(_row(name, [f"{errors[name][dtype][str(data['defaults'][dtype])]:.2g}" for dtype in DTYPES]))
        if network["repeated"]:
            lines.append(f"  overflowed in fp16 and repeated in fp32: {network['repeated']} packs")
    if all(network["weights"] == "random" for network in data["networks"]):
        lines += ["", "Random weights only: give a trained network with --model."]
    return "\n".join(lines)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:12}" + "".join(f"{cell:>10}{' ' * (not cell.endswith('*'))}" for cell in cells)


def _cases(
    model: Path | None,
    *,
    prompts: Sequence[str | int],
    depths: Sequence[int],
    grids: Sequence[tuple[int, int]],
    log: Callable[[str], None],
) -> Iterator[Case]:
    for depth in depths:
        yield _random_case(depth, grids)
    if model is not None:
        opened = open_model(model, recipe=None, replacements=NO_REPLACEMENTS, log=log)
        yield _trained_case(make_generator(opened.network, opened.spec, device=training_device(), dtype="fp32"), prompts, grids)


def _random_case(depth: int, grids: Sequence[tuple[int, int]]) -> Case:
    """The demo's network with random weights. Layers that it initialises to zero are random too, so that every block counts."""
    config = load_config(RECIPE, overrides=[f"network.params.depth={depth}"])
    device = training_device()
    torch.manual_seed(0)
    params = config.network.params.model_dump(exclude_none=True)
    network = TransitionTransformer.from_official(params, rope=config.network.rope)
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.xavier_uniform_(parameter)
    rng, choices = np.random.default_rng(0), figures()
    chosen = [choices[i % len(choices)] for i in rng.permutation(len(grids))]
    stride = network.patch_size
    views = [random_view(figure, height=h * stride, width=w * stride, rng=rng) for figure, (h, w) in zip(chosen, grids, strict=True)]
    encoder = text.make("lookup", width=params["cap_feat_dim"], max_tokens=config.text.max_tokens, device=device)
    return Case(
        weights="random",
        network=network.to(device).requires_grad_(False),
        transport=transports.make(config.objective.transport),
        latents=codecs.make("pixel").encode([_pixels(view, device) for view in views]).means,
        condition=PackedText.from_features(encoder.encode([figure.caption for figure in chosen])),
    )


def _trained_case(generator: Generator, prompts: Sequence[str | int], grids: Sequence[tuple[int, int]]) -> Case:
    """A trained network and images that it draws itself, with its default settings. The n-th image has seed n."""
    asked = [prompts[i % len(prompts)] for i in range(len(grids))]
    drawn = generator(
        asked,
        height=[height * generator.stride for height, _ in grids],
        width=[width * generator.stride for _, width in grids],
        seed=list(range(len(grids))),
    )
    if generator.text is None:
        condition: Condition = torch.tensor(asked, device=generator.device)
    else:
        condition = PackedText.from_features(generator.text.encode([str(prompt) for prompt in asked]))
    latents = generator.codec.encode([_pixels(image, generator.device) for image in drawn]).means
    return Case("trained", generator.network, generator.transport, latents, condition)


def _pixels(image: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).to(device)


def _errors(case: Case, *, epsilons: Sequence[float]) -> tuple[Errors, int]:
    """Relative errors, and the number of packs that overflowed in fp16."""
    settings: list[tuple[Dtype, float]] = [(dtype, epsilon) for dtype in DTYPES for epsilon in epsilons]
    patch, transport = case.network.patch_size, case.transport
    packed = PackedTokens.from_latents(case.latents, patch)
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(packed.tokens.shape, generator=draws).to(packed.tokens.device)
    double = copy.deepcopy(case.network).double()
    edges = transport.times(BINS).flip(0)
    squared = {"exact": torch.zeros(BINS), **{setting: torch.zeros(BINS) for setting in settings}}
    repeated = 0
    for number, (low, high) in enumerate(pairwise(edges)):
        u, v = torch.rand(2, len(case.latents), generator=draws, dtype=torch.float64)
        t = low + (high - low) * u
        r = transport.end + (t - transport.end) * v
        exact, _ = TransitionObjective(transport, patch_size=patch, derivative="jvp").path_derivative(
            double, packed._replace(tokens=packed.tokens.double()), noise.double(), _double(case.condition), t=t, r=r
        )
        squared["exact"][number] = exact.square().sum()
        for dtype, epsilon in settings:
            objective = TransitionObjective(transport, patch_size=patch, derivative_precision=dtype, epsilon=epsilon)
            found, overflowed = objective.path_derivative(case.network, packed, noise, case.condition, t=t, r=r)
            squared[dtype, epsilon][number] = (found - exact).square().sum()
            repeated += overflowed
    names = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]

    def relative(setting: tuple[Dtype, float], bins: slice) -> float:
        return float((squared[setting][bins].sum() / squared["exact"][bins].sum()).sqrt())

    parts = {"all": slice(None), **{name: slice(i, i + 1) for i, name in enumerate(names)}}
    errors = {name: {d: {str(e): relative((d, e), bins) for e in epsilons} for d in DTYPES} for name, bins in parts.items()}
    return errors, repeated


def _double(condition: Condition) -> Condition:
    return condition._replace(features=condition.features.double()) if isinstance(condition, PackedText) else condition
