"""Build the components of a run, each from its own section of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from launch.checkpoints.checkpoint import Checkpoint
from launch.checkpoints.finetuned.base import FrozenBase
from launch.checkpoints.history import History
from launch.checkpoints.initial import load_initial
from launch.config.data_sections import CodecConfig, LoaderConfig, TextConfig
from launch.config.model_sections import AlignmentConfig, NetworkConfig
from launch.config.schema import Config, ConfigError, TrainConfig
from launch.distributed.ranks import Ranks
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.finetuning.trainable import is_finetuned, limit_training, trained_share
from launch.training.frozen_models import FrozenModels
from launch.training.measuring.validation import Stage, Validation
from launch.training.planning import make_validation_plan
from pipeline.loading.feature_reader import empty_text
from pipeline.loading.loader import Loader
from pipeline.planning.planner import Planner
from pipeline.planning.validation_plan import ValidationPlan
from pipeline.storage.shard_cache import ShardCache
from tim import TransitionObjective, TransitionTransformer, alignment, codecs, transports
from tim.attention.dispatch import AttentionRequirements, choose_backend
from tim.text import encoders

if TYPE_CHECKING:
    from tim.alignment import AlignmentTeacher
    from tim.codecs import Codec
    from tim.text.encoders import TextEncoder


@dataclass(frozen=True, slots=True)
class Parts:
    """Components that a training step needs.

    parameters: number of network parameters; base: the frozen ones, None if all are trained; trained_share: of the weights of matrices.
    """

    planner: Planner
    loader: Loader
    frozen: FrozenModels
    objective: TransitionObjective
    engine: Engine
    ema: ShardedEMA
    parameters: int
    trained_share: float
    history: History
    validation: Validation | None = None
    base: FrozenBase | None = None

    @property
    def trained(self) -> int | None:
        """Number of parameters that are not frozen; None if all are trained."""
        return None if self.base is None else sum(map(math.prod, self.engine.shapes.values()))


def build(config: Config, planner: Planner, *, ranks: Ranks, cleanup: ExitStack, found: Checkpoint | None = None) -> Parts:
    """Build all components. Must be called by all ranks. found: checkpoint to resume from. A new run loads the weights of `train.init`, if
    given; a run with frozen weights always does.

    Raises:
        ValueError: a frozen model cannot be loaded or does not match the network.
    """
    features = planner.corpora[0].features
    cached = () if features is None else features.parts
    params, device = config.network.params, ranks.device
    geometry = codecs.geometry(config.codec.kind, config.codec.path, channels=config.codec.channels)

    # frozen models
    codec = encoder = teacher = None
    if "latents" not in cached:
        codec = ranks.run_on_all_ranks(lambda: make_codec(config.codec, device=device))
    if params.cap_feat_dim is not None and "captions" not in cached:
        encoder = ranks.run_on_all_ranks(lambda: make_encoder(config.text, width=params.cap_feat_dim, device=device))
    if (chosen := config.objective.alignment) is not None and "teacher" not in cached:
        teacher = ranks.run_on_all_ranks(lambda: make_teacher(chosen, width=params.z_dim, device=device, precision=config.train.precision))

    # data
    reading = {"ranks": ranks, "geometry": geometry, "stochastic_codec": codec is not None and codec.is_stochastic}
    loader = make_loader(config, planner, **reading)
    cleanup.callback(loader.close)

    # network and optimizer
    torch.manual_seed(config.seed)
    network = make_network(config.network)
    loads = found is None or is_finetuned(config)
    init = ranks.run_on_all_ranks(lambda: load_initial(network, config, found=found)) if loads else None
    base = ranks.run_on_rank0(lambda: FrozenBase.of(network, config, source=init and init.source))
    ranks.run_on_all_ranks(lambda: limit_training(network, config))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    share = trained_share((parameter.shape, parameter.requires_grad) for parameter in network.parameters())
    frozen = FrozenModels(
        codec,
        encoder,
        teacher,
        empty_text=None if features is None or features.empty is None else empty_text(features.empty),
        null_class=network.null_class,
        reads_text=config.condition == "text",
        stride=planner.plan.size_rule.stride,
        device=device,
    )
    network.configure_execution(**execution(config.train, device, tokens_per_pack=config.plan.tokens_per_pack))
    engine = make_engine(config.train, network, ranks=ranks)
    cleanup.callback(engine.close)

    parts = Parts(
        planner=planner,
        loader=loader,
        frozen=frozen,
        objective=make_objective(config, pixels_per_cell=geometry.factor, ranks=ranks),
        engine=engine,
        ema=ShardedEMA(engine.fragments(), decay=config.train.ema, device="cpu" if config.train.ema_device == "cpu" else None),
        parameters=parameters,
        trained_share=share,
        history=History(init=init if found is None else None),
        base=base,
    )
    return replace(parts, validation=make_validation(config, parts, ranks=ranks, reading=reading, cleanup=cleanup))


def make_codec(section: CodecConfig, *, device: torch.device) -> Codec:
    return codecs.make(section.kind, section.path, channels=section.channels, device=device, memory_gb=section.memory_gb)


def make_encoder(section: TextConfig, *, width: int | None, device: torch.device) -> TextEncoder:
    """Load the text encoder. Raises ConfigError if it cannot be loaded or its feature width differs from the network's."""
    try:
        return encoders.make(
            section.kind,
            section.path,
            tokenizer_path=section.tokenizer,
            width=width,
            max_tokens=section.max_tokens,
            device=device,
            precision=section.precision,
        )
    except ValueError as error:
        raise ConfigError(f"text: {error}") from error


