"""Weights of other libraries' models: where they lie, and what tells one from another.

A path is a local folder as `save_pretrained` writes it, or `hf://OWNER/NAME`, which is fetched once into the hub's cache. Only configs,
tokenizers and safetensors are taken; pickles stay where they are, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HUB = "hf://"
_TAKEN = (".json", ".txt", ".model", ".safetensors")


def in_words(error: BaseException) -> str:
    """What another library's error says, in one line of bounded length."""
    return " ".join(str(error).split())[:200]


def local_folder(path: str | Path) -> Path:
    """The folder that a path means; one of the hub is fetched where it is not in the cache. Raises ValueError where there is none."""
    name = str(path)
    if not name.startswith(HUB):
        if not Path(path).is_dir():
            raise ValueError(f"{path}: no such folder; give one with config.json and safetensors, or hf://OWNER/NAME")
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=[f"*{suffix}" for suffix in _TAKEN]))
    except Exception as error:  # what the hub, its cache and the network raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{name} cannot be fetched ({why}); give a local folder with its config.json and safetensors instead") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises ValueError where it is missing or damaged."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: has no config.json; give the folder of a model as save_pretrained writes it") from None
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder}/config.json: not a mapping")
    return found


def digest(path: str | Path) -> str:
    """sha256 in hexadecimal of a file, or of all files of a folder that a model is made of. Raises ValueError where there is no folder."""
    if Path(path).is_file():
        return _of_file(Path(path))
    folder = local_folder(path)
    files = sorted(file for file in folder.iterdir() if file.suffix in _TAKEN and file.is_file())
    parts = [f"{file.name} {_of_file(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _of_file(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
