"""Locate the weights of other libraries' models, and compute their digest.

A path is one of
- a folder written by `save_pretrained`: a config with safetensors (single, sharded, or a variant such as fp16) or `.bin`;
- one weights file in such a folder;
- a diffusers pipeline folder, whose sub-folder for the model is used;
- any of these in a hub repository: `hf://OWNER/NAME`, `hf://OWNER/NAME/vae`, `hf://OWNER/NAME@REVISION`, downloaded once into the hub's
  cache.

Pickles (`.bin`) are used if there are no safetensors, and read as tensors only. No code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from tim.pretrained import hub
from tim.pretrained.hub import HUB
from tim.pretrained.official import unreadable
from tim.pretrained.safetensors_files import file_digest

PIPELINE = "model_index.json"
SAFE, PICKLE = ".safetensors", ".bin"
_DESCRIPTIONS = (".json", ".txt", ".model")
_TAKEN = (*_DESCRIPTIONS, SAFE)
CONFIG = "config.json"
_CONFIGS = (CONFIG, "open_clip_config.json")
FAILURES = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)  # of loading weights
log = logging.getLogger(__name__)


class Location(NamedTuple):
    """A model's folder, and the weights file in it if one was given."""

    folder: Path
    file: Path | None


class Loadable(NamedTuple):
    """A folder that `from_pretrained` reads, and its arguments."""

    folder: Path
    arguments: dict[str, Any]


class NoWeightsError(ValueError):
    """A folder without weights, or with several weights files and no default one."""


def one_line(error: BaseException) -> str:
    """An error's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def local_folder(path: str | Path, *, parts: Sequence[str] = ()) -> Path:
    """The folder of a path; hub folders are downloaded if not cached. `parts`: see `locate`. Raises ValueError."""
    return locate(path, parts=parts).folder


def locate(path: str | Path, *, parts: Sequence[str] = ()) -> Location:
    """The folder of a model, and the weights file in it if `path` names one.

    parts: sub-folders of a pipeline that can have this kind of model, preferred first. Raises ValueError if there is no such folder.
    """
    name = str(path)
    if name.startswith(HUB):
        return _download(name, parts=parts)
    found = Path(path)
    if found.is_file() and found.suffix in (SAFE, PICKLE):
        return Location(found.parent, found)
    if found.is_file():
        raise ValueError(f"{path}: weights are read from {SAFE} and {PICKLE} files, or from a folder with config.json and safetensors")
    if not found.is_dir():
        raise ValueError(f"{path}: no such folder; give one with config.json and safetensors, or hf://OWNER/NAME[/FOLDER]")
    return Location(found / _part(found, parts), None)


def locate_config(path: str | Path, *, parts: Sequence[str] = ()) -> Location:
    """As `locate`, but of a model on the hub that has a config.json, no weights are downloaded."""
    if not str(path).startswith(HUB):
        return locate(path, parts=parts)
    address = hub.parse(str(path))
    is_file = address.inside.endswith((SAFE, PICKLE))
    inside = address.inside.rpartition("/")[0] if is_file else _part_on_hub(address, parts)
    folder = hub.snapshot(address, [f"{inside}/{CONFIG}" if inside else CONFIG]) / inside
    return Location(folder, None) if (folder / CONFIG).is_file() else locate(path, parts=parts)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ValueError if it is missing or damaged."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = "is a pipeline without this part" if (folder / PIPELINE).is_file() else "has no config.json"
        raise ValueError(f"{folder}: {why}; give a model folder written by save_pretrained") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder}/config.json: not a mapping")
    return found


def failure(location: Location, error: BaseException, *, library: str) -> ValueError:
    """The one-line error for weights that a library cannot read."""
    if isinstance(error, NoWeightsError):
        return error
    path = location.file or location.folder
    is_safe = path.suffix == SAFE or any(path.glob(f"*{SAFE}"))
    return ValueError(f"{path}: not weights that {library} reads ({one_line(error) if is_safe else unreadable(error)})")


def weights_file(location: Location, *, stem: str, pickle_stem: str) -> Path:
    """The weights of a model: the given file, else that of its folder, or the index file of sharded weights. Arguments as in `loadable`."""
    return location.file or _chosen(location.folder, stem=stem, pickle_stem=pickle_stem)


@contextmanager
def loadable(location: Location, *, stem: str, pickle_stem: str) -> Iterator[Loadable]:
    """A folder whose weights have the names that `from_pretrained` expects: a temporary folder of links if they are named differently.

    stem, pickle_stem: file name stems of safetensors and pickles ("diffusion_pytorch_model", "model", "pytorch_model"). Raises ValueError
    if the folder has no weights, or several and no default one.
    """
    chosen = weights_file(location, stem=stem, pickle_stem=pickle_stem)
    is_safe = SAFE in chosen.suffixes or chosen.name.endswith(f"{SAFE}.index.json")
    expected = f"{stem}{SAFE}" if is_safe else f"{pickle_stem}{PICKLE}"
    arguments = {"use_safetensors": is_safe, "local_files_only": True}
    if not is_safe:
        log.info("%s: pickle, read as tensors only", chosen)
    if chosen.name == expected or chosen.suffix == ".json":
        variant = chosen.name.removesuffix(".json").rpartition(".index.")[2] if ".index." in chosen.name.removesuffix(".json") else None
        yield Loadable(location.folder, {**arguments, **({"variant": variant} if variant else {})})
        return
    with tempfile.TemporaryDirectory() as temporary:
        for file in location.folder.iterdir():
            if file.suffix in _DESCRIPTIONS and ".index." not in file.name and file.is_file():
                os.symlink(file.resolve(), Path(temporary) / file.name)
        os.symlink(chosen.resolve(), Path(temporary) / expected)
        yield Loadable(Path(temporary), arguments)


def digest(path: str | Path, *, parts: Sequence[str] = (), weights: bool = True, of_file: Callable[[Path], str] = file_digest) -> str:
    """sha256 in hexadecimal of a file or of all model files of a folder; without `weights`, of the other files only.

    of_file: digest of each file, for example `DiskCache.file_digest`. Raises ValueError if there is no folder.
    """
    if Path(path).is_file():
        return of_file(Path(path))
    location = locate(path, parts=parts)
    if location.file is not None:
        return of_file(location.file)
    included = [file for file in files(location) if weights or file.suffix in _DESCRIPTIONS]
    return hashlib.sha256("\n".join(f"{file.name} {of_file(file)}" for file in included).encode()).hexdigest()


def model_digest(path: str | Path, *, parts: Sequence[str] = (), of_file: Callable[[Path], str] = file_digest) -> str:
    """`digest` of the weights at `path`, and if that is one file, of the config beside it: all that a model computes with."""
    found = locate(path, parts=parts)
    weights = digest(path, parts=parts, of_file=of_file)
    configs = [] if found.file is None else [file for name in _CONFIGS if (file := found.folder / name).is_file()]
    return hashlib.sha256(" ".join([weights, *map(of_file, configs)]).encode()).hexdigest()


def files(location: Location) -> list[Path]:
    """The files of a model, by name: descriptions, and all weights or the given weights file.

    Pickles are included if there are no safetensors.
    """
    all_files = sorted(file for file in location.folder.iterdir() if file.is_file())
    if location.file is not None:
        return [file for file in all_files if file.suffix in _DESCRIPTIONS or file.name == location.file.name]
    suffixes = _TAKEN if any(file.suffix == SAFE for file in all_files) else (*_TAKEN, PICKLE)
    return [file for file in all_files if file.suffix in suffixes]


def _part(folder: Path, parts: Sequence[str]) -> str:
    """The sub-folder of a pipeline for the model, "" if the folder is a model's own."""
    if (folder / "config.json").is_file() and not (folder / PIPELINE).is_file():
        return ""
    return next((part for part in parts if any((folder / part).glob("*.json"))), "")


