"""Weights of other libraries' models: where they are, and their digest.

A path is one of
- a folder as `save_pretrained` writes it: a config with safetensors beside it (whole, in parts, or of a variant such as fp16), or `.bin`;
- one file of weights in such a folder;
- a pipeline's folder, of which the sub-folder of the wanted part is taken;
- any of these in a repository of the hub: `hf://OWNER/NAME`, `hf://OWNER/NAME/vae`, fetched once into the hub's cache.

Pickles (`.bin`) are read as tensors only, and taken where there are no safetensors. No code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from tim.pretrained.official import unreadable

HUB = "hf://"
PIPELINE = "model_index.json"
SAFE, PICKLE = ".safetensors", ".bin"
_DESCRIPTIONS = (".json", ".txt", ".model")
_TAKEN = (*_DESCRIPTIONS, SAFE)
FAILURES = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)  # of loading weights
log = logging.getLogger(__name__)


class Location(NamedTuple):
    """A model's folder, and the file of weights in it that was named, if one was."""

    folder: Path
    file: Path | None


class Loadable(NamedTuple):
    """A folder that `from_pretrained` reads with these arguments."""

    folder: Path
    arguments: dict[str, Any]


class NoWeightsError(ValueError):
    """A folder without weights, or with several files of which none is the plain one."""


def in_words(error: BaseException) -> str:
    """What another library's error says, in one line of bounded length."""
    return " ".join(str(error).split())[:200]


def local_folder(path: str | Path, *, parts: Sequence[str] = ()) -> Path:
    """The folder that a path means; one of the hub is fetched where it is not in the cache. `parts`: see `locate`. Raises ValueError."""
    return locate(path, parts=parts).folder


def locate(path: str | Path, *, parts: Sequence[str] = ()) -> Location:
    """The folder of a model, and the file of weights in it if `path` names one.

    parts: names of the sub-folders, the preferred first, in which a pipeline has this kind of model. Raises ValueError where there is none.
    """
    name = str(path)
    if name.startswith(HUB):
        return _fetched(name, parts=parts)
    found = Path(path)
    if found.is_file() and found.suffix in (SAFE, PICKLE):
        return Location(found.parent, found)
    if found.is_file():
        raise ValueError(f"{path}: weights are read from {SAFE} and {PICKLE} files, or from a folder with config.json and safetensors")
    if not found.is_dir():
        raise ValueError(f"{path}: no such folder; give one with config.json and safetensors, or hf://OWNER/NAME[/FOLDER]")
    return Location(found / _part(found, parts), None)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises ValueError where it is missing or damaged."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = "is a pipeline without the part that is wanted" if (folder / PIPELINE).is_file() else "has no config.json"
        raise ValueError(f"{folder}: {why}; give the folder of a model as save_pretrained writes it") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder}/config.json: not a mapping")
    return found


def failure(location: Location, error: BaseException, *, library: str) -> ValueError:
    """The error for weights that a library does not read, in one line."""
    if isinstance(error, NoWeightsError):
        return error
    place = location.file or location.folder
    is_safe = place.suffix == SAFE or any(place.glob(f"*{SAFE}"))
    return ValueError(f"{place}: not weights that {library} reads ({in_words(error) if is_safe else unreadable(error)})")


@contextmanager
def loadable(location: Location, *, stem: str, pickle_stem: str) -> Iterator[Loadable]:
    """A folder whose weights have the names that `from_pretrained` expects; a temporary one of links where they are called otherwise.

    stem: of the name of safetensors, pickle_stem: of pickles ("diffusion_pytorch_model", "model", "pytorch_model"). Raises ValueError where
    the folder has no weights, or several of which none is the plain one.
    """
    chosen = location.file or _chosen(location.folder, stem=stem, pickle_stem=pickle_stem)
    is_safe = SAFE in chosen.suffixes or chosen.name.endswith(f"{SAFE}.index.json")
    expected = f"{stem}{SAFE}" if is_safe else f"{pickle_stem}{PICKLE}"
    arguments = {"use_safetensors": is_safe, "local_files_only": True}
    if not is_safe:
        log.info("%s: read as tensors only, as all pickles", chosen)
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