def make_teacher(section: AlignmentConfig, *, width: int, device: torch.device, precision: str) -> AlignmentTeacher:
    """Load the alignment teacher. Raises ConfigError if its feature width differs from the network's projection."""
    assert section.path is not None, "checked by check_models"
    teacher = alignment.make(section.kind, section.path, device=device, precision=precision)
    if teacher.width != width:
        raise ConfigError(f"network.params.z_dim: got {width}, but the teacher {section.path} has width {teacher.width}")
    return teacher


def make_objective(config: Config, *, pixels_per_cell: int, ranks: Ranks) -> TransitionObjective:
    section = config.objective
    equal_forwards = config.train.zero == 3
    return TransitionObjective(
        transports.make(section.transport, **section.transport_settings()),
        patch_size=config.network.params.patch_size,
        derivative=section.derivative,
        derivative_precision=section.derivative_precision or ("fp16" if ranks.device.type == "cuda" else "fp32"),
        epsilon=section.epsilon,
        weighting=section.weighting,
        shift=section.shift,
        pixels_per_cell=pixels_per_cell,
        alignment=section.alignment.weight if section.alignment else 1.0,
        equal_forwards=equal_forwards,
        agree=ranks.any if equal_forwards else bool,
    )


def make_validation(config: Config, parts: Parts, *, ranks: Ranks, reading: Mapping[str, Any], cleanup: ExitStack) -> Validation | None:
    """reading: further arguments of `make_loader`. Raises ValueError if there are no images to validate on."""
    if config.validation is None:
        return None
    plan, kinds = config.plan, (config.objective.diffusion_share, config.objective.consistency_share)

    def stage_at(step: int) -> Stage:
        diffusion, consistency = plan.kind_shares_at(step, first=kinds)
        return Stage(plan.at(step).max_tokens, shares=(diffusion, consistency, max(0.0, 1 - diffusion - consistency)))

    validation = Validation(
        config.validation,
        stage_at=stage_at,
        plan_at=lambda step: make_validation_plan(config, parts.planner, step=step, ranks=ranks.size),
        make_loader=lambda images: make_loader(config, images, **reading),
        frozen=parts.frozen,
        objective=parts.objective,
        engine=parts.engine,
        ema=parts.ema,
        ranks=ranks,
    )
    cleanup.callback(validation.close)
    return validation


def make_loader(
    config: Config, planner: Planner | ValidationPlan, *, ranks: Ranks, geometry: codecs.Geometry, stochastic_codec: bool
) -> Loader:
    """The loader of training steps, or that of a validation: its draws do not depend on the run's seed, and it needs no teacher."""
    section, trains = config.loader, isinstance(planner, Planner)
    return Loader(
        planner,
        seed=config.seed if trains else 0,
        rank=ranks.rank,
        world_size=ranks.size,
        lockstep=config.train.lockstep,
        channels=geometry.channels,
        factor=geometry.factor,
        stochastic_codec=stochastic_codec,
        teacher=trains and config.objective.alignment is not None,
        cache=make_cache(section),
        device=ranks.device,
        **section.model_dump(include={"workers", "prefetch", "max_bad_fraction", "on_bad_shard", "verify", "timeout"}),
    )


def make_cache(section: LoaderConfig) -> ShardCache | None:
    """The local cache of remote shards; None if it is not configured."""
    return None if section.cache is None else ShardCache(section.cache.dir, limit=section.cache.bytes)


def make_network(section: NetworkConfig) -> TransitionTransformer:
    return TransitionTransformer.from_official(section.params.model_dump(exclude_none=True), rope=section.rope)


def make_engine(section: TrainConfig, network: TransitionTransformer, *, ranks: Ranks) -> Engine:
    settings = section.model_dump(include={"precision", "optimizer", "betas", "weight_decay", "lr_factors", "clip", "deepspeed"})
    return Engine(network, ranks=ranks, stage=section.zero, **settings)


def execution(section: TrainConfig, device: torch.device, *, tokens_per_pack: int) -> dict[str, Any]:
    """Arguments of `TransitionTransformer.configure_execution`. Raises ConfigError for an unsupported attention backend."""
    dtype = torch.bfloat16 if section.precision == "bf16" else torch.float32
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    try:
        choose_backend(AttentionRequirements(device.type, dtype, backward=True, capability=capability), section.attention)
    except ValueError as error:
        raise ConfigError(f"train.attention: {error}") from error
    every = {"none": 0, "full": 1}[section.checkpointing] if isinstance(section.checkpointing, str) else section.checkpointing
    return {"attention": {dtype: section.attention}, "checkpoint_every": every, "compile_for": tokens_per_pack if section.compile else None}
