"""Memory per rank of a training step under each ZeRO stage, as DeepSpeed 0.19 and the engine lay it out.

Weights, gradients, moments and averages are float32. What is there in all phases of a step adds up; the phases (frozen models, derivative,
forward and backward, update) follow each other, so the most expensive one counts.

Legend: P parameters, T trained parameters, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.config.deepspeed_settings import offloads
from launch.estimate.activations import Parameter, PassBytes

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
FULL = 4  # bytes of a float32 number
GATHERED = 2  # of a matrix's number that Muon gathers on a GPU
BUCKET = 500_000_000  # DeepSpeed's default for reduce_bucket_size, in elements
PERSISTENT = 100_000  # its default for stage3_param_persistence_threshold
LIVE = 1_000_000_000  # its defaults for stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the memory of a run depends on, apart from ZeRO stage and activations.

    parameters: of the network; matrices: names of those that Muon updates; averages: number of averages on the device; packs: most packs
    of a step on a rank; tokens: of a pack; frozen, frozen_work: bytes of codec, text encoder and teacher, and of their activations;
    guidance: bytes of the guidance network; settings: of DeepSpeed.
    """

    parameters: Mapping[str, Parameter]
    matrices: frozenset[str]
    optimizer: str
    averages: int
    ranks: int
    packs: int
    tokens: int
    frozen: Mapping[str, float] = field(default_factory=dict)
    frozen_work: float = 0.0
    guidance: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(math.prod(each.shape) for each in self.parameters.values())

    @property
    def trained(self) -> int:
        return sum(math.prod(each.shape) for each in self.parameters.values() if each.trained)

    def trained_in(self, names: frozenset[str]) -> int:
        """Trained elements of some of the parameters."""
        return sum(math.prod(each.shape) for name, each in self.parameters.items() if each.trained and name in names)

    @property
    def zero_settings(self) -> Mapping[str, Any]:
        return self.settings.get("zero_optimization") or {}


@dataclass(frozen=True, slots=True)
class Activations:
    """Passes of the network: train (forward and backward), derivative and guidance (forward without gradient, over twice the tokens).

    recomputed: whether all blocks are checkpointed.
    """

    train: PassBytes
    derivative: PassBytes | None
    guidance: PassBytes | None
    recomputed: bool = False

    def evaluations(self, tokens: int) -> float:
        """Bytes of the most expensive pass without gradient."""
        return max((each.of(2 * tokens) for each in (self.derivative, self.guidance) if each is not None), default=0.0)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of a step on a rank. parts: by what they are for, at the peak; phase: when the peak is."""

    stage: Stage
    parts: Mapping[str, float]
    phase: str

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


def step_memory(facts: RunFacts, activations: Activations, *, stage: Stage, tokens: int | None = None) -> StepMemory:
    """Memory of a step with packs of `tokens` tokens (default: those of the run)."""
    tokens = facts.tokens if tokens is None else tokens
    resident = _resident(facts, stage=stage)
    gradients, buffers, update = _gradients(facts, stage=stage), _buffers(facts, stage=stage), _update(facts, stage=stage)
    train = activations.train.of(tokens)
    if stage < 2 and facts.packs == 1:  # gradients take the place of activations, block by block
        in_passes = {"gradients": max(0.0, gradients - train), "activations": train}
    else:
        in_passes = {"gradients": gradients, "activations": train}
    before = gradients if facts.packs > 1 or stage == 3 else 0.0  # of the packs before
    phases = {
        "frozen models": {"gradients": before, "activations": facts.frozen_work},
        "derivative": {"gradients": before, "activations": activations.evaluations(tokens), "buffers": buffers if before else 0.0},
        "forward and backward": {**in_passes, "buffers": buffers},
        "update": {"gradients": gradients, "buffers": update},
    }
    gathered = _gathered(facts, stage=stage, recomputed=activations.recomputed)
    for phase in ("derivative", "forward and backward"):
        phases[phase]["gathered weights"] = gathered
    peak = max(phases, key=lambda phase: sum(phases[phase].values()))
    return StepMemory(stage, {name: bytes_ for name, bytes_ in {**resident, **phases[peak]}.items() if bytes_}, peak)


def largest_pack(facts: RunFacts, activations: Activations, *, stage: Stage, available: float) -> int:
    """Largest number of tokens per pack whose step takes no more than the `available` bytes; 0 if there is none."""
    low, high = 0, 1 << 22
    while low < high:
        middle = (low + high + 1) // 2
        if step_memory(facts, activations, stage=stage, tokens=middle).peak <= available:
            low = middle
        else:
            high = middle - 1
    return low


def _resident(facts: RunFacts, *, stage: Stage) -> dict[str, float]:
    """What a rank holds in every phase."""
    ranks = facts.ranks if stage else 1
    share = FULL * facts.trained / facts.ranks
    on_host = stage > 0 and offloads(facts.settings)
    masters = 0.0 if stage == 0 or on_host else share
    weights = FULL * facts.total
    if stage == 3:
        weights = 0.0 if (facts.zero_settings.get("offload_param") or {}).get("device") == "cpu" else weights / facts.ranks
    return {
        "weights": weights + masters,
        "moments": 0.0 if on_host else _moments(facts) / ranks,
        "averages": 0.0 if on_host else facts.averages * share,
        **facts.frozen,
        "guidance network": facts.guidance,
    }


def _moments(facts: RunFacts) -> float:
    """Bytes of the optimizer's moments of all ranks."""
    trained = facts.trained
    if facts.optimizer == "muon":
        hidden = facts.trained_in(facts.matrices)
        return FULL * hidden + 2 * FULL * (trained - hidden)
    if facts.optimizer == "adamw8bit":
        matrices = sum(math.prod(each.shape) for each in facts.parameters.values() if each.trained and len(each.shape) > 1)
        return 2 * matrices * (1 + FULL / 256) + 2 * FULL * (trained - matrices)
    return 2 * FULL * trained


