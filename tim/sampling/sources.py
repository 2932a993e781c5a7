"""Where a generator comes from: the device, and the folder of its model."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tim.model_folder.folder import is_model_folder
from tim.pretrained.weight_files import HUB, local_folder


def choose_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(model: str | Path) -> Path:
    """The model folder at a path or hub address. Raises ValueError if there is none."""
    name, path = str(model), Path(model)
    if name.startswith(HUB):
        return local_folder(name)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return local_folder(HUB + name)
    if path.is_dir() and not is_model_folder(path) and is_model_folder(path / "model"):
        return path / "model"
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: this run has no model/ yet: export a checkpoint with `tim export {path} --out FOLDER`")
    return path
