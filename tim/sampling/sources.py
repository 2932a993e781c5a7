"""Where a generator comes from: the device, and the folder of its model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import torch

from tim.model_folder.folder import is_model_folder
from tim.model_kinds import Dtype
from tim.pretrained.weight_files import HUB, local_folder
from tim.sampling.sampler import default_dtype


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The given device; None: the GPU if there is one, else the CPU. Raises ValueError for one that this machine does not have."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device}: not a device of this machine; give cpu, cuda or cuda:N") from error
    return chosen


def choose_dtype(dtype: Dtype | None, *, device: torch.device) -> Dtype:
    """The given precision; None: that of the device. Raises ValueError for an unknown one."""
    if dtype is not None and dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(map(repr, get_args(Dtype)))}")
    return default_dtype(device) if dtype is None else dtype


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
