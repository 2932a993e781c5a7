"""The configuration of a training run: schema, recipes, loading.

One YAML file per run, or a recipe's name, and `key.sub=value` overrides. Docstrings under the fields are the manual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

import configs
from launch.config import yaml_file
from launch.config.yaml_file import ConfigConflict, ConfigError
from pipeline.corpus.row_filter import Where
from pipeline.planning.config import PlanConfig, Weight

__all__ = ["Config", "ConfigError", "load_config", "recipe_names", "recipe_path"]

Schema = TypeVar("Schema", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CorpusConfig(Section):
    path: str
    """A corpus folder, as `tim prepare` writes it, or its URL: s3://…, gs://…, https://…, hf://…"""
    name: str | None = None
    """What its samples' ids start with; default: the name in its manifest."""
    features: Annotated[Path, Field(strict=False)] | None = None
    """A folder of precomputed latents and text features of it, read in place of its images and captions."""
    weight: Weight | None = None
    """Its share of all images, relative to the weights of the other corpora; null: every image is seen equally often. To know how many
    there are of each, the tables of several corpora without weights are read once at the start."""
    repeats: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often it is gone through while a corpus with repeats 1 is gone through once."""
    cap: int | None = Field(default=None, ge=1)
    """At most so many of its images in each epoch of it, other ones every time."""
    where: str | None = None
    """Only images for whose row in the corpus's tables this is true: 'clip >= 0.28 and width*height > 5e5'."""
    exclude: Annotated[Path, Field(strict=False)] | None = None
    """A parquet file; images whose key is in its column `key` are left out."""

    @model_validator(mode="after")
    def _check(self) -> CorpusConfig:
        if self.weight is not None and self.repeats != 1:
            raise ConfigConflict("repeats", "weight and repeats both say how much of the corpus is seen: give one of them")
        if self.where is not None:
            try:
                Where(self.where)
            except ValueError as error:
                raise ConfigConflict("where", str(error)) from None
        return self


def _as_corpora(value: Any) -> Any:
    """`corpus: PATH` is short for a list of one."""
    items = value if isinstance(value, list) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _check_interval(interval: tuple[float, float]) -> None:
    if interval[0] > interval[1]:
        raise ConfigConflict("interval", f"{list(interval)} is empty: its start is after its end")


class CodecConfig(Section):
    kind: Literal["pixel", "sd-vae", "kl", "dc-ae", "tiny"] = "pixel"
    """How images become latents; `pixel` is the image itself, the others are autoencoders of diffusers (`tim/codecs.py`)."""
    path: str | None = None
    """Their weights: a folder that diffusers reads, one file of weights in it, a pipeline, or hf://OWNER/NAME[/FOLDER]. Planning needs
    those of `kl` and `tiny` only."""

    @model_validator(mode="after")
    def _check(self) -> CodecConfig:
        if self.kind == "pixel" and self.path is not None:
            raise ConfigConflict("path", "pixel needs no weights: leave it out, or give another kind")
        return self


class TagsConfig(Section):
    """For captions that are lists of tags: they are put in another order every time."""

    share: Share = 1.0
    """Share of images whose tags are shuffled."""
    separator: str = Field(default=", ", min_length=1)
    """What stands between tags; blanks around it do not count."""
    keep: int = Field(default=0, ge=0)
    """So many tags stay in front."""


class TextConfig(Section):
    kind: Literal["lookup", "open_clip", "hf"] = "lookup"
    """How captions become features; `lookup` is a frozen table of random embeddings, `open_clip` the text tower of a CLIP, `hf` a text
    encoder or language model of transformers (`tim/text/encoders.py`)."""
    path: str | None = None
    """The weights of the latter two: a folder, one file of weights in it, a pipeline, or hf://OWNER/NAME[/FOLDER]."""
    tokenizer: str | None = None
    """The folder of the tokenizer of `hf`, likewise; null: that of path, or in a pipeline the one beside it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the text encoder; bf16: autocast."""
    max_tokens: int = Field(default=77, ge=2, le=4096)
    """Longer captions are cut."""
    caption_dropout: Share = 0.1
    """Share of images trained with the empty caption, for guidance."""
    caption_weights: tuple[Weight, ...] = (1.0,)
    """Relative weights of an image's 1st, 2nd, … caption, of which one is drawn every time; further ones weigh as much as the last."""
    shuffle_tags: TagsConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.kind == "lookup" and self.path is not None:
            raise ConfigConflict("path", "lookup needs no weights: leave it out, or give another kind")
        if self.kind != "hf" and self.tokenizer is not None:
            raise ConfigConflict("tokenizer", f"{self.kind} has CLIP's tokenizer: leave it out, or use kind hf")
        if not any(self.caption_weights):
            raise ConfigConflict("caption_weights", "one caption at least must weigh something")
        return self


