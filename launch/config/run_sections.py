"""Sections about a run: training, checkpoints, logging."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from launch.config.deepspeed_settings import check_settings
from launch.config.model_sections import LoraConfig
from launch.config.section import Section
from launch.config.yaml_file import ConfigConflict
from tim.model_kinds import AttentionChoice, Precision

Decay = Annotated[float, Field(ge=0, lt=1)]
StepSection = Literal["start", "data", "compute", "collective", "save", "validate", "preview"]
TrackerKind = Literal["tensorboard", "wandb", "mlflow", "comet"]
HANG_LIMITS: Mapping[StepSection, float] = {  # seconds
    "start": 3600,
    "data": 1800,
    "compute": 1800,
    "collective": 1800,
    "save": 3600,
    "validate": 3600,
    "preview": 1800,
}


class TrainConfig(Section):
    steps: int = Field(ge=1)
    """Total number of steps."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after the warm-up."""
    warmup: int = Field(default=0, ge=0)
    """Number of steps in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Learning rate after the warm-up: constant; cosine or linear decay to 0; wsd (warmup-stable-decay): constant, then linear decay to 0
    in the last `decay` steps."""
    decay: Annotated[int, Field(ge=1)] | None = None
    """Number of steps of wsd's decay; null: a fifth of the run."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Factors of the learning rate by parameter name: `{pattern: factor}`, with `*` in patterns; the first that matches counts."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: orthogonalised updates for the blocks' matrices, scaled like AdamW's; needs far fewer steps. adamw8bit: AdamW whose moments
    take 2 bytes per weight instead of 8; needs bitsandbytes."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices; biases and gains do not decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's coefficients for the running averages of the gradient and its square."""
    precision: Precision = "fp32"
    """bf16: autocast; weights and gradient accumulation stay in float32."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage, 0: nothing is sharded. A run can resume with another stage or another number of processes."""
    deepspeed: dict[str, Any] | str | None = None
    """More settings of DeepSpeed (offloading, communication): a mapping, or a JSON or YAML file in DeepSpeed's format. Keys that other
    settings decide are rejected."""
    clip: float = Field(default=1.0, ge=0)
    """Gradient clipping: largest gradient norm of a step; 0: no clipping."""
    max_skips: int = Field(default=10, ge=1)
    """Steps in a row that may be skipped because their gradient is not finite, before the run stops."""
    spike: Literal["warn", "rollback"] = "warn"
    """What to do about a loss spike, three steps in a row far above the median: warn, or go back to the weights of the last checkpoint
    and on with the next step, so that the spike's samples are not used again."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks of a run before a further loss spike stops it."""
    ema: Decay | Annotated[tuple[Decay, ...], Field(min_length=1)] = 0.9999
    """Decay of the exponential moving average of the weights, or several such as `[0.999, 0.9999]`. The model folder and guidance use the
    first."""
    ema_device: Literal["auto", "cpu"] = "auto"
    """Where the averages are stored: auto: with the weights; cpu: in host memory, which saves 4 bytes of GPU memory per parameter, average
    and rank's share, for a copy of the weights to the host in every step."""
    attention: AttentionChoice = "auto"
    """Attention backend for training; auto: the fastest available on the device."""
    checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] = "none"
    """Activation checkpointing of blocks: none, full (all), or every n-th. Saves memory for up to a third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile, for packs padded to plan.tokens_per_pack tokens. The first steps take minutes."""
    init: str | None = None
    """Initial weights of a new run: a model folder, a run (its EMA weights), a file of published weights, or hf://OWNER/NAME. A resumed
    run reads them only with `lora` or `freeze`."""
    init_strict: bool = True
    """Reject weights of another network; false: load the tensors that match by name and shape, and report the others."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that are not trained, with `*`, such as `[x_embedder.*, blocks.0.*]`."""
    lora: LoraConfig | None = None
    """Train adapters of low rank instead of the weights of `init`; {} for the defaults."""
    hang_timeout: Annotated[float, Field(ge=0)] | dict[StepSection, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Seconds that a rank may spend in one section of a step before it counts as hung and the job ends: one number for all sections, or
    numbers by section. Sections not given: start, save and validate 3600, data, compute, collective and preview 1800. 0: no limit."""

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.warmup > self.steps:
            raise ConfigConflict("warmup", f"{self.warmup} warm-up steps exceed the {self.steps} steps of the run")
        if isinstance(self.ema, tuple) and len({f"{decay:g}" for decay in self.ema}) < len(self.ema):
            raise ConfigConflict("ema", f"{list(self.ema)} has a decay twice")
        if self.decay is not None and self.schedule != "wsd":
            raise ConfigConflict("decay", f"only for schedule=wsd, not {self.schedule}: leave it out, or use schedule=wsd")
        if self.schedule == "wsd" and self.warmup + self.decay_steps > self.steps:
            why = f"{self.warmup} warm-up steps and {self.decay_steps} steps of decay exceed the {self.steps} steps of the run"
            raise ConfigConflict("decay", why)
        if self.lora is not None and self.freeze:
            raise ConfigConflict("freeze", "train.lora already freezes all weights of the network: leave train.freeze out")
        if self.compile and self.zero == 3:
            raise ConfigConflict("compile", "train.zero=3 gathers weights inside the compiled blocks: use zero 0, 1 or 2, or compile=false")
        if isinstance(self.deepspeed, dict):
            check_settings(self.deepspeed, stage=self.zero, prefix="deepspeed")
        return self

    @property
    def decay_steps(self) -> int:
        """Number of steps of wsd's decay."""
        return self.decay or max(1, self.steps // 5)

    @property
    def hang_limits(self) -> dict[str, float]:
        """Seconds by section."""
        given = self.hang_timeout if isinstance(self.hang_timeout, dict) else dict.fromkeys(HANG_LIMITS, self.hang_timeout)
        return {**HANG_LIMITS, **given}

    @property
    def group_timeout(self) -> timedelta:
        """How long collective operations wait: longer than the longest section, so that the rank that hangs is found first."""
        limits = self.hang_limits.values()
        return timedelta(seconds=max(limits) + 600) if all(limits) else timedelta(days=7)

    @property
    def lockstep(self) -> bool:
        """Whether ranks synchronise in every pack: ZeRO-2 reduces gradients in every backward pass, ZeRO-3 gathers every layer."""
        return self.zero >= 2


class ClusterConfig(Section):
    """Where `tim launch --slurm` and `tim launch --k8s` run a job, and what it needs there."""

    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    time: str | None = None
    """Slurm's time limit, such as `24:00:00` or `2-00:00:00`. The job saves before and is queued again."""
    gres: str | None = "gpu:{n}"
    """Slurm's generic resources of a node, `{n}`: number of processes; null: none. With `--k8s`, null requests no GPU."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPU cores of a node; null: `loader.workers` + 2 for each process."""
    options: tuple[str, ...] = ()
    """More options of sbatch, such as `--qos=high` or `--array=1-4%1`."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before the training, with `--slurm`, `--k8s` and `--hostfile`: `module load cuda`. If one fails, all ends."""
    env: dict[str, str] = Field(default={})
    """Environment variables of the training, with `--slurm`, `--k8s` and `--hostfile`. They may be keys of services: only the owner can
    read the files of a run that have them, and trackers do not get them."""
    container: str | None = None
    """Container image: a `.sif` file for apptainer, or an image for Slurm's pyxis or for Kubernetes. It must have `tim`."""
    mounts: tuple[Annotated[str, Field(pattern=r"^[^:\s]+:/[^:\s]*$")], ...] = ()
    """What the container sees, as SOURCE:/TARGET. SOURCE is a folder, or for Kubernetes the name of a PersistentVolumeClaim. Kubernetes
    starts the training in the first TARGET."""


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints; another one is written at the end."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Also save when this many minutes have passed since the last save."""
    keep_last: int = Field(default=2, ge=1)
    """Number of checkpoints to keep."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep checkpoints of multiples of this step for good; a multiple of `every`."""
    mirror: str | None = None
    """A folder or URL (s3://…) that checkpoints are copied to. Nothing local is deleted before its copy is checked, and a run without local
    checkpoints resumes from the copies."""
    on_checkpoint: str | None = None
    """Command to run in the background for every checkpoint, without a shell; {path} is replaced by its folder."""

    @model_validator(mode="after")
    def _fits(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ConfigConflict("keep_every", f"{self.keep_every} is not a multiple of checkpoint.every={self.every}")
        if self.on_checkpoint is not None:
            try:
                words = shlex.split(self.on_checkpoint)
            except ValueError as error:
                raise ConfigConflict("on_checkpoint", f"{self.on_checkpoint!r} cannot be split into words: {error}") from None
            if not words:
                raise ConfigConflict("on_checkpoint", "is empty: give a command, or null")
        return self


class EvalConfig(Section):
    """`tim eval` on checkpoints, in the background while training goes on."""

    every: int = Field(ge=1)
    """Steps between evaluations, a multiple of `checkpoint.every`; another one of the last step."""
    images: int = Field(default=512, ge=8)
    """Images for each number of steps."""
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4), min_length=1)
    """Numbers of sampling steps."""
    metrics: tuple[str, ...] = ()
    """Metrics, as `tim eval --metrics`; empty: all that the features and prompts allow."""
    features: tuple[str, ...] = ("pixels",)
    """Extractors of features, as `tim eval --features`: pixels, inception=FILE, open_clip=FOLDER, hf=FOLDER."""
    clip: str | None = None
    """Model of the CLIP score, as `tim eval --clip`."""
    corpus: str | None = None
    """Prepared corpus of the real images; null: that of `validation`, else the first of the run."""
    device: str | None = None
    """Where images are drawn: cpu, cuda:1, …; null: the device of rank 0, which then needs memory for the model and its activations."""


class LogConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl."""
    trackers: tuple[TrackerKind, ...] = ("tensorboard",)
    """Where rows and previews are shown besides: tensorboard (`RUN/tensorboard`), wandb, mlflow, comet; each needs its package. A resumed
    run is continued there. wandb and comet store it in the run folder if they find no API key."""
    project: str = Field(default="tim", min_length=1)
    """Project of wandb and comet, experiment of mlflow."""
    name: str | None = None
    """Name of the run there; null: that of the run folder."""
