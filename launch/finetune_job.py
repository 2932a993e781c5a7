"""Fine-tune a model on a folder of images: prepare, encode, train. Read `finetune` from top to bottom.

The model describes itself: codec, text encoder, network and transport come from its config.json, sizes and objective from the run that
trained it, if its folder is there. Everything else has a default that follows from the model and from the number of images
(`defaults`, `add_length`); docs/training.md explains them. Overrides have the last word.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import encode_job
from launch.checkpoints.run_folder import CONFIG, FINETUNE_CONFIG, FINETUNE_CORPUS, FINETUNE_FEATURES, publish_config
from launch.config import yaml_file
from launch.config.load import complete, load_config
from launch.config.model_sections import TRANSPORT_SETTINGS
from launch.config.schema import Config, ConfigError
from launch.console import STOPPED, Console
from launch.distributed import torchrun
from launch.logs.startup import STARTUP
from launch.text_tables import count
from pipeline.storage.atomic import TEMPORARY_SUFFIX
from pipeline.storage.remote import is_remote

if TYPE_CHECKING:
    from pipeline.planning.planner import Planner
    from tim.model_folder.folder import ModelSpec

MIN_IMAGES = 3
PACKS = 4  # of one largest image each: the batch of common recipes for small sets of images
PASSES, VIEWS = (10, 100), 4000  # passes over the images: least, most, and images in all that they aim at
LR, LORA_LR, WIDTH = 2e-5, 1e-4, 1152  # learning rates at this width; narrower networks take larger ones
SMALL_DEVICE = 40e9  # bytes of memory below which activations are computed again
_MEASURED_STEPS = 20  # to find the mean number of images of a step
_PREVIEWS, _PROMPTS = 10, 4  # in a run, and in each of them


@dataclass(frozen=True, slots=True)
class Base:
    """The model to start from. name: for `train.init`; run: configuration of the run that trained it, if known."""

    name: str
    spec: ModelSpec
    run: Config | None


@dataclass(frozen=True, slots=True)
class Finetuned:
    """Result of a fine-tuning. `images`: number of training images; `last_row` of the metrics."""

    run_dir: Path
    model: Path
    corpus: str
    images: int
    steps: int
    last_row: Mapping[str, Any] | None


def finetune(
    sources: Sequence[str], *, base: str, out: Path, lora: bool, overrides: Sequence[str], debug: bool, console: Console
) -> Finetuned:
    """Fine-tune the model `base` on images, in the run folder `out`. The same call resumes an interrupted one.

    Args:
        sources: as of `tim prepare`, or one prepared corpus.
        lora: train adapters instead of all weights.
        overrides: `key=value` settings of the training.

    Raises ValueError if images, model, overrides or `out` cannot be used, RuntimeError if the training fails, and SystemExit if it was
    stopped.
    """
    from launch.training.checks import check_models
    from launch.training.planning import make_planner

    _check_output(out)
    lora = lora or _typed(overrides, "lora") is not None
    found = read_base(base)
    _check_continued(out, base=found.name, lora=lora)
    values = defaults(found, out=out, lora=lora, device_bytes=_device_bytes())
    check_models(_config(values, overrides))

    console.line(f"1/3 prepare: {', '.join(sources)}")
    corpus = _prepare(sources, out=out, console=console)
    values["corpus"] = [{"path": corpus}]
    with STARTUP.shown("planning"):
        planner = make_planner(_config(values, overrides))
        images = _count_images(planner, corpus=corpus)
        values = add_length(values, images=images, per_step=_images_per_step(planner), steps=_typed(overrides, "steps"))
        values = add_previews(values, planner=planner)
        config = _config(values, overrides)
    out.mkdir(parents=True, exist_ok=True)
    publish_config(out / FINETUNE_CONFIG, config)

    features = _encode(config, corpus=corpus, out=out, debug=debug, console=console)
    if features is not None:
        values["corpus"] = [{"path": corpus, "features": str(features)}]
        config = _config(values, overrides)
        publish_config(out / FINETUNE_CONFIG, config)

    how = "adapters (LoRA)" if lora else "all weights"
    console.line(f"3/3 train: {how}, {count(config.train.steps, 'step')}, {images} images, learning rate {config.train.lr:g}")
    _train(config, out=out, debug=debug)
    return Finetuned(out, out / "model", corpus, images, config.train.steps, _last_row(out))


def read_base(name: str) -> Base:
    """The model that `--from` names, a model folder, a run or a checkpoint. Raises ValueError if it does not describe itself."""
    from launch.checkpoints.model_spec import run_config, spec_of
    from launch.model_place import locate_model
    from tim.model_folder.folder import read_spec, weights_file
    from tim.pretrained.hub import HUB

    try:
        place = locate_model(name)
    except ValueError as error:
        raise ValueError(f"--from {error}") from error
    folder = place.path
    name = name if name.startswith(HUB) else os.path.abspath(folder)
    if place.run is not None:
        config = run_config(place.run)
        return Base(name, spec_of(config, step=place.step), config)
    if place.kind != "folder":
        remedy = "give the folder that `tim export` or a finished run wrote; `tim train RECIPE train.init=FILE` starts from a weight file"
        raise ValueError(f"--from {name}: neither a model folder (config.json) nor a run (config.yaml): {remedy}")
    if weights_file(folder) is None:
        raise ValueError(f"--from {name}: has config.json but no weights: copy model.safetensors beside it")
    is_of_run = folder.absolute().name == "model" and (folder.absolute().parent / CONFIG).is_file()
    return Base(name, read_spec(folder), run_config(folder.absolute().parent) if is_of_run else None)


def defaults(base: Base, *, out: Path, lora: bool, device_bytes: float | None) -> dict[str, Any]:
    """Values of a training config that follow from the model and the device (None: the CPU)."""
    from tim import codecs

    spec, run = base.spec, base.run
    params = {key: value for key, value in spec.network.items() if key != "z_dim"}  # nothing trains the projection
    geometry = codecs.geometry(spec.codec["kind"], spec.codec.get("path"), channels=spec.codec.get("channels"))
    stride = geometry.factor * params.get("patch_size", 1)
    tokens = _max_tokens(base, stride=stride)
    scale = max(1.0, WIDTH / params["hidden_size"])
    train: dict[str, Any] = {
        "init": base.name,
        "steps": 1,  # until the images are counted
        "lr": float(f"{(LORA_LR if lora else LR) * scale:.2g}"),
        "weight_decay": 0.01,
        "precision": "fp32" if device_bytes is None else "bf16",
        "checkpointing": "full" if device_bytes is not None and device_bytes < SMALL_DEVICE else "none",
        **({"lora": {}} if lora else {}),
    }
    sampling = {key: spec.sampling[key] for key in ("steps", "guidance", "interval", "shift") if key in spec.sampling}
    values: dict[str, Any] = {
        "run_dir": str(out),
        "condition": "class" if spec.text is None else "text",
        "plan": {"max_tokens": tokens, "tokens_per_pack": tokens, "packs_per_step": PACKS},
        "codec": dict(spec.codec),
        "network": {"rope": spec.rope, "params": params},
        "objective": _objective(base),
        "train": train,
        "sampling": sampling,
    }
    if spec.text is not None:
        values["text"] = dict(spec.text)
    if run is not None:
        values["plan"] |= run.plan.model_dump(include={"max_pixels", "min_tokens", "max_aspect", "fit"})
    return values


def add_length(values: Mapping[str, Any], *, images: int, per_step: float, steps: int | None = None) -> dict[str, Any]:
    """The values with the length of the training, and what depends on it: warm-up, averaging, checkpoints, rows of metrics.

    per_step: mean number of images of a step; steps: their number if it is given. Warm-up and averaging follow from the default length,
    so that a run that is made longer goes on with them.
    """
    passes = min(PASSES[1], max(PASSES[0], VIEWS // images))
    usual = max(1, math.ceil(images * passes / per_step))
    steps = usual if steps is None else steps
    train = {"steps": steps, "warmup": min(100, usual // 20, steps), "ema": round(min(0.9999, max(0.9, 1 - 10 / usual)), 4)}
    lengths = {
        "train": train,
        "checkpoint": {"every": max(1, min(250, steps // 4)), "every_minutes": 10},
        "log": {"every": max(1, min(10, steps // 20))},
    }
    return encode_job.merge(values, lengths)


def add_previews(values: Mapping[str, Any], *, planner: Planner) -> dict[str, Any]:
    """The values with previews of some captions of the corpus, drawn from the averaged weights ten times in the run."""
    if values["condition"] != "text":
        return dict(values)
    steps = values["train"]["steps"]
    preview = {"every": max(1, steps // _PREVIEWS), "prompts": _captions(planner)}
    return encode_job.merge(values, {"preview": preview})


def _check_output(out: Path) -> None:
    """Raises ValueError unless `out` is new, empty, or a run that `tim finetune` started."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    names = sorted(path.name for path in out.iterdir() if path.suffix != TEMPORARY_SUFFIX) if out.is_dir() else []
    if not names or FINETUNE_CONFIG in names or names == [FINETUNE_CORPUS]:
        return
    if CONFIG in names:
        raise ValueError(f"--out {out}: a run that `tim finetune` did not start: continue it with `tim train {out / CONFIG}`")
    raise ValueError(f"--out {out}: not empty ({names[0]} is in it) and not a run: give a new folder")