class NetworkParams(Section):
    """The published names (`network.params` of the TiM configs)."""

    patch_size: int = Field(default=1, ge=1)
    """Latent cells per side of a token."""
    in_channels: int | None = None
    """Latent channels: follows from the codec."""
    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    num_heads: int = Field(ge=1)
    cap_feat_dim: int | None = Field(default=None, ge=1)
    """Width of the caption features of a text model; null: 512."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of classes of a class model; null: 1000."""
    class_dropout_prob: Share | None = None
    """Share of images that a class model sees without their class, for guidance; null: 0.1."""
    input_size: int = Field(default=32, ge=1)
    encoder_depth: int = Field(default=8, ge=1)
    """Block after which the projection for representation alignment branches off."""
    z_dim: int = Field(default=0, ge=0)
    """Width of that projection; 0: there is none."""
    projector_dim: int = Field(default=2048, ge=1)
    lora_hidden_size: int = Field(default=0, ge=0)
    """Rank of the modulation layers; 0: three quarters of hidden_size."""
    qk_norm: bool = True
    distance_aware: bool = True
    new_condition: Literal["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"] = "t-r"
    """Which times the embedding of a transition's length is made of."""
    use_new_embed: bool = True
    """Whether the last of them has an embedder of its own."""

    @model_validator(mode="after")
    def _heads_fit(self) -> NetworkParams:
        head_width, rest = divmod(self.hidden_size, self.num_heads)
        if rest or head_width % 4:
            raise ConfigConflict(
                "num_heads", f"hidden_size {self.hidden_size} over {self.num_heads} heads: a head's width must be a multiple of 4"
            )
        return self


class NetworkConfig(Section):
    recipe: str | None = None
    """A recipe to take `network.params` from; what `params` says here replaces its own. Without alignment its projection is left out."""
    params: NetworkParams
    rope: Literal["rowcol", "centred", "legacy"] = "rowcol"
    """Rotary layout: positions count from the corner or the middle of an image; `legacy` only for the published weights."""

    @model_validator(mode="before")
    @classmethod
    def _take_from_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("recipe"), str) or not isinstance(values.get("params", {}), dict):
            return values
        name = values["recipe"]
        if name not in recipe_names():
            raise ConfigConflict("recipe", f"{name!r} is no recipe; {yaml_file.nearest_of(name, recipe_names())}")
        taken = yaml_file.read(recipe_path(name)).values["network"]["params"]
        return {**values, "params": {**taken, **values.get("params", {})}}


class GuidanceConfig(Section):
    """Guidance in the target, by the averaged network: v becomes w_gt·v + w_cond·F(c) + (1 − w_gt − w_cond)·F(∅)."""

    w_gt: float = 1.0
    w_cond: float = 0.75
    """With w_gt 1, a guidance scale of 1 + w_cond is trained in."""
    interval: tuple[Share, Share] = (0.3, 0.8)
    """Times at which it acts, as shares of the transport's start; ends included."""
    after: int = Field(default=0, ge=0)
    """Steps that are trained without it; 100,000 as published."""
    refresh: int = Field(default=100, ge=1)
    """Steps between fillings of the copy of the averaged network that each rank holds."""

    @model_validator(mode="after")
    def _interval_fits(self) -> GuidanceConfig:
        _check_interval(self.interval)
        return self


class AlignmentConfig(Section):
    """Alignment of the network's features after block `encoder_depth` with those of a frozen vision transformer."""

    kind: Literal["radio", "dinov2", "open_clip"]
    path: Annotated[Path, Field(strict=False)] | None = None
    """Its weights: RADIO's file, or a folder that transformers or open_clip reads. Training needs them."""
    weight: float = Field(default=1.0, ge=0)


TRANSPORT_SETTINGS = {"time_mean": "mean", "time_std": "std", "sigma_d": "sigma_d"}  # of this section → of `transports.make`


