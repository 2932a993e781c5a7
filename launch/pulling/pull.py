"""Build the model folder of a published network. Read `pull` from top to bottom.

Parts come from the hub or from given files. Downloads stay in the hub's cache: a pull that was stopped goes on with the files that it has,
and its unfinished folder is written anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoints.export import check_target
from launch.checkpoints.initial_weights import ROPE_OF_PUBLISHED, weights_file
from launch.checkpoints.model_spec import spec_of
from launch.config import yaml_file
from launch.config.load import load_config
from launch.config.recipes import config_path, recipe_names
from launch.console import Console
from launch.pulling import checks, downloads
from launch.pulling.downloads import Download, Part
from launch.pulling.published import PUBLISHED, Published
from pipeline.progress import Progress
from tim.codecs import load as codec_files
from tim.model_folder import paths
from tim.model_folder.folder import ModelSpec, is_model_folder, save_model
from tim.pretrained import hub, weight_files
from tim.pretrained.hub import HUB
from tim.pretrained.lazy_weights import lazy_weights
from tim.pretrained.safetensors_files import LazyTensors, file_digest
from tim.text import encoders, tokenizers

_OTHERS = Published("", 0, "the codec of the recipe", text_name="the text encoder of the recipe")  # networks of users' own recipes


@dataclass(frozen=True, slots=True)
class Given:
    """Files, folders or hub addresses of the parts, each None for the recipe's or the published one; revision of the network's repository;
    sha256 digests by file name."""

    network: str | None = None
    codec: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    digests: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model folder: its bytes, the network's parameters, and where each part comes from."""

    folder: Path
    parameters: int
    bytes: int
    sources: list[dict[str, Any]]


def pull(recipe: str, *, out: Path, given: Given, console: Console) -> Pulled:
    """Write the model folder `out` of a recipe's network, which has all that sampling needs. Replaces an older model folder.

    Raises:
        ValueError: the recipe is not of a published network, a part is not known or cannot be downloaded, or the parts do not fit.
    """
    check_target(out)
    wanted = _wanted_parts(recipe, given=given)
    planned = {name: downloads.plan(part) for name, part in wanted.items() if part.path.startswith(HUB)}
    online = [each for each in planned.values() if each is not None]
    _check_space(wanted, online, out=out)
    spec = _spec(recipe, wanted)
    checks.check_older(out, spec)
    local = _fetched(wanted, planned, console=console)

    source = _weights(local["network"])
    weights = lazy_weights(source)
    spec = checks.fitting_params(_with_paths(spec, local), weights, source=source)
    checks.check_codec(spec)
    checks.check_text(spec)
    files = _files(spec, source)
    checks.check_digests(given.digests or {}, [file for part in files.values() for file in part])
    console.line(f"checked: {len(weights.shapes)} tensors, codec {spec.codec['kind']}, rotary layout {spec.rope}")

    used = checks.used_weights(spec, weights, source=source)
    parameters = sum(map(math.prod, used.shapes.values()))
    sources = [_source(name, wanted[name if name in wanted else "text"], files[name]) for name in files]
    card = _card(recipe, sources, parameters=parameters)
    with console.progress() as report:
        read = _reported(used, report=report)
        save_model(out, read, spec, copy_models=True, card=card, sources=sources)
    return Pulled(out, parameters, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()), sources)


def _wanted_parts(recipe: str, *, given: Given) -> dict[str, Part]:
    """Network, codec, text encoder and tokenizer of a recipe, as far as it has them, by name.

    Raises ValueError naming the options of all parts that are not known.
    """
    if recipe in recipe_names() and recipe not in PUBLISHED and not Path(recipe).is_file():
        names = ", ".join(PUBLISHED)
        raise ValueError(f"{recipe}: not the recipe of a published network: give one of {names}, or a YAML file of your own")
    values: Any = yaml_file.read(config_path(recipe)).values
    published = PUBLISHED.get(recipe, _OTHERS)
    sections = {name: values.get(name) or {} for name in ("codec", "text")}
    has_text = values.get("condition", "text") == "text" and sections["text"].get("kind", "lookup") != "lookup"
    has_codec = sections["codec"].get("kind", "pixel") != "pixel"
    has = {"codec": has_codec, "text": has_text, "tokenizer": has_text}
    for name in has:
        if (value := getattr(given, name)) is not None and not has[name]:
            raise ValueError(f"--{name} {value}: the model of {recipe} has no weights for that; leave it out")
    network = given.network or published.network
    if given.revision is not None:
        network = _at_revision(network, given.revision)
    found: dict[str, tuple[str | None, tuple[str, ...], str]] = {"network": (network, (), "FILE, its published weights")}
    if has_codec:
        path = given.codec or sections["codec"].get("path") or published.codec
        found["codec"] = path, codec_files.PARTS, f"FOLDER, {published.codec_name}"
    if has_text:
        path = given.text or sections["text"].get("path") or published.text
        found["text"] = path, encoders.PARTS, f"FOLDER, {published.text_name}"
        if (tokenizer := given.tokenizer or sections["text"].get("tokenizer")) is not None:
            found["tokenizer"] = tokenizer, tokenizers.PARTS, ""
    unknown = [f"--{name} {what}" for name, (path, _, what) in found.items() if path is None]
    if unknown:
        raise ValueError(f"{recipe}: no known place on the hub for some parts: give {'; '.join(unknown)} (or {HUB}OWNER/NAME)")
    return {name: Part(f"--{name}", str(path), folders) for name, (path, folders, _) in found.items()}


