"""Optimizers by name, and their moments."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from launch.config.deepspeed_settings import Settings, offloads
from launch.engine.moments import Moments
from launch.engine.muon import Muon
from launch.engine.replicated import ReplicatedAdamW, ReplicatedMuon

ADAM_EPSILON = 1e-6  # as in the published TiM training
KINDS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("exp_avg", "exp_avg_sq", "momentum")}  # of moments: state keys of AdamW and Muon
CLASSES = {  # by name, and whether nothing is sharded (ZeRO 0)
    ("adamw", False): torch.optim.AdamW,
    ("adamw", True): ReplicatedAdamW,
    ("muon", False): Muon,
    ("muon", True): ReplicatedMuon,
}


def uses_cpu_adam(name: str, settings: Settings) -> bool:
    """Whether AdamW is DeepSpeed's for offloaded state. settings: of DeepSpeed."""
    return name == "adamw" and offloads(settings) and settings.get("zero_force_ds_cpu_optimizer", True)


def check_available(name: str) -> None:
    """Raise ValueError if an optimizer needs a package that is not installed."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError("adamw8bit needs bitsandbytes: pip install 'tim[adamw8bit]'")


def make_optimizer(
    name: str, groups: list[dict[str, Any]], *, stage: int, betas: tuple[float, float], settings: Settings, library: Any
) -> tuple[torch.optim.Optimizer, Moments]:
    """An optimizer for ZeRO `stage`. settings: of DeepSpeed, which is `library`. torch's AdamW is fused, on every device."""
    arguments: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": ADAM_EPSILON}
    if name == "adamw8bit":
        from launch.engine import eight_bit  # needs an optional package

        eight = (eight_bit.AdamW8bit if stage else eight_bit.ReplicatedAdamW8bit)(groups, **arguments)
        return eight, eight_bit.EightBitMoments(eight)
    if uses_cpu_adam(name, settings):
        optimizer = library.ops.adam.DeepSpeedCPUAdam(groups, **arguments)
        return optimizer, Moments(optimizer, KINDS[name], counts_in_tensors=False)
    optimizer = CLASSES[name, stage == 0](groups, fused=True, **arguments)
    return optimizer, Moments(optimizer, KINDS[name], counts_in_tensors=True)