class ObjectiveConfig(Section):
    transport: Literal["ot_fm", "trigflow", "vp", "ve", "edm"] = "ot_fm"
    """How noise and image mix over time."""
    derivative: Literal["finite-difference", "jvp"] = "finite-difference"
    """How the network's derivative along the path is found: from two evaluations, or exactly, by forward-mode differentiation."""
    derivative_precision: Literal["fp32", "bf16"] = "fp32"
    """In bf16 a finite difference is mostly rounding noise."""
    epsilon: float = Field(default=0.005, gt=0, lt=0.5)
    """Half the interval of the finite difference."""
    diffusion_share: Share = 0.5
    """Share of images trained with r = t; `plan.schedule` can change it at a step."""
    consistency_share: Share = 0.1
    """Share of images trained with r = 0; the rest has r < t. `plan.schedule` can change it at a step."""
    time_mean: float | None = None
    time_std: float | None = Field(default=None, gt=0)
    """Mean and deviation of the normal law behind the times of ot_fm, trigflow (null: 0 and 1.6) and edm (null: -1.2 and 1.2)."""
    sigma_d: float | None = Field(default=None, gt=0)
    """Standard deviation of the latents, for edm; null: 0.5."""
    weighting: Literal["tangent", "none"] = "tangent"
    """How an image's loss is weighted by t and r."""
    guidance: GuidanceConfig | None = None
    """Guidance in the target; null: none."""
    alignment: AlignmentConfig | None = None
    """A teacher whose features the network's are aligned with; null: none."""
    shift: int | None = Field(default=1024, ge=1)
    """Times shift with resolution, by this reference side in pixels; null: they do not. Only ot_fm and trigflow can."""

    @model_validator(mode="after")
    def _shares_fit(self) -> ObjectiveConfig:
        total = self.diffusion_share + self.consistency_share
        if total > 1 + 1e-9:
            raise ConfigConflict("consistency_share", f"diffusion_share and consistency_share add up to {total:g}, more than 1")
        return self

    def transport_settings(self) -> dict[str, float]:
        """What `transports.make` is to be told."""
        given = {name: getattr(self, key) for key, name in TRANSPORT_SETTINGS.items()}
        return {name: value for name, value in given.items() if value is not None}