def _gradients(facts: RunFacts, *, stage: Stage) -> float:
    """Gradients that packs add up in. ZeRO 2 and 3 keep a rank's share; with offloading it is in host memory."""
    if stage >= 2:
        return 0.0 if offloads(facts.settings) else FULL * facts.trained / facts.ranks
    return FULL * facts.trained


def _buffers(facts: RunFacts, *, stage: Stage) -> float:
    """Buckets that gradients are reduced in."""
    bucket = FULL * facts.zero_settings.get("reduce_bucket_size", BUCKET)
    return 0.0 if stage == 0 else bucket * (2 if facts.zero_settings.get("overlap_comm") and stage < 3 else 1)


def _gathered(facts: RunFacts, *, stage: Stage, recomputed: bool) -> float:
    """Whole weights that ZeRO 3 keeps between layers: up to its limit all of them, because it sees that the backward pass needs them again.

    Blocks that are computed again are gathered one after another, beside small parameters, which stay.
    """
    if stage < 3:
        return 0.0
    if not recomputed:
        return FULL * min(facts.total, facts.zero_settings.get("stage3_max_live_parameters", LIVE))
    limit = facts.zero_settings.get("stage3_param_persistence_threshold", PERSISTENT)
    sizes = {name: math.prod(each.shape) for name, each in facts.parameters.items()}
    block = sum(size for name, size in sizes.items() if name.startswith("blocks.0.") and size > limit)
    return FULL * (block + sum(size for size in sizes.values() if size <= limit))


def _update(facts: RunFacts, *, stage: Stage) -> float:
    """Temporary memory of an update, beyond gradients."""
    if stage and offloads(facts.settings):
        return _buffers(facts, stage=stage)
    share = FULL * facts.trained / facts.ranks
    muon = 0.0
    if facts.optimizer == "muon" and stage:
        hidden = facts.trained_in(facts.matrices)
        muon = hidden * GATHERED + 2 * FULL * hidden / facts.ranks
    if stage == 0:
        return min(FULL * facts.trained, FULL * BUCKET)
    if stage == 3:
        return _buffers(facts, stage=stage) + share + muon
    return (_buffers(facts, stage=stage) if stage == 1 else 0.0) + share + muon
