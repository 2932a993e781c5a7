"""Export a checkpoint as a model folder for sampling, without training state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import yaml

from launch.checkpoints.averages import saved_decays, weights_in_words
from launch.checkpoints.checkpoint import Checkpoint
from launch.checkpoints.finetuned import adapter
from launch.checkpoints.initial_weights import run_weights
from launch.checkpoints.model_card import model_card
from launch.checkpoints.model_spec import finished_model, is_model, run_config, spec_of
from launch.model_place import locate_model
from tim import transports
from tim.model_folder.folder import Contents, ModelSpec, save_model, weights_file, write_folder
from tim.model_folder.replacing import FolderInUseError
from tim.model_kinds import Dtype
from tim.pretrained.official import NETWORK_FILE, OURS, published_config
from tim.pretrained.safetensors_files import MAX_SHARD_BYTES, LazyTensors
from tim.pretrained.weight_files import PIPELINE

Layout: TypeAlias = Literal["own", "published", "diffusers"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported model folder and its training step. `notes` list damaged newer checkpoints and other remarks."""

    folder: Path
    step: int
    ema: bool
    parameters: int
    notes: tuple[str, ...]


def export(
    run: Path,
    *,
    out: Path,
    ema: bool | float = True,
    step: int | None = None,
    official: bool = False,
    with_models: bool = False,
    layout: Layout = "own",
    dtype: Dtype = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Export a run's newest intact checkpoint, or that of `step`, to the model folder `out`.

    Does not need deepspeed. Weights are read and written one tensor at a time, in shards above `max_shard_bytes`. With `ema`, export the
    averaged weights (the first average, or that of a decay), else the latest ones. `official`, or `layout` published: write
    `network.yaml` and weights for the published code instead. `with_models` also copies codec, text encoder and tokenizer into the folder.
    The folder is written atomically; an older one of the same kind is replaced.

    Raises:
        ValueError: `run` is not a run or has no such intact checkpoint, `out` exists and is not a model folder, or the published code
            does not support this network.
    """
    from launch.checkpoints import checkpoint

    layout = "published" if official else layout
    config = run_config(run)
    check_target(out, layout=layout)
    if layout == "published" and with_models:
        raise ValueError("--with-models: the published code does not read codec and text encoder from the folder; leave out --official")
    found = checkpoint.find(run, step=step)
    spec = spec_of(config, step=found.metadata.step)
    published = _published(spec) if layout == "published" else {}
    notes = _notes(found, ema=ema)
    whole = run_weights(config, found, ema=ema)
    weights = LazyTensors(whole.shapes, dict.fromkeys(whole.shapes, DTYPES[dtype]), whole.read)
    parameters = sum(map(math.prod, whole.shapes.values()))
    card = model_card(config, found, weights=weights_in_words(found.folder, ema), dtype=dtype, parameters=parameters)
    if layout == "published":
        if spec.rope != "legacy":
            notes.append("the published code swaps height and width: only square images give the same result")
        contents = Contents(
            weights,
            config=NETWORK_FILE,
            describe=lambda files: yaml.safe_dump({**published, OURS: {**published[OURS], "files": dict(files)}}, sort_keys=False),
            texts={"README.md": card},
            max_shard_bytes=max_shard_bytes,
        )
        write_folder(out, contents)
    else:
        home = run if out.resolve().is_relative_to(run.resolve()) else None
        settings = {"home": home, "copy_models": with_models, "layout": layout, "max_shard_bytes": max_shard_bytes}
        save_model(out, weights, spec, card=card, step=found.metadata.step, **settings)
    return Exported(folder=out, step=found.metadata.step, ema=ema is not False, parameters=parameters, notes=tuple(notes))


def export_adapter(run: Path, *, out: Path, ema: bool | float = True, step: int | None = None, dtype: Dtype = "fp32") -> Exported:
    """Export the adapters of a LoRA run to the folder `out`, in the key names of PEFT and of ComfyUI. Arguments as of `export`.

    Raises ValueError if the run has no adapters or no such checkpoint, or `out` is something else.
    """
    from launch.checkpoints import checkpoint

    config = run_config(run)
    adapter.check_adapter_folder(out)
    found = checkpoint.find(run, step=step)
    adapters, base = adapter.adapters(run, found, ema=ema)
    what = weights_in_words(found.folder, ema)
    card = adapter.adapter_card(base, step=found.metadata.step, steps=config.train.steps, weights=what)
    adapter.write_adapters(out, adapters, base, dtype=DTYPES[dtype], step=found.metadata.step, card=card)
    notes = _notes(found, ema=ema)
    parameters = sum(each.a.numel() + each.b.numel() for each in adapters.values())
    return Exported(folder=out, step=found.metadata.step, ema=ema is not False, parameters=parameters, notes=tuple(notes))


def _notes(found: Checkpoint, *, ema: bool | float) -> list[str]:
    """Remarks on the choice of a checkpoint and of its average."""
    notes = [f"skipped damaged checkpoint: {problem}" for problem in found.skipped]
    decays = saved_decays(found.folder)
    if ema is True and len(decays) > 1:
        notes.append(f"exported the first of the averages with decay {', '.join(f'{decay:g}' for decay in decays)}: --ema chooses another")
    return notes


def _published(spec: ModelSpec) -> dict[str, Any]:
    """Network description for the published code."""
    kind = spec.transport["kind"]
    transport = transports.make(**spec.transport)
    settings = {name: getattr(transport, name) for name in transports.settings_of(kind)}  # including defaults
    published = published_config(spec.network, rope=spec.rope, transport={**settings, "kind": kind})
    ours = {"rope": spec.rope, "codec": spec.codec, "text": spec.text, "sampling": spec.sampling}  # for `tim sample`
    return {**published, OURS: ours}


def model_folder(name: str | Path, *, log: Callable[[str], None]) -> Path:
    """The model folder that a name leads to: itself, or of a run its `model/` or its newest checkpoint, or a checkpoint, exported once to
    `RUN/exports/`.

    Raises ValueError if it is none of these, or if there is no such checkpoint.
    """
    place = locate_model(name)
    run = place.run
    if run is None and place.kind != "folder":
        raise ValueError(f"{name}: neither a model folder (config.json) nor a run folder (config.yaml)")
    if run is None:
        return place.path
    if place.kind == "run" and (finished := finished_model(run)) is not None:
        log(f"model: {finished}")
        return finished

    from launch.checkpoints import checkpoint

    found = checkpoint.find(run, step=place.step)
    for problem in found.skipped:
        log(f"skipped damaged checkpoint: {problem}")
    folder = run / "exports" / found.folder.name
    if not is_model(folder):
        log(f"exporting {found.folder}")
    while not is_model(folder):
        with suppress(FolderInUseError):  # another process exports it, too
            export(run, out=folder, step=found.metadata.step)
            break
        time.sleep(1)
    log(f"model: {folder}")
    return folder


def run_of(name: str | Path, *, step: int | None) -> tuple[Path, int | None]:
    """The run folder and the step to export, None for the newest. name: a run folder, or a checkpoint. Raises ValueError for others."""
    place = locate_model(name)
    if place.run is None:
        is_model_of_run = place.path.absolute().name == "model" and (place.path.absolute().parent / "config.yaml").is_file()
        remedy = f"give the run, {place.path.absolute().parent}" if is_model_of_run else "give a run folder, or a checkpoint of a run"
        raise ValueError(f"{name}: has no checkpoints to export: {remedy}")
    if step is not None and place.step not in (None, step):
        raise ValueError(f"--step {step}: {name} is another step; leave it out, or give the run folder")
    return place.run, step if place.step is None else place.step


def check_target(out: Path, *, layout: Layout = "own") -> None:
    """Raise ValueError if `out` exists and is not a folder that `export` wrote in this layout."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder")
    described = {"own": "config.json", "published": NETWORK_FILE, "diffusers": PIPELINE}[layout]
    if out.is_dir() and any(out.iterdir()) and not ((out / described).is_file() and weights_file(out) is not None):
        raise ValueError(f"{out}: exists and is not a model folder; give a new folder")
