"""Complete a configuration: fill in values derived from the transport, the condition, the alignment and the codec.

Each step returns a new configuration. Resolving is idempotent.
"""

from __future__ import annotations

import math
from pathlib import Path

from launch.arguments import MAX_PIXELS, SIZE
from launch.config.data_sections import TextConfig
from launch.config.deepspeed_settings import check_settings, read_settings
from launch.config.model_sections import TRANSPORT_SETTINGS
from launch.config.schema import Config
from launch.config.yaml_file import ConfigConflict


def resolve(config: Config) -> Config:
    """Return the complete configuration. Reads the codec's own config if its geometry is not known otherwise.

    Raises:
        ConfigConflict: incompatible values.
    """
    for step in (_resolve_deepspeed, _resolve_transport, _resolve_condition, _resolve_alignment, _resolve_codec, _resolve_preview):
        config = step(config)
    return config


def _resolve_deepspeed(config: Config) -> Config:
    """Replace the file of DeepSpeed settings by its content."""
    train = config.train
    if not isinstance(train.deepspeed, str):
        return config
    settings = read_settings(Path(train.deepspeed))
    try:
        check_settings(settings, stage=train.zero, prefix=train.deepspeed)
    except ConfigConflict as conflict:
        raise ConfigConflict("train.deepspeed", f"{conflict.key}: {conflict}") from None
    return config.model_copy(update={"train": train.model_copy(update={"deepspeed": settings})})


def _resolve_transport(config: Config) -> Config:
    """Reject settings that the transport does not have; drop the default shift if it does not support one."""
    from tim import transports  # imports torch

    objective, kind = config.objective, config.objective.transport
    known = transports.settings_of(kind)
    for key, name in TRANSPORT_SETTINGS.items():
        if getattr(objective, key) is not None and name not in known:
            raise ConfigConflict(f"objective.{key}", f"transport {kind} has no such setting; leave it out")
    if transports.TRANSPORTS[kind].shifts:
        return config
    given = {"objective.shift": "shift" in objective.model_fields_set and objective.shift, "sampling.shift": config.sampling.shift}
    for key, shift in given.items():
        if shift:
            raise ConfigConflict(key, f"transport {kind} has a fixed noise range and does not support shifted times; set null")
    return config.model_copy(update={"objective": objective.model_copy(update={"shift": None})})


def _resolve_condition(config: Config) -> Config:
    """Fill in the network's parameters for the condition; reject those of the other one."""
    params = config.network.params
    defaults = {"text": {"cap_feat_dim": 512}, "class": {"num_classes": 1000, "class_dropout_prob": 0.1}}
    needed = defaults.pop(config.condition)
    for kind, keys in defaults.items():
        for key in keys:
            if (given := getattr(params, key)) is not None:
                raise ConfigConflict(f"network.params.{key}", f"got {given}, but this key is for condition: {kind}, not {config.condition}")
    if config.condition == "class" and config.text != TextConfig():
        raise ConfigConflict("text", "condition: class does not use captions; leave this section out")
    return _with_params(config, **{key: value for key, value in needed.items() if getattr(params, key) is None})


def _resolve_alignment(config: Config) -> Config:
    """Check the requirements of guidance and alignment; drop a recipe's projection if there is no alignment to train it."""
    objective, params = config.objective, config.network.params
    if objective.guidance is not None and not config.condition_dropout:
        unconditional, key = "the empty caption", "text.caption_dropout"
        if config.condition == "class":
            unconditional, key = "images without a class", "network.params.class_dropout_prob"
        raise ConfigConflict("objective.guidance", f"needs {unconditional} in training: give {key} above 0")
    if objective.alignment is not None and not params.z_dim:
        raise ConfigConflict("objective.alignment", "needs a projection in the network: give network.params.z_dim, the teacher's width")
    if objective.alignment is not None and params.encoder_depth > params.depth:
        raise ConfigConflict("network.params.encoder_depth", f"got {params.encoder_depth}, but the network has {params.depth} blocks")
    if objective.alignment is None and params.z_dim:
        if config.network.recipe is None:
            raise ConfigConflict("network.params.z_dim", f"got {params.z_dim}, but there is no objective.alignment to train the projection")
        return _with_params(config, z_dim=0)
    return config


def _resolve_codec(config: Config) -> Config:
    """Fill in the plan's stride and the network's input channels."""
    from tim import codecs  # imports torch

    params = config.network.params
    try:
        codec = codecs.geometry(config.codec.kind, config.codec.path, channels=config.codec.channels)
    except ValueError as error:
        raise ConfigConflict("codec.path", str(error)) from None
    stride = codec.factor * params.patch_size
    if config.plan.stride not in (None, stride):
        factors = f"{codec.factor} pixels per cell of codec {config.codec.kind} × network.params.patch_size {params.patch_size}"
        raise ConfigConflict("plan.stride", f"got {config.plan.stride}, but it must be {stride}: {factors}; leave it out")
    if params.in_channels not in (None, codec.channels):
        problem = f"got {params.in_channels}, but codec {config.codec.kind} has {codec.channels} channels"
        remedy = "leave it out"
        if config.network.recipe is not None:
            remedy = f"give network.params.in_channels={codec.channels}, or the recipe's codec"
        raise ConfigConflict("network.params.in_channels", f"{problem}; {remedy}")
    plan = config.plan.model_copy(update={"stride": stride})
    return _with_params(config.model_copy(update={"plan": plan}), in_channels=codec.channels)


def _resolve_preview(config: Config) -> Config:
    """Fill in the size of previews: the largest square that the plan allows. Reject sizes and prompts that the model cannot draw."""
    preview, plan, stride = config.preview, config.plan, config.plan.stride
    assert stride is not None, "filled in by _resolve_codec"
    for index, size in enumerate(preview.sizes):
        _check_size(size, stride=stride, key=f"preview.sizes.{index}")
    classes = config.network.params.num_classes
    for index, prompt in enumerate(preview.prompts):
        if classes is None and not isinstance(prompt, str):
            why = f"got class {prompt}, but the model takes text; write a prompt, in quotation marks if it is a number"
            raise ConfigConflict(f"preview.prompts.{index}", why)
        if classes is not None and (not isinstance(prompt, int) or not 0 <= prompt < classes):
            raise ConfigConflict(f"preview.prompts.{index}", f"got {prompt!r}, but the model takes classes from 0 to {classes - 1}")
    if preview.sizes or not preview.prompts:
        return config
    side = max(1, math.isqrt(plan.max_tokens)) * stride
    if plan.max_pixels is not None:
        side = min(side, max(1, math.isqrt(plan.max_pixels) // stride) * stride)
    return config.model_copy(update={"preview": preview.model_copy(update={"sizes": (f"{side}x{side}",)})})


def _check_size(size: str, *, stride: int, key: str) -> None:
    match = SIZE.fullmatch(size)
    if match is None:
        raise ConfigConflict(key, f"{size!r} is not WIDTHxHEIGHT; write for example 512x256")
    width, height = int(match[1]), int(match[2])
    if width * height > MAX_PIXELS:
        raise ConfigConflict(key, f"{size} exceeds the maximum of 4096 x 4096 pixels")
    if not width or not height or width % stride or height % stride:
        nearest = "x".join(str(max(1, round(side / stride)) * stride) for side in (width, height))
        raise ConfigConflict(key, f"{size}: sides must be multiples of the stride of {stride} pixels; the nearest size is {nearest}")


def _with_params(config: Config, **params: int | float) -> Config:
    network = config.network.model_copy(update={"params": config.network.params.model_copy(update=params)})
    return config.model_copy(update={"network": network})
