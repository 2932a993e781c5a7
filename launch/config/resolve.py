"""Complete a configuration: fill in what follows from the transport, the condition, the alignment and the codec.

Each step takes a configuration and returns another; none changes its argument. A resolved configuration resolves to itself.
"""

from __future__ import annotations

from launch.config.data_sections import TextConfig
from launch.config.model_sections import TRANSPORT_SETTINGS
from launch.config.schema import Config
from launch.config.yaml_file import ConfigConflict


def resolve(config: Config) -> Config:
    """The complete configuration. Reads the codec's config where only that knows its geometry.

    Raises:
        ConfigConflict: values that do not fit together.
    """
    for step in (_resolve_transport, _resolve_condition, _resolve_alignment, _resolve_codec):
        config = step(config)
    return config


def _resolve_transport(config: Config) -> Config:
    """Refuse settings that the transport does not have; drop a default shift that it cannot use."""
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
            raise ConfigConflict(key, f"the noise of transport {kind} has a fixed range, its times do not shift; set null")
    return config.model_copy(update={"objective": objective.model_copy(update={"shift": None})})


def _resolve_condition(config: Config) -> Config:
    """Fill in the network's parameters for the condition; refuse those of the other one."""
    params = config.network.params
    usual = {"text": {"cap_feat_dim": 512}, "class": {"num_classes": 1000, "class_dropout_prob": 0.1}}
    needed = usual.pop(config.condition)
    for kind, keys in usual.items():
        for key in keys:
            if (given := getattr(params, key)) is not None:
                raise ConfigConflict(f"network.params.{key}", f"{given} given, which is for condition: {kind}, not {config.condition}")
    if config.condition == "class" and config.text != TextConfig():
        raise ConfigConflict("text", "condition: class reads no captions; leave this section out")
    return _with_params(config, **{key: value for key, value in needed.items() if getattr(params, key) is None})


def _resolve_alignment(config: Config) -> Config:
    """Check what guidance and alignment need of the network; drop a recipe's projection that nothing would train."""
    objective, params = config.objective, config.network.params
    if objective.guidance is not None and not config.condition_dropout:
        unconditional, key = "the empty caption", "text.caption_dropout"
        if config.condition == "class":
            unconditional, key = "images without a class", "network.params.class_dropout_prob"
        raise ConfigConflict("objective.guidance", f"needs {unconditional}, which is not trained: give {key} above 0")
    if objective.alignment is not None and not params.z_dim:
        raise ConfigConflict("objective.alignment", "needs a projection in the network: give network.params.z_dim, the teacher's width")
    if objective.alignment is not None and params.encoder_depth > params.depth:
        raise ConfigConflict("network.params.encoder_depth", f"{params.encoder_depth} given, but there are {params.depth} blocks")
    if objective.alignment is None and params.z_dim:
        if config.network.recipe is None:
            raise ConfigConflict("network.params.z_dim", f"{params.z_dim} given, but no objective.alignment that would train it")
        return _with_params(config, z_dim=0)
    return config


def _resolve_codec(config: Config) -> Config:
    """Fill in the plan's stride and the network's channels."""
    from tim import codecs  # imports torch

    params = config.network.params
    try:
        codec = codecs.geometry(config.codec.kind, config.codec.path)
    except ValueError as error:
        raise ConfigConflict("codec.path", str(error)) from None
    stride = codec.factor * params.patch_size
    if config.plan.stride not in (None, stride):
        factors = f"{codec.factor} pixels per cell of codec {config.codec.kind} × network.params.patch_size {params.patch_size}"
        raise ConfigConflict("plan.stride", f"{config.plan.stride} given, but it is {stride}, the {factors}; leave it out")
    if params.in_channels not in (None, codec.channels):
        problem = f"{params.in_channels} given, but codec {config.codec.kind} has {codec.channels} channels"
        remedy = "leave it out"
        if config.network.recipe is not None:
            remedy = f"give network.params.in_channels={codec.channels}, or that codec"
        raise ConfigConflict("network.params.in_channels", f"{problem}; {remedy}")
    plan = config.plan.model_copy(update={"stride": stride})
    return _with_params(config.model_copy(update={"plan": plan}), in_channels=codec.channels)


def _with_params(config: Config, **params: int | float) -> Config:
    network = config.network.model_copy(update={"params": config.network.params.model_copy(update=params)})
    return config.model_copy(update={"network": network})