def _at_revision(network: str | None, revision: str) -> str | None:
    """The network's hub address at a revision."""
    if network is None or not network.startswith(HUB):
        raise ValueError(f"--revision {revision}: goes with a network on the hub, --network {HUB}OWNER/NAME/FILE")
    return str(hub.parse(network)._replace(revision=revision))


def _spec(recipe: str, wanted: Mapping[str, Part]) -> ModelSpec:
    """The description of the recipe's model, with the rotary layout of published weights unless the recipe states one."""
    keys = {"codec": "codec.path", "text": "text.path", "tokenizer": "text.tokenizer"}
    overrides = [f"{keys[name]}={json.dumps(part.path)}" for name, part in wanted.items() if name in keys]
    config = load_config(recipe, overrides=overrides)
    rope = config.network.rope if "rope" in config.network.model_fields_set else ROPE_OF_PUBLISHED
    return replace(spec_of(config), rope=rope)


def _with_paths(spec: ModelSpec, local: Mapping[str, Path]) -> ModelSpec:
    codec = {**spec.codec, **({"path": str(local["codec"])} if "codec" in local else {})}
    keys = {"text": "path", "tokenizer": "tokenizer"}
    paths = {keys[name]: str(path) for name, path in local.items() if name in keys}
    return replace(spec, codec=codec, text=None if spec.text is None else {**spec.text, **paths})


def _check_space(wanted: Mapping[str, Part], online: Sequence[Download], *, out: Path) -> None:
    """Raise ValueError if there is no room for the downloads and the folder, or if a part on this machine is missing."""
    missing = sum(sum(each.missing.values()) for each in online)
    files = [file for part in wanted.values() if not part.path.startswith(HUB) for file in downloads.given_files(part)]
    copied = sum(file.stat().st_size for file in files) + sum(sum(each.sizes.values()) for each in online)
    downloads.check_space([(hub.cache_folder(), missing), (out, copied)])


def _fetched(wanted: Mapping[str, Part], planned: Mapping[str, Download | None], *, console: Console) -> dict[str, Path]:
    """The local path of each part; hub parts are downloaded."""
    total = sum(sum(each.missing.values()) for each in planned.values() if each is not None)
    local, done = {}, 0
    if total:
        console.line(f"downloading {total / 1e6:,.1f} MB to {hub.cache_folder()}")
    with console.progress() as report:
        for name, part in wanted.items():
            if name not in planned:
                local[name] = Path(part.path)
            elif (found := planned[name]) is None:
                local[name] = downloads.fetch_cached(part)
            else:
                new = sum(found.missing.values())
                local[name] = downloads.fetch(found, done=done, total=total, report=report)
                done += new
    return local


def _weights(path: Path) -> Path:
    """The file of a network's weights, in a folder if it is the only one."""
    if path.is_dir() and is_model_folder(path):
        raise ValueError(f"--network {path}: is a model folder already: sample from it, or give a file of weights")
    try:
        return weights_file(path) if path.is_dir() else path
    except ValueError as error:
        raise ValueError(f"--network {error}") from error


def _files(spec: ModelSpec, source: Path) -> dict[str, list[Path]]:
    """The files of each part."""
    _, _, models = paths.copied(spec.codec, spec.text, folders=paths.FOLDERS, up="")
    names: dict[str, str] = dict(zip(paths.FOLDERS, ("codec", "text", "tokenizer"), strict=True))
    others = {names[folder]: weight_files.files(location) for folder, location in models.items()}
    return {"network": downloads.network_files(source), **others}


def _source(name: str, part: Part, files: Sequence[Path]) -> dict[str, Any]:
    """Where a part comes from, for config.json: its address or path as given, the hub's commit, and the weights' digest."""
    revision = hub.commit_of(files[0])
    digest = {"sha256": file_digest(files[0])} if name == "network" else {}
    return {"part": name, "from": part.path, **({} if revision is None else {"revision": revision}), **digest}


def _card(recipe: str, sources: Sequence[Mapping[str, Any]], *, parameters: int) -> str:
    """README.md of a pulled model."""
    rows = [f"| {each['part']} | {each['from']} | {each.get('revision', '')} |" for each in sources]
    return "\n".join(
        [
            "# Transition Model, published weights",
            "",
            f"Written by `tim pull {Path(recipe).name}`: {parameters:,} parameters.",
            "The licences are those of the parts.",
            "",
            "| part | from | revision |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _reported(weights: LazyTensors, *, report: Progress) -> LazyTensors:
    """The same tensors; reports those that have been read."""
    read = 0

    def counted(name: str) -> Tensor:
        nonlocal read
        tensor = weights.read(name)
        read += 1
        report("convert (tensors)", read, len(weights.shapes))
        return tensor

    return LazyTensors(weights.shapes, weights.dtypes, counted)
