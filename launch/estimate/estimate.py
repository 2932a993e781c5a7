"""Estimate of a run: memory per rank under every ZeRO stage with and without checkpointing, time, price, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.config.schema import Config
from launch.estimate.activations import Parameter, PassBytes, parameters_of, pass_bytes, quick_pass_bytes
from launch.estimate.frozen_models import FrozenMemory, frozen_memory
from launch.estimate.memory import STAGES, Activations, RunFacts, Stage, StepMemory, largest_pack, step_memory
from launch.estimate.trained_part import TrainedPart
from launch.estimate.work import PlannedWork, planned_work
from launch.finetuning.trainable import trained_share
from launch.hardware.devices import Device
from pipeline.progress import Progress, no_progress
from tim.network import OFFICIAL_PARAMS

SMALL_BUCKET = 50_000_000  # elements; enough to keep the network between GPUs busy


@dataclass(frozen=True, slots=True)
class Setting:
    """A ZeRO stage and a checkpointing setting: memory of a step, whether it fits, and the largest pack that does."""

    zero: Stage
    checkpointing: str
    memory: StepMemory
    fits: bool
    largest_pack: int


@dataclass(frozen=True, slots=True)
class Situation:
    """What an estimate assumes. cached: latents, texts and teacher's tokens come from feature shards; quick: activations by formula."""

    ranks: int
    device: Device
    cached: bool = False
    quick: bool = False