def _check_continued(out: Path, *, base: str, lora: bool) -> None:
    """Raises ValueError if the run in `out` began with another model, or trains something else, or is the model itself."""
    if Path(base).is_relative_to(os.path.abspath(out)):
        raise ValueError(f"--from {base}: is in --out {out}, which would be continued: give another --out")
    if not (out / FINETUNE_CONFIG).is_file():
        return
    before = load_config(out / FINETUNE_CONFIG).train
    if (before.lora is not None) != lora:
        what, remedy = ("all weights", "leave out --lora") if lora else ("adapters", "add --lora")
        raise ValueError(f"--out {out}: the run there trains {what}: {remedy}, or give another --out")
    if before.init is not None and before.init != base and Path(before.init).exists():
        raise ValueError(f"--from {base}: the run in {out} began with {before.init}: give that, or another --out")


def _config(values: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The complete configuration. Raises ConfigError for an override that does not fit."""
    raw = yaml_file.read(None, overrides=overrides)
    for key in ("corpus", "run_dir"):
        if key in raw.values:
            raise ConfigError(f"{key}: `tim finetune` sets it, from its arguments IMAGES and --out: leave it out")
    raw.values = encode_job.merge(values, raw.values)
    return complete(raw)


def _typed(overrides: Sequence[str], key: str) -> Any:
    """A key of the section `train` in the overrides."""
    train = yaml_file.read(None, overrides=overrides).values.get("train")
    return train.get(key) if isinstance(train, dict) else None


def _max_tokens(base: Base, *, stride: int) -> int:
    """Tokens of the largest images: those of the model's training or, if it is unknown, of the size at which its times are not shifted."""
    if base.run is not None:
        return base.run.plan.at(base.run.train.steps).max_tokens
    side = base.spec.sampling.get("shift") or 1024
    return min(4096, max(256, (side // stride) ** 2))


def _objective(base: Base) -> dict[str, Any]:
    """The objective of the model's training or, if it is unknown, the default one; without transitions for a model without."""
    kind, run = base.spec.transport["kind"], base.run
    settings = {key: base.spec.transport[name] for key, name in TRANSPORT_SETTINGS.items() if name in base.spec.transport}
    shared: dict[str, Any] = {"transport": kind, **settings}
    if run is not None:
        diffusion, consistency = run.kind_shares(before=run.train.steps)[-1]
        shift = run.objective.shift
        return {**shared, "diffusion_share": diffusion, "consistency_share": consistency, "shift": shift}
    if base.spec.sampling.get("instantaneous"):
        shared |= {"diffusion_share": 1, "consistency_share": 0}
    return {**shared, "shift": base.spec.sampling.get("shift")}


def _prepare(sources: Sequence[str], *, out: Path, console: Console) -> str:
    """The folder or URL of the prepared corpus: a corpus that was given, or OUT/corpus. Raises ValueError, and NothingKept."""
    from dataprep.prepare import PrepareConfig, prepare
    from dataprep.sources.tim_corpus import is_corpus

    if len(sources) == 1 and (is_remote(sources[0]) or Path(sources[0]).is_dir()) and is_corpus(sources[0]):
        console.line(f"    {sources[0]} is a prepared corpus")
        return sources[0] if is_remote(sources[0]) else os.path.abspath(sources[0])
    corpus = out / FINETUNE_CORPUS
    with console.progress() as report:
        counts = prepare(sources, out=corpus, config=PrepareConfig(), workers=torchrun.cores(), progress=report, announce=console.line)
    rejected = ", ".join(f"{reason} {number}" for reason, number in counts.rejected.items())
    console.line(f"    {counts.kept} of {counts.inputs} images kept{f', rejected: {rejected}' if rejected else ''}")
    return os.path.abspath(corpus)


def _count_images(planner: Planner, *, corpus: str) -> int:
    """Number of images that the plan trains on. Raises ValueError if there are too few."""
    counts = planner.sample_counts
    images = counts["samples"]
    if images < MIN_IMAGES:
        left_out = ", ".join(f"{reason} {number}" for reason, number in counts["left_out"].items() if number)
        why = f"; left out by the plan: {left_out}" if left_out else "; see report.html in it for the rejected ones"
        raise ValueError(f"{corpus}: has {count(images, 'image')}, too few to fine-tune on: give at least {MIN_IMAGES}{why}")
    return images


def _images_per_step(planner: Planner) -> float:
    """Mean number of images of the first steps. The planner is not used for training."""
    return sum(planner.next_step().images for _ in range(_MEASURED_STEPS)) / _MEASURED_STEPS


def _captions(planner: Planner) -> list[str]:
    """Some different captions, evenly spaced."""
    corpus = planner.corpora[0]
    columns = [corpus.read(shard, columns=("caption",)).column("caption").to_pylist() for shard in range(len(corpus.shards))]
    found = dict.fromkeys(text for column in columns for text in column if text)
    return list(islice(found, 0, None, max(1, len(found) // _PROMPTS)))[:_PROMPTS]


def _encode(config: Config, *, corpus: str, out: Path, debug: bool, console: Console) -> Path | None:
    """Cached features of the codec and the text encoder, those of them that take time to run; None if neither does."""
    without = {
        "codec": config.codec.kind == "pixel" and config.objective.alignment is None,
        "text": config.condition != "text" or config.text.kind == "lookup" or config.text.shuffle_tags is not None,
    }
    if all(without.values()):
        console.line("2/3 encode: nothing to do, this model's codec and text encoder take no time")
        return None
    dropped = [f"{part}=null" for part, is_left_out in without.items() if is_left_out]
    like = str(out / FINETUNE_CONFIG)
    features = out / FINETUNE_FEATURES
    console.line(f"2/3 encode: {corpus}")
    settings = encode_job.settings(like, overrides=dropped)
    encode_job.run(corpus, out=features, settings=settings, like=like, overrides=dropped, processes=None, debug=debug, console=console)
    return features.absolute()


def _train(config: Config, *, out: Path, debug: bool) -> None:
    """Train in this process, or with one process per GPU. Raises RuntimeError if the training fails, SystemExit if it was stopped."""
    import torch

    processes = min(torch.cuda.device_count(), config.plan.packs_per_step)
    if processes <= 1:
        with STARTUP.shown("importing DeepSpeed"):
            from launch.training.train import train

            train(config)
        return
    options = ["--debug"] * debug
    limits = config.train.hang_limits
    code = torchrun.launch(out / FINETUNE_CONFIG, nproc_per_node=processes, options=options, run_dir=out, hang_limits=limits)
    if code == STOPPED:
        raise SystemExit(code)
    if code:
        raise RuntimeError(f"training ended with exit code {code}: see the lines above")


def _last_row(out: Path) -> Mapping[str, Any] | None:
    from launch.training.metrics import last_row

    return last_row(out / "metrics.jsonl")


def _device_bytes() -> float | None:
    """Memory of a GPU, None without one."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
