"""The model folder: everything needed for sampling, in `config.json` and `model.safetensors` (docs/formats.md)."""

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
    """Description of a model, stored in `config.json`.

    network: parameters with the published names; rope: rotary layout; transport: {kind} and its settings; codec: {kind, path};
    text: {kind, path, tokenizer, precision, max_tokens}, null for class models; sampling: defaults {steps, guidance, interval, shift}, and
    `instantaneous` for a network trained with r = t only.
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
    """Write a model folder atomically, replacing an older one.

    Paths of models inside `home` (by default the folder itself) are stored relative to the folder, so that both can be moved.
    With `copy_models`, codec, text encoder and tokenizer are copied into it. Raises ValueError if one of them is missing.
    """
    models: dict[str, Location] = {}
    codec, text = dict(spec.codec), spec.text
    if copy_models:
        codec, text, models = paths.copied(codec, text)
    else:
        roots = {"folder": Path(folder), "home": Path(home or folder)}
        codec, text = paths.relative(codec, **roots), text and paths.relative(text, **roots)
    spec = replace(spec, codec=codec, text=text)
    config = json.dumps({"format": FORMAT, **asdict(spec)}, indent=2) + "\n"
    write_folder(folder, state_dict, name="config.json", text=config, models=models)


def write_folder(
    folder: str | Path, state_dict: dict[str, Tensor], *, name: str, text: str, models: Mapping[str, Location] | None = None
) -> None:
    """Write a folder atomically: `model.safetensors`, a file `name` with `text`, and copies of `models` in sub-folders of their names."""
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

    Raises ValueError if the folder has no model, an unknown format, or weights that do not fit the config.
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
    """The spec of a model folder. Raises ValueError if it is missing or of an unknown format."""
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
    text = spec.text and paths.absolute(spec.text, folder=Path(folder))
    return replace(spec, codec=paths.absolute(spec.codec, folder=Path(folder)), text=text)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