def _chosen(folder: Path, *, stem: str, pickle_stem: str) -> Path:
    """The weights in a folder: default before variants, safetensors before pickles, the index file of sharded weights."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for suffix, plain in ((SAFE, stem), (PICKLE, pickle_stem)):
        for name in (f"{plain}{suffix}", f"{plain}{suffix}.index.json"):
            if name in names:
                return folder / name
        indexes = [name for name in names if name.startswith(f"{plain}{suffix}.index.") and name.endswith(".json")]
        others = [name for name in names if name.endswith(suffix) and "-of-" not in name]
        found = indexes or [name for name in others if name.startswith(f"{plain}.")] or others
        if len(found) == 1:
            log.info("weights: %s", folder / found[0])
            return folder / found[0]
        if found:
            raise NoWeightsError(f"{folder}: has {', '.join(found[:4])}: give the path of one of them, for example {folder / found[0]}")
    raise NoWeightsError(f"{folder}: has no weights: expected {stem}{SAFE}, a variant of it, or {pickle_stem}{PICKLE}")


def wanted(names: Collection[str], inside: str, *, parts: Sequence[str] = ()) -> list[str]:
    """Those files of a hub repository that `locate` downloads for a folder in it; arguments as there. Empty if there is no model."""
    if not inside and PIPELINE in names:
        inside = next((part for part in parts if any(name.startswith(f"{part}/") for name in names)), "")
    prefix = f"{inside}/" if inside else ""
    if inside.endswith((SAFE, PICKLE)):
        folder = inside.rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
    found = [name for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    if inside.endswith((SAFE, PICKLE)):
        return [name for name in found if name == inside or name.endswith(_DESCRIPTIONS)]
    suffixes = _TAKEN if any(name.endswith(SAFE) for name in found) else (*_TAKEN, PICKLE)
    return [name for name in found if name.endswith(suffixes)]


def _download(name: str, *, parts: Sequence[str]) -> Location:
    """Download a hub address into the hub's cache. Raises ValueError if that fails."""
    address = hub.parse(name)
    repository, _, inside = address
    if inside.endswith((SAFE, PICKLE)):
        folder, _, file = inside.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        root = hub.snapshot(address, [prefix + file, *(f"{prefix}*{suffix}" for suffix in _DESCRIPTIONS)])
        if not (root / inside).is_file():
            raise ValueError(f"{name}: {repository} has no file {inside}")
        return Location(root / folder, root / inside)
    inside = _part_on_hub(address, parts)
    prefix = f"{inside}/" if inside else ""
    root = hub.snapshot(address, [f"{prefix}*{suffix}" for suffix in _TAKEN])
    folder = root / inside
    if not folder.is_dir():
        raise ValueError(f"{name}: {repository} has no folder {inside}")
    if parts and not any(folder.glob(f"*{SAFE}")):
        hub.snapshot(address, [f"{prefix}*{PICKLE}"])
    return Location(folder, None)


def _part_on_hub(address: hub.Address, parts: Sequence[str]) -> str:
    """The folder of a model in a repository: the given one, that of a pipeline's part, or "" for the repository itself."""
    if address.inside or not parts:
        return address.inside
    root = hub.snapshot(address, [PIPELINE, CONFIG])
    if not (root / PIPELINE).is_file():
        return ""
    components = json.loads((root / PIPELINE).read_text(encoding="utf-8"))
    return next((part for part in parts if part in components), "")
