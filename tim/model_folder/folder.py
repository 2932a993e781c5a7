"""The model folder: everything that sampling needs, in `config.json` and `model.safetensors` (docs/formats.md)."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tim.model_folder import paths
from tim.network import TransitionTransformer
from tim.pretrained.weight_files import Location

FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model is made of, as `config.json` holds it.

    network: parameters under the published names; rope: rotary layout; transport: {kind} and its settings; codec: {kind, path};
    text: {kind, path, tokenizer, precision, max_tokens}, null for class models; sampling: defaults {steps, guidance, interval, shift}, and
    whether the network knows r = t alone (`instantaneous`).
    """

    network: dict[str, Any]
    rope: str
    transport: dict[str, Any]
    codec: dict[str, Any]
    text: dict[str, Any] | None
    sampling: dict[str, Any]


def save_model(
    folder: str | Path, state_dict: dict[str, Tensor], spec: ModelSpec, *, home: str | Path | None = None, copy_models: bool = False
) -> None:
    """Write a model folder; it appears whole or not at all, an older one is replaced.

    Models that lie in `home` (by default the folder itself), which is moved with it, are named relative to the folder. With `copy_models`
    codec, text encoder and tokenizer are copied into it. Raises ValueError where one to be copied is not there.
    """
    models: dict[str, Location] = {}
    codec, words = dict(spec.codec), spec.text
    if copy_models:
        codec, words, models = paths.copied(codec, words)
    else:
        moved = {"folder": Path(folder), "home": Path(home or folder)}
        codec, words = paths.relative(codec, **moved), words and paths.relative(words, **moved)
    spec = replace(spec, codec=codec, text=words)
    text = json.dumps({"format": FORMAT, **asdict(spec)}, indent=2) + "\n"
    write_folder(folder, state_dict, name="config.json", text=text, models=models)


def write_folder(
    folder: str | Path, state_dict: dict[str, Tensor], *, name: str, text: str, models: Mapping[str, Location] | None = None
) -> None:
    """Write `model.safetensors`, beside it a file of this name and text, and copies of `models` in sub-folders of these names.

    The folder appears whole or not at all.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / name).write_text(text, encoding="utf-8")
    for part, location in (models or {}).items():
        paths.copy(location, partial / part)
    for path in (partial / "model.safetensors", partial / name):
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    _sync(folder.parent)


def load_model(folder: str | Path, *, device: torch.device | str = "cpu") -> tuple[TransitionTransformer, ModelSpec]:
    """The network, ready to sample, and its spec.

    Raises ValueError where the folder holds no model, an unknown format, or weights that do not fit the config.
    """
    spec = read_spec(folder)
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder}: model.safetensors is missing: export the run again with `tim export`")
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
    try:
        network.load_official(load_file(weights))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{weights}: {error}") from error
    log.info("%s: rotary layout %s", folder, spec.rope)
    return network.to(device).eval().requires_grad_(False), spec


def read_spec(folder: str | Path) -> ModelSpec:
    """The spec of a model folder. Raises ValueError where there is none that this version reads."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a model folder (no config.json): give the folder that `tim export` or a finished run wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{path}: format {found!r}, but this version of tim reads format {FORMAT}: use the version that wrote it")
    names = {field.name for field in fields(ModelSpec)}
    if set(content) - {"format"} != names:
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(names))}")
    spec = ModelSpec(**{name: content[name] for name in names})
    words = spec.text and paths.absolute(spec.text, folder=Path(folder))
    return replace(spec, codec=paths.absolute(spec.codec, folder=Path(folder)), text=words)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