def digest(path: str | Path, *, parts: Sequence[str] = (), weights: bool = True) -> str:
    """sha256 in hexadecimal of a file, or of all files of a folder that a model is made of; without `weights` of the others alone.

    Raises ValueError where there is no folder.
    """
    if Path(path).is_file():
        return _of_file(Path(path))
    location = locate(path, parts=parts)
    if location.file is not None:
        return _of_file(location.file)
    counted = [file for file in files(location) if weights or file.suffix in _DESCRIPTIONS]
    return hashlib.sha256("\n".join(f"{file.name} {_of_file(file)}" for file in counted).encode()).hexdigest()


def files(location: Location) -> list[Path]:
    """The files that a model is made of, by name: descriptions, and weights or the file of them that was named.

    Pickles count where there are no safetensors.
    """
    everything = sorted(file for file in location.folder.iterdir() if file.is_file())
    if location.file is not None:
        return [file for file in everything if file.suffix in _DESCRIPTIONS or file.name == location.file.name]
    suffixes = _TAKEN if any(file.suffix == SAFE for file in everything) else (*_TAKEN, PICKLE)
    return [file for file in everything if file.suffix in suffixes]


def _part(folder: Path, parts: Sequence[str]) -> str:
    """The sub-folder of a pipeline that is wanted, "" for a folder that is a model's own."""
    if (folder / "config.json").is_file() and not (folder / PIPELINE).is_file():
        return ""
    return next((part for part in parts if any((folder / part).glob("*.json"))), "")


def _chosen(folder: Path, *, stem: str, pickle_stem: str) -> Path:
    """The weights in a folder: plain before variants, safetensors before pickles, a list of parts for weights in several files."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for suffix, plain in ((SAFE, stem), (PICKLE, pickle_stem)):
        for name in (f"{plain}{suffix}", f"{plain}{suffix}.index.json"):
            if name in names:
                return folder / name
        lists = [name for name in names if name.startswith(f"{plain}{suffix}.index.") and name.endswith(".json")]
        others = [name for name in names if name.endswith(suffix) and "-of-" not in name]
        found = lists or [name for name in others if name.startswith(f"{plain}.")] or others
        if len(found) == 1:
            log.info("weights: %s", folder / found[0])
            return folder / found[0]
        if found:
            raise NoWeightsError(f"{folder}: holds {', '.join(found[:4])}: name the file that is meant, {folder / found[0]} for example")
    raise NoWeightsError(
        f"{folder}: holds no weights: expected {stem}{SAFE} beside its config.json, a variant of it, or {pickle_stem}{PICKLE}"
    )


def _fetched(name: str, *, parts: Sequence[str]) -> Location:
    """What an address of the hub means, fetched into its cache. Raises ValueError where it cannot be had."""
    owner, _, rest = name.removeprefix(HUB).strip("/").partition("/")
    repository, _, inside = rest.partition("/")
    if not owner or not repository:
        raise ValueError(f"{name}: expected {HUB}OWNER/NAME, or {HUB}OWNER/NAME/FOLDER for a part of a pipeline")
    repository = f"{owner}/{repository}"
    if inside.endswith((SAFE, PICKLE)):
        folder, _, file = inside.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        root = _snapshot(repository, [prefix + file, *(f"{prefix}*{suffix}" for suffix in _DESCRIPTIONS)], name=name)
        if not (root / inside).is_file():
            raise ValueError(f"{name}: {repository} has no file {inside}")
        return Location(root / folder, root / inside)
    if not inside and parts:
        root = _snapshot(repository, [PIPELINE, "config.json"], name=name)
        if (root / PIPELINE).is_file():
            listed = json.loads((root / PIPELINE).read_text(encoding="utf-8"))
            inside = next((part for part in parts if part in listed), "")
    prefix = f"{inside}/" if inside else ""
    root = _snapshot(repository, [f"{prefix}*{suffix}" for suffix in _TAKEN], name=name)
    folder = root / inside
    if not folder.is_dir():
        raise ValueError(f"{name}: {repository} has no folder {inside}")
    if parts and not any(folder.glob(f"*{SAFE}")):
        _snapshot(repository, [f"{prefix}*{PICKLE}"], name=name)
    return Location(folder, None)


def _snapshot(repository: str, patterns: list[str], *, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # what the hub, its cache and the network raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{name} cannot be fetched ({why}); give a local folder with its config.json and safetensors instead") from error


def _of_file(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
