"""The model folder: everything needed for sampling, in `config.json` and `model.safetensors` (docs/formats.md).

In the diffusers layout both are in `transformer/`, the weights as `diffusion_pytorch_model.safetensors`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tim.disk_cache import DiskCache
from tim.model_folder import paths
from tim.model_folder.replacing import replaced_folder
from tim.network import TransitionTransformer
from tim.pretrained.safetensors_files import (
    INDEX,
    MAX_SHARD_BYTES,
    LazyTensors,
    check_files,
    file_digest,
    file_facts,
    find_weights,
    read_shards,
    write_shards,
)
from tim.pretrained.weight_files import PIPELINE, Location

FORMAT = 1
STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"  # of the weights' file names
TRANSFORMER = "transformer"  # folder of the network in the diffusers layout
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
    folder: str | Path,
    weights: Mapping[str, Tensor] | LazyTensors,
    spec: ModelSpec,
    *,
    home: str | Path | None = None,
    copy_models: bool = False,
    layout: Literal["own", "diffusers"] = "own",
    card: str | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
    step: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Write a model folder atomically, replacing an older one.

    Paths of models inside `home` (by default the folder itself) are stored relative to the folder, so that both can be moved.
    With `copy_models`, codec, text encoder and tokenizer are copied into it. `layout` diffusers: weights and config.json in `transformer/`,
    the models in `vae/`, `text_encoder/` and `tokenizer/`. card: content of README.md; sources, step: where the parts of the model come
    from and how long it was trained, for config.json; complete: adds files to the folder before it appears. Raises ValueError if a model
    is missing.
    """
    part = TRANSFORMER if layout == "diffusers" else ""
    names = paths.DIFFUSERS_FOLDERS if part else paths.FOLDERS
    models: dict[str, Location] = {}
    codec, text = dict(spec.codec), spec.text
    if copy_models:
        codec, text, models = paths.copied(codec, text, folders=names, up="../" if part else "")
    else:
        roots = {"folder": Path(folder) / part, "home": Path(home or folder)}
        codec, text = paths.relative(codec, **roots), text and paths.relative(text, **roots)
    spec = replace(spec, codec=codec, text=text)
    kind = {"_class_name": "TransitionTransformer"} if part else {}
    origin = ({"sources": list(sources)} if sources else {}) | ({} if step is None else {"step": step})
    written = Contents(
        weights=weights if isinstance(weights, LazyTensors) else LazyTensors.of(weights),
        config="config.json",
        describe=lambda files: json.dumps({**kind, "format": FORMAT, **asdict(spec), **origin, "files": files}, indent=2) + "\n",
        part=part,
        stem=DIFFUSERS_STEM if part else STEM,
        models=models,
        texts={"README.md": card} if card is not None else {},
        max_shard_bytes=max_shard_bytes,
        complete=complete,
    )
    write_folder(folder, written)


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of a folder to write.

    weights: in `part` (a sub-folder, or "" for the folder itself), in files named after `stem`; config: name of the description beside
    them, which `describe` returns, given `bytes` and `sha256` of the other files by path; models: copied to sub-folders of these names;
    texts: content of further files; complete: called with the folder when all else is written.
    """

    weights: LazyTensors
    config: str
    describe: Callable[[Mapping[str, Any]], str]
    part: str = ""
    stem: str = STEM
    models: Mapping[str, Location] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    max_shard_bytes: int = MAX_SHARD_BYTES
    complete: Callable[[Path], None] | None = None


def write_folder(folder: str | Path, contents: Contents) -> None:
    """Write a folder atomically, replacing an older one."""
    with replaced_folder(folder) as partial:
        part = partial / contents.part
        part.mkdir(exist_ok=True)
        files = write_shards(part, contents.weights, stem=contents.stem, metadata={"format": "pt"}, max_bytes=contents.max_shard_bytes)
        for name, location in contents.models.items():
            paths.copy(location, partial / name)
            for file in sorted((partial / name).iterdir()):
                files[os.path.relpath(file, part)] = file_facts(file)
        if contents.part:
            (partial / PIPELINE).write_text(paths.pipeline_index(partial, part=contents.part), encoding="utf-8")
        for name, text in contents.texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        (part / contents.config).write_text(contents.describe(files), encoding="utf-8")
        if contents.complete is not None:
            contents.complete(partial)


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder has the description of a model, in our or the diffusers layout."""
    return description_file(folder).is_file()