def estimate(config: Config, situation: Situation, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Everything that `tim estimate` prints, as JSON types. Raises ValueError if a corpus cannot be planned."""
    work = work_of(config, situation)
    settings = []
    for setting in _settings(config, situation, work=work):
        settings.append(setting)
        progress("estimating", len(settings), 2 * len(STAGES))
    chosen = setting_of(config, situation, work=work)
    frozen = _frozen(config, situation, work=work)
    device, train = situation.device, config.train
    rate = device.efficiency * (device.bf16 if train.precision == "bf16" else device.fp32) * situation.ranks
    step_seconds = work.flops / train.steps / work.utilisation / rate
    hours = step_seconds * train.steps / 3600
    facts = _facts(config, situation, work=work)
    limit, changes = _advice(config, situation, work=work, chosen=chosen)
    return {
        "device": device.model_dump() | {"usable": device.usable},
        "ranks": situation.ranks,
        "parameters": facts.total,
        "trained": facts.trained,
        "steps": train.steps,
        "optimizer": train.optimizer,
        "precision": train.precision,
        "tokens_per_pack": config.plan.tokens_per_pack,
        "packs_per_step": config.plan.packs_per_step,
        "packs_per_rank": facts.packs,
        "settings": [_as_json(setting) for setting in settings],
        "chosen": _as_json(chosen),
        "host_bytes": _host_bytes(config, facts),
        "work": asdict(work),
        "step_seconds": step_seconds,
        "hours": hours,
        "device_hours": hours * situation.ranks,
        "price": hours * situation.ranks * device.price,
        "limit": limit,
        "changes": changes,
        "notes": list(frozen.notes),
    }


def setting_of(config: Config, situation: Situation, *, work: PlannedWork) -> Setting:
    """Memory of the run as it is configured."""
    facts, activations = _facts(config, situation, work=work), _activations(config, work=work, quick=situation.quick)
    memory = step_memory(facts, activations, stage=config.train.zero)
    largest = largest_pack(facts, activations, stage=config.train.zero, available=situation.device.usable)
    return Setting(config.train.zero, str(config.train.checkpointing), memory, memory.peak <= situation.device.usable, largest)


def work_of(config: Config, situation: Situation) -> PlannedWork:
    """Operations of the run's steps."""
    parameters = parameters_of(_params(config), limit=TrainedPart.of(config))
    trained = trained_share((each.shape, each.trained) for each in parameters.values())
    every = _every(config)
    return planned_work(config, ranks=situation.ranks, trained_share=trained, checkpointed_share=1 / every if every else 0.0)


def _settings(config: Config, situation: Situation, *, work: PlannedWork) -> Iterator[Setting]:
    for stage in STAGES:
        for checkpointing in ("none", "full"):
            train = config.train.model_copy(
                update={"zero": stage, "checkpointing": checkpointing, "deepspeed": _settings_for(config, stage)}
            )
            yield setting_of(config.model_copy(update={"train": train}), situation, work=work)


def _settings_for(config: Config, stage: Stage) -> dict[str, Any] | None:
    """DeepSpeed settings of a run in another stage: without offloading where it is not possible."""
    settings: Any = config.train.deepspeed
    if not isinstance(settings, dict) or stage:
        return settings
    return {key: value for key, value in settings.items() if key != "zero_optimization"}


def _facts(config: Config, situation: Situation, *, work: PlannedWork) -> RunFacts:
    parameters = parameters_of(_params(config), limit=TrainedPart.of(config))
    frozen = _frozen(config, situation, work=work)
    averages = len(config.train.ema) if isinstance(config.train.ema, tuple) else 1
    total = sum(_count(each) for each in parameters.values())
    settings: Any = config.train.deepspeed
    return RunFacts(
        parameters=parameters,
        matrices=frozenset(name for name, each in parameters.items() if name.startswith("blocks.") and len(each.shape) == 2),
        optimizer=config.train.optimizer,
        averages=0 if config.train.ema_device == "cpu" else averages,
        ranks=situation.ranks,
        packs=max(1, -(-config.plan.max_packs_per_step // situation.ranks)),
        tokens=config.plan.tokens_per_pack,
        frozen=frozen.weights,
        frozen_work=frozen.work,
        guidance=0.0 if config.objective.guidance is None else 2.0 * total,
        settings=settings if isinstance(settings, dict) else {},
    )


def _activations(config: Config, *, work: PlannedWork, quick: bool) -> Activations:
    objective, params = config.objective, _params(config)
    if quick:
        settings: dict[str, Any] = {"precision": config.train.precision, "checkpoint_every": _every(config)}
        return Activations(quick_pass_bytes(params, text_share=work.text_share, **settings), None, None, recomputed=_every(config) == 1)
    common: dict[str, Any] = {"rope": config.network.rope, "text_share": round(work.text_share, 3), "limit": TrainedPart.of(config)}

    def evaluation(precision: Any) -> PassBytes:
        return pass_bytes(params, **common, kind="evaluate", precision=precision)

    moves = any(diffusion < 1 for diffusion, _ in config.kind_shares())
    train = pass_bytes(
        params,
        **common,
        precision=config.train.precision,
        checkpoint_every=_every(config),
        alignment=objective.alignment is not None,
    )
    derivative = evaluation(objective.derivative_precision or "fp16") if moves else None
    guidance = None if objective.guidance is None else evaluation("bf16")
    return Activations(train, derivative, guidance, recomputed=_every(config) == 1)


def _frozen(config: Config, situation: Situation, *, work: PlannedWork) -> FrozenMemory:
    return frozen_memory(config, cached=situation.cached, tokens=config.plan.tokens_per_pack, images=work.images_in_pack)


def _advice(config: Config, situation: Situation, *, work: PlannedWork, chosen: Setting) -> tuple[str, list[str]]:
    """What limits the run, and changes, each with what it brings."""
    usable = situation.device.usable
    if not chosen.fits:
        largest = max(chosen.memory.parts, key=lambda part: chosen.memory.parts[part])
        limit = f"memory: a step takes {_gb(chosen.memory.peak)} of {_gb(usable)}, most of it {largest}"
        return limit, _savings(config, situation, work=work, chosen=chosen)
    changes = []
    if work.utilisation < 0.95:
        changes.append(
            f"plan.packs_per_step: a multiple of {situation.ranks}, or more packs for each rank: ranks wait {1 - work.utilisation:.0%} "
            "of the time"
        )
    if chosen.checkpointing != "none":
        free = config.model_copy(update={"train": config.train.model_copy(update={"checkpointing": "none"})})
        without = setting_of(free, situation, work=work)
        if without.fits:
            changes.append(f"train.checkpointing=none: fits, {_gb(without.memory.peak)}, and saves a forward pass of each pack")
    if chosen.largest_pack > 1.5 * config.plan.tokens_per_pack:
        changes.append(f"plan.tokens_per_pack: packs of up to {chosen.largest_pack:,} tokens fit; larger packs waste less of the GPU")
    if config.train.precision == "fp32":
        speed = situation.device.bf16 / situation.device.fp32
        changes.append(f"train.precision=bf16: matrix products are up to {speed:.0f} times faster")
    if _has_models(config, situation, work=work):
        changes.append(
            "corpus.features: cache latents and texts with `tim encode`; the time of codec, text encoder and teacher is not in the hours"
        )
    return "compute: the memory suffices", changes


def _savings(config: Config, situation: Situation, *, work: PlannedWork, chosen: Setting) -> list[str]:
    """Changes that save memory, one after another, until the step fits."""
    changes, train = [], config.train
    settings: dict[str, Any] = train.deepspeed if isinstance(train.deepspeed, dict) else {}
    zero = settings.get("zero_optimization") or {}
    small = {**settings, "zero_optimization": {**zero, "reduce_bucket_size": SMALL_BUCKET}}
    candidates: list[tuple[str, dict[str, Any]]] = [
        ("train.checkpointing=full", {"checkpointing": "full"}),
        ("train.zero=2", {"zero": 2}),
        (f"train.deepspeed.zero_optimization.reduce_bucket_size={SMALL_BUCKET}", {"deepspeed": small}),
        ("train.ema_device=cpu", {"ema_device": "cpu"}),
        ("train.optimizer=adamw8bit", {"optimizer": "adamw8bit"}),
        ("train.zero=3", {"zero": 3}),
    ]
    peak, current = chosen.memory.peak, situation
    if _has_models(config, situation, work=work):
        candidates.insert(0, ("features of `tim encode` (corpus.features)", {}))
    for name, update in candidates:
        place = replace(current, cached=current.cached or not update)
        tried = config.model_copy(update={"train": config.train.model_copy(update=update)})
        setting = setting_of(tried, place, work=work)
        if setting.memory.peak > peak * 0.98 or (update.get("zero") and (situation.ranks == 1 or config.train.zero >= update["zero"])):
            continue
        config, current, peak = tried, place, setting.memory.peak
        changes.append(f"{name}: {_gb(peak)}{', fits' if setting.fits else ''}")
        if setting.fits:
            return changes
    largest = setting_of(config, current, work=work).largest_pack
    if largest:
        return [*changes, f"plan.tokens_per_pack={largest}: fits then"]
    return [*changes, "LoRA (train.lora), more or larger GPUs, or a smaller network: not even one token fits then"]


def _has_models(config: Config, situation: Situation, *, work: PlannedWork) -> bool:
    """Whether models run in every step whose outputs could be cached."""
    names = set(_frozen(config, situation, work=work).weights)
    return bool(names - {"text encoder"} if config.text.kind == "lookup" else names)


def _host_bytes(config: Config, facts: RunFacts) -> float:
    """Host memory of a rank: copies of its checkpoint part while it is written, and averages that are kept there."""
    averages = len(config.train.ema) if isinstance(config.train.ema, tuple) else 1
    share = 4 * facts.trained / facts.ranks
    moments = {"adamw8bit": 0.5, "muon": 1.0}.get(config.train.optimizer, 2.0)
    kept = averages * share if config.train.ema_device == "cpu" else 0.0
    return share * (1 + averages + moments) + kept


def _as_json(setting: Setting) -> dict[str, Any]:
    return {
        "zero": setting.zero,
        "checkpointing": setting.checkpointing,
        "peak": setting.memory.peak,
        "phase": setting.memory.phase,
        "parts": dict(setting.memory.parts),
        "fits": setting.fits,
        "largest_pack": setting.largest_pack,
    }


def _params(config: Config) -> dict[str, Any]:
    """The network's parameters, complete."""
    return {**OFFICIAL_PARAMS, **config.network.params.model_dump(exclude_none=True)}


def _every(config: Config) -> int:
    checkpointing = config.train.checkpointing
    return {"none": 0, "full": 1}[checkpointing] if isinstance(checkpointing, str) else checkpointing


def _count(parameter: Parameter) -> int:
    return math.prod(parameter.shape)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