class TrainConfig(Section):
    steps: int = Field(ge=1)
    lr: float = Field(default=1e-4, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Steps in which the learning rate grows linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up; cosine ends at 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the blocks' matrices take orthogonalised steps, of the size that AdamW's have; far fewer steps are needed. ZeRO 1 and 2."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices; biases and gains do not decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights and gradient sums stay in float32."""
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage; a run can go on with another, as with another number of processes."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of a step's gradient; 0: no limit."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights, which the model folder holds."""
    attention: Literal["auto", "varlen", "flash", "flex", "sdpa"] = "auto"
    """Implementation of attention in the training pass; auto takes the fastest that the device has."""
    checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] = "none"
    """Blocks whose activations are computed again instead of kept: none, all, or every n-th. Less memory, up to a third more time."""
    compile: bool = False
    """Fuse the blocks' norms and MLPs by torch.compile; for GPUs. The first steps take minutes."""
    init: str | None = None
    """Weights that a new run begins with: a model folder, a run (its averaged weights), a file of published weights, or hf://OWNER/NAME.
    A run that is resumed does not load them again."""
    init_strict: bool = True
    """Refuse weights of another network; false: load what fits by name and shape, and say what was not loaded."""

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.warmup > self.steps:
            raise ConfigConflict("warmup", f"{self.warmup} steps of warm-up do not fit into {self.steps} steps")
        if self.optimizer == "muon" and self.zero == 3:
            raise ConfigConflict("optimizer", "muon needs whole matrices, which train.zero=3 cuts up: use zero 1 or 2, or adamw")
        if self.compile and self.zero == 3:
            raise ConfigConflict("compile", "train.zero=3 gathers weights inside the compiled blocks: use zero 1 or 2, or no compile")
        return self

    @property
    def lockstep(self) -> bool:
        """Whether ranks wait for each other in every pack: ZeRO-2 sums gradients in every backward pass, ZeRO-3 gathers every layer."""
        return self.zero >= 2


class SamplingConfig(Section):
    """What the model folder says by default."""

    steps: int = Field(default=8, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; null: 2.5 as in the published evaluations, or 1 if training dropped no captions."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """Times at which guidance acts, as shares of the transport's start; ends included, so that [0, 1] guides a single step, too."""
    shift: int | None = Field(default=None, ge=1)
    """Reference side in pixels of the shift of the sampler's times; null: that of the objective."""

    @model_validator(mode="after")
    def _interval_fits(self) -> SamplingConfig:
        _check_interval(self.interval)
        return self


class CacheConfig(Section):
    """Whole remote shards on a local disk; without it, the wanted parts of shards are read from where they are."""

    dir: Annotated[Path, Field(strict=False)]
    """A folder on a disk of each machine; all processes share it, and so may other runs."""
    bytes: int = Field(ge=1)
    """Room for shards; those that were not read for longest go first."""


class LoaderConfig(Section):
    workers: int = Field(default=2, ge=0)
    """Processes per rank that decode images; 0: none but the training process, which an image that crashes its decoder then ends."""
    prefetch: int = Field(default=2, ge=1)
    """Steps that are read ahead."""
    max_bad_fraction: Share = 0.01
    """The run stops when more than this share of images cannot be loaded."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """A shard that is missing, cut off or not what its digest says stops the run, or leaves the places of its images empty."""
    verify: bool = False
    """Compare local shards with their digests when they are first read; what the cache downloads is always compared."""
    cache: CacheConfig | None = None
    timeout: float = Field(default=300.0, gt=0)
    """The run stops when storage gives nothing for so many seconds; an image that takes as long to decode is left out and counted."""


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is written at the end, too."""
    keep_last: int = Field(default=2, ge=1)


class LogConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl."""


class Config(Section):
    corpus: Annotated[tuple[CorpusConfig, ...], BeforeValidator(_as_corpora)] = ()
    """A path, or a list of {path, name, features, weight, repeats, cap, where, exclude}."""
    run_dir: Path | None = None
    """Where the run writes; a run that is there already is resumed."""
    seed: int = Field(default=0, ge=0)
    condition: Literal["text", "class"] = "text"
    """What images are asked for by: their captions, or the classes that the corpus says (`KEY.cls`)."""
    plan: PlanConfig = PlanConfig()
    codec: CodecConfig = CodecConfig()
    text: TextConfig = TextConfig()
    network: NetworkConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _scheduled_shares_fit(self) -> Config:
        for number, (diffusion, consistency) in enumerate(self.kind_shares()[1:]):
            if diffusion + consistency > 1 + 1e-9:
                why = f"from step {self.plan.schedule[number].step} on diffusion_share {diffusion:g} and consistency_share {consistency:g}"
                raise ConfigConflict(f"plan.schedule.{number}", f"{why} add up to more than 1")
        return self

    @model_validator(mode="after")
    def _derivative_fits(self) -> Config:
        if self.objective.derivative == "jvp" and self.train.zero == 3:
            why = "jvp needs whole weights, which train.zero=3 cuts up (DeepSpeed's gathering has no forward-mode derivative)"
            raise ConfigConflict("objective.derivative", f"{why}: use zero 1 or 2, or finite-difference")
        if self.objective.derivative == "jvp" and self.train.attention not in ("auto", "sdpa"):
            raise ConfigConflict(
                "train.attention", f"{self.train.attention} has no forward-mode derivative, which jvp needs: use auto or sdpa"
            )
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> Config:
        """Refuse what the transport does not have; a shift that nobody asked for is left out."""
        from tim import transports  # torch is slow to import, and a config that is wrong does not need it

        objective, kind = self.objective, self.objective.transport
        known = transports.settings_of(kind)
        for key, name in TRANSPORT_SETTINGS.items():
            if getattr(objective, key) is not None and name not in known:
                raise ConfigConflict(f"objective.{key}", f"transport {kind} has no such setting; leave it out")
        if transports.TRANSPORTS[kind].shifts:
            return self
        asked = {"objective.shift": "shift" in objective.model_fields_set and objective.shift, "sampling.shift": self.sampling.shift}
        for key, shift in asked.items():
            if shift:
                raise ConfigConflict(key, f"the noise of transport {kind} has a fixed range, its times do not shift; set null")
        vars(self).update(objective=objective.model_copy(update={"shift": None}))
        return self

    @model_validator(mode="after")
    def _follow_the_condition(self) -> Config:
        """Fill in what the network needs for the condition; refuse what belongs to the other one."""
        params = self.network.params
        usual = {"text": {"cap_feat_dim": 512}, "class": {"num_classes": 1000, "class_dropout_prob": 0.1}}
        wanted = usual.pop(self.condition)
        for kind, keys in usual.items():
            for key in keys:
                if (given := getattr(params, key)) is not None:
                    raise ConfigConflict(f"network.params.{key}", f"{given} given, which is for condition: {kind}, not {self.condition}")
        if self.condition == "class" and self.text != TextConfig():
            raise ConfigConflict("text", "condition: class reads no captions; leave this section out")
        filled = {key: value for key, value in wanted.items() if getattr(params, key) is None}
        vars(self).update(network=self.network.model_copy(update={"params": params.model_copy(update=filled)}))
        return self

    @model_validator(mode="after")
    def _teachers_fit(self) -> Config:
        objective, params = self.objective, self.network.params
        if objective.guidance is not None and not self.condition_dropout:
            nothing, key = ("the empty caption", "text.caption_dropout")
            if self.condition == "class":
                nothing, key = ("images without a class", "network.params.class_dropout_prob")
            raise ConfigConflict("objective.guidance", f"needs {nothing}, which is not trained: give {key} above 0")
        if objective.alignment is not None and not params.z_dim:
            raise ConfigConflict("objective.alignment", "needs a projection in the network: give network.params.z_dim, the teacher's width")
        if objective.alignment is not None and params.encoder_depth > params.depth:
            raise ConfigConflict("network.params.encoder_depth", f"{params.encoder_depth} given, but there are {params.depth} blocks")
        if objective.alignment is None and params.z_dim:
            if self.network.recipe is None:
                raise ConfigConflict("network.params.z_dim", f"{params.z_dim} given, but no objective.alignment that would train it")
            vars(self).update(network=self.network.model_copy(update={"params": params.model_copy(update={"z_dim": 0})}))
        return self

    @model_validator(mode="after")
    def _follow_the_codec(self) -> Config:
        """Fill in what follows from the codec: the plan's stride and the network's channels."""
        from tim import codecs  # torch is slow to import, and a config that is wrong does not need it

        params = self.network.params
        try:
            codec = codecs.geometry(self.codec.kind, self.codec.path)
        except ValueError as error:
            raise ConfigConflict("codec.path", str(error)) from None
        stride = codec.factor * params.patch_size
        if self.plan.stride not in (None, stride):
            product = (
                f"{stride}, the {codec.factor} pixels per cell of codec {self.codec.kind} × network.params.patch_size {params.patch_size}"
            )
            raise ConfigConflict("plan.stride", f"{self.plan.stride} given, but it is {product}; leave it out")
        if params.in_channels not in (None, codec.channels):
            wanted = f"codec {self.codec.kind} has {codec.channels} channels"
            remedy = "leave it out" if self.network.recipe is None else f"give network.params.in_channels={codec.channels}, or that codec"
            raise ConfigConflict("network.params.in_channels", f"{params.in_channels} given, but {wanted}; {remedy}")
        network = self.network.model_copy(update={"params": params.model_copy(update={"in_channels": codec.channels})})
        vars(self).update(plan=self.plan.model_copy(update={"stride": stride}), network=network)
        return self

    def kind_shares(self, *, before: int | None = None) -> list[tuple[float, float]]:
        """Shares of images with r = t and with r = 0: those of the first step, then those of each stage that begins `before` a step."""
        first = self.objective.diffusion_share, self.objective.consistency_share
        stages = [0, *(stage.step for stage in self.plan.schedule if before is None or stage.step < before)]
        return [self.plan.kind_shares_at(step, first=first) for step in stages]

    @property
    def condition_dropout(self) -> float:
        """Share of images that are trained without their caption or class."""
        return self.text.caption_dropout if self.condition == "text" else self.network.params.class_dropout_prob or 0.0


def load_config(source: str | Path | None, *, overrides: Sequence[str] = (), schema: type[Schema] = Config) -> Schema:
    """Read a file, or a recipe by its name, lay overrides over it and check it.

    Raises:
        ConfigError: one line that names the key, file and line, and the nearest valid key.
    """
    return yaml_file.check(yaml_file.read(_locate(source), overrides=overrides), schema)


def recipe_names() -> list[str]:
    """The configs that come with the package."""
    return sorted(path.stem for path in _recipes().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises ConfigError naming the nearest one."""
    path = _recipes() / f"{name}.yaml"
    if name not in recipe_names():
        raise ConfigError(f"{name}: neither a file nor a recipe; {yaml_file.nearest_of(name, recipe_names())}")
    return path


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration: every key, defaults filled in."""
    return yaml_file.dump(config)


def digest(config: BaseModel) -> str:
    """Hash of the resolved configuration."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]


def _recipes() -> Path:
    return Path(configs.__path__[0])


def _locate(source: str | Path | None) -> Path | None:
    if source is None:
        return None
    path = Path(source)
    if str(source) in recipe_names() and not path.is_file():
        return recipe_path(str(source))  # also beside a folder of this name, as `tim demo` makes one
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a YAML file or a recipe: {', '.join(recipe_names())}")
    return path if path.exists() or path.suffix in (".yaml", ".yml") or path.name != str(source) else recipe_path(str(source))