def description_file(folder: str | Path) -> Path:
    """The config.json of a model folder, which describes all of it and has the digests of its files."""
    return _described(Path(folder)) / "config.json"


def is_pulled(folder: str | Path) -> bool:
    """Whether a model folder names the sources of its parts: it is of a published network. Raises ValueError if it is damaged."""
    return "sources" in _content(description_file(folder))


def training_step(folder: str | Path) -> int | None:
    """The step of the training that a model folder records. Raises ValueError if it is damaged."""
    step = _content(description_file(folder)).get("step")
    return step if isinstance(step, int) else None


def weights_file(folder: str | Path) -> Path | None:
    """The weights of a model folder, or the index of its shards; None if they are missing."""
    return find_weights(_described(Path(folder)), stems=(STEM, DIFFUSERS_STEM))


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", cache: DiskCache | None = None
) -> tuple[TransitionTransformer, ModelSpec]:
    """The network, ready to sample, and its spec. cache: see `load_weights`.

    Raises ValueError if the folder has no model, an unknown format, damaged files, or weights that do not fit the config.
    """
    spec = read_spec(folder)
    state = load_weights(folder, cache=cache)
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
    try:
        network.load_official(state)
    except ValueError as error:
        raise ValueError(f"{weights_file(folder)}: {error}") from error
    log.info("%s: rotary layout %s", folder, spec.rope)
    return network.to(device).eval().requires_grad_(False), spec


def load_weights(folder: str | Path, *, cache: DiskCache | None = None) -> dict[str, Tensor]:
    """The weights of a model folder, as stored. All files are compared with the digests in config.json, if it has them.

    cache: remembers the digests of the codec and the text encoder in the folder, so that they are not read each time. Raises ValueError if
    a file is missing or damaged.
    """
    described, weights = _described(Path(folder)), weights_file(folder)
    if weights is None:
        raise ValueError(f"{folder}: {STEM}.safetensors is missing: export the run again with `tim export`")

    def digest(file: Path) -> str:
        return file_digest(file) if cache is None or file.parent == described else cache.file_digest(file)

    check_files(described, _content(described / "config.json").get("files", {}), source="config.json", digest=digest)
    try:
        return read_shards(weights) if weights.name.endswith(INDEX) else load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: {error}") from error


def read_spec(folder: str | Path) -> ModelSpec:
    """The spec of a model folder. Raises ValueError if it is missing or of an unknown format."""
    described = _described(Path(folder))
    path = described / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a model folder (no config.json): give the folder that `tim export` or a finished run wrote")
    content = _content(path)
    names = {field.name for field in fields(ModelSpec)}
    if {name for name in content if not name.startswith("_")} - {"format", "files", "sources", "step"} != names:
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(names))}")
    spec = ModelSpec(**{name: content[name] for name in names})
    text = spec.text and paths.absolute(spec.text, folder=described)
    return replace(spec, codec=paths.absolute(spec.codec, folder=described), text=text)


def _described(folder: Path) -> Path:
    """The folder of config.json: `folder`, or its `transformer/` in the diffusers layout."""
    is_pipeline = not (folder / "config.json").is_file() and (folder / PIPELINE).is_file()
    return folder / TRANSFORMER if is_pipeline else folder


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{path}: format {found!r}, but this version of tim reads format {FORMAT}: use the version that wrote it")
    return content
