"""Settings of `train.deepspeed`: which keys of a DeepSpeed configuration a run may set, and what sets the others.

Only listed keys are allowed. DeepSpeed ignores keys that it does not know, and many of those it knows would change gradients, the step
or the layout of checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.config.yaml_file import ConfigConflict, nearest_of
from launch.config.yaml_values import Loader

Settings = Mapping[str, Any]

_OFFLOAD = ("device", "pin_memory")
ALLOWED: Mapping[str, tuple[str, ...]] = {  # by section; "" is the top level
    "": (
        "zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "comms_logger",
        "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    ),
    "zero_optimization": (
        "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "sub_group_size",
        "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "memory_efficient_linear",
        "log_trace_cache_warnings", "enable_sanity_checks",
    ),
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
}  # fmt: skip

_BATCH = "the plan sets it: use plan.tokens_per_pack and plan.packs_per_step"
_PRECISION = "use train.precision"
_ZERO_PLUS_PLUS = "ZeRO++ and MiCS (quantised or hierarchical sharding) are not supported: leave it out"
_PARALLEL = "is not supported: a pack fits on one device, ranks share packs (plan.tokens_per_pack)"
_NVME = "offloading to NVMe is not supported, because averages read all weights after every step: use device: cpu"
_EXACT = "it would change the gradient: leave it out"
_LAYOUT = "it would change the layout of checkpoints: leave it out"
REFUSED: Mapping[str, str] = {  # by key: what to do
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "use train.clip",
    "optimizer": "use train.optimizer, train.lr, train.betas and train.weight_decay",
    "scheduler": "use train.schedule and train.warmup",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "activation_checkpointing": "use train.checkpointing",
    "compile": "use train.compile",
    "checkpoint": "use the section checkpoint",
    "tensorboard": "use the section log",
    "wandb": "use the section log",
    "csv_monitor": "use the section log",
    "comet": "use the section log",
    "prescale_gradients": _EXACT,
    "gradient_predivide_factor": _EXACT,
    "gradient_allreduce_op": _EXACT,
    "sparse_gradients": _EXACT,
    "aio": _NVME,
    "zero_allow_untested_optimizer": "the engine sets it: leave it out",
    "sequence_parallel_size": f"sequence parallelism {_PARALLEL}",
    "seq_parallel_communication_data_type": f"sequence parallelism {_PARALLEL}",
    "tensor_parallel": f"tensor parallelism {_PARALLEL}",
    "pipeline": f"pipeline parallelism {_PARALLEL}",
    "zero_optimization.stage": "use train.zero",
    "zero_optimization.zero_hpz_partition_size": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_nontrainable_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_gradients": _ZERO_PLUS_PLUS,
    "zero_optimization.mics_shard_size": _ZERO_PLUS_PLUS,
    "zero_optimization.mics_hierarchical_params_gather": _ZERO_PLUS_PLUS,
    "zero_optimization.round_robin_gradients": _LAYOUT,
    "zero_optimization.parameter_alignment": _LAYOUT,
    "zero_optimization.zenflow": "ZenFlow applies gradients late: leave it out",
    "zero_optimization.cpu_offload": "use zero_optimization.offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "use zero_optimization.offload_param: {device: cpu}",
    "zero_optimization.compute_grad_norm": "the norm is needed to skip gradients that are not finite: leave it out",
    "zero_optimization.offload_optimizer.ratio": _LAYOUT,
    "zero_optimization.offload_optimizer.super_offload": _LAYOUT,
}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration from a JSON or YAML file. Raises ConfigConflict."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        raise ConfigConflict("train.deepspeed", f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigConflict("train.deepspeed", f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigConflict("train.deepspeed", f"{path}: holds no mapping of `key: value`")
    return content


def check_settings(settings: Settings, *, stage: int, prefix: str) -> None:
    """Raise ConfigConflict for a key that the configuration of a run sets, or that does not fit ZeRO `stage`.

    prefix: key of the settings, for messages.
    """
    for key, value in _leaves_and_sections(settings):
        section, _, name = key.rpartition(".")
        if key in REFUSED:
            raise ConfigConflict(f"{prefix}.{key}", REFUSED[key])
        if section in ALLOWED and name not in ALLOWED[section]:
            raise ConfigConflict(f"{prefix}.{key}", f"not supported; {nearest_of(name, ALLOWED[section])}")
        if key in ALLOWED and not isinstance(value, Mapping):
            raise ConfigConflict(f"{prefix}.{key}", f"must be a mapping, got {value!r}")
        if value == "auto":
            raise ConfigConflict(f"{prefix}.{key}", "auto is a value of Hugging Face, not of DeepSpeed: give one, or leave it out")
        if (problem := _unfit(key, value, stage=stage)) is not None:
            raise ConfigConflict(f"{prefix}.{key}", problem)


def offloads(settings: Settings) -> bool:
    """Whether the optimizer's state is kept in CPU memory."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def merged(base: Settings, settings: Settings) -> dict[str, Any]:
    """`base` with the values of `settings` put into it, section by section."""
    result = dict(base)
    for key, value in settings.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def _unfit(key: str, value: Any, *, stage: int) -> str | None:
    """Why a value does not fit; None if it does."""
    if key == "communication_data_type" and value != "fp32":
        return f"got {value}, but gradients are summed over ranks in fp32: leave it out"
    if key == "zero_optimization.overlap_comm" and value and stage != 2:
        return f"DeepSpeed overlaps only under ZeRO 2 while it accumulates the gradients of several packs, not {stage}: use train.zero=2"
    if key == "zero_optimization.offload_optimizer" and stage == 0:
        return "train.zero=0 keeps everything on the GPU: use train.zero=1, 2 or 3"
    if key == "zero_optimization.offload_param" and stage != 3:
        return f"train.zero={stage} keeps whole weights on the GPU: use train.zero=3"
    if key.endswith(".device") and value not in ("none", "cpu"):
        return _NVME if value == "nvme" else f"got {value!r}, must be none or cpu"
    return None


def _leaves_and_sections(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value; descend only into sections whose keys are listed."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        yield key, value
        if key in ALLOWED and isinstance(value, Mapping):
            yield from _leaves_and_sections(value, f"{key}.")
