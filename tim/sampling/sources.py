"""Where a generator comes from: the device, and the folder of its model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import torch

from tim.model_folder.folder import is_model_folder
from tim.model_folder.location import local_model
from tim.model_kinds import Dtype
from tim.pretrained.hub import HUB
from tim.sampling.sampler import default_dtype


def choose_device(device: torch.device | str | None = None, *, option: str = "device") -> torch.device:
    """The given device; None: the GPU if there is one, else the CPU. Raises ValueError, which names `option`, for one that this machine
    does not have."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        known = "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu, since PyTorch finds no GPU"
        raise ValueError(f"{option} {device}: not a device of this machine; give {known}") from error
    return chosen


def choose_dtype(dtype: Dtype | None, *, device: torch.device) -> Dtype:
    """The given precision; None: that of the device. Raises ValueError for an unknown one."""
    if dtype is not None and dtype not in get_args(Dtype):
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(map(repr, get_args(Dtype)))}")
    return default_dtype(device) if dtype is None else dtype


def model_folder(model: str | Path) -> Path:
    """The model folder at a path or hub address; OWNER/NAME is one if there is no such path. Raises ValueError if there is none."""
    name = str(model)
    is_on_hub = not Path(name).expanduser().exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    try:
        path = local_model(HUB + name if is_on_hub else name)
    except ValueError as error:
        raise ValueError(f"{name}: no such folder, and {error}" if is_on_hub else str(error)) from error
    if path.is_dir() and not is_model_folder(path) and is_model_folder(path / "model"):
        return path / "model"
    if (path / "config.yaml").is_file():
        raise ValueError(f"{path}: this run has no model/ yet: export a checkpoint with `tim export {path} --out FOLDER`")
    return path
