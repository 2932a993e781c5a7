"""The published networks' files: reading their weights, safely and however they are nested, and describing a network as they do."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

NESTS = ("ema", "state_dict", "model")  # where a training checkpoint keeps its weights, the averaged ones first
PICKLES = (".bin", ".pt", ".pth")
TRANSPORTS = {"ot_fm": "OT_FM", "trigflow": "TrigFlow", "vp": "VP_SDE", "ve": "VE_SDE"}  # their EDM step is wrong
SETTINGS = {"mean": "P_mean", "std": "P_std", "sigma_d": "sigma_d"}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a `.safetensors`, `.bin`, `.pt` or `.pth` file, on the CPU. Pickles are read as tensors only: no code in them runs.

    Raises ValueError naming the file where it is missing, damaged, of another kind, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)} files")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        return unnested(content)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: no weights can be read from it ({first_line(error)})") from error


def unnested(content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors in what a checkpoint holds: itself, or under `ema`, `state_dict` or `model`, in this order.

    Raises ValueError where there is none.
    """
    if isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        nest = next((name for name in NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is not None:
            return unnested(content[nest])
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"expected names and tensors, by themselves or under {', '.join(NESTS)}; found {found or 'nothing'}")


def published_config(params: Mapping[str, Any], *, rope: str, transport: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a published YAML file that its code needs to build and sample this network.

    params: under the published names; rope: the network's rotary layout; transport: {kind} and its settings, all of them.
    Raises ValueError where the published code would compute something else on every image.
    """
    is_text = params.get("cap_feat_dim") is not None
    if is_text and rope == "centred":
        raise ValueError("rope: centred is unknown to the published code, which counts positions from the corner")
    if transport["kind"] not in TRANSPORTS:
        raise ValueError(f"transport {transport['kind']}: the published code has it wrong; it has {', '.join(TRANSPORTS)}")
    given = {name: value for name, value in params.items() if value is not None and not (name == "lora_hidden_size" and not value)}
    if not given.get("z_dim"):
        given = {name: value for name, value in given.items() if name not in ("z_dim", "projector_dim", "encoder_depth")}
    settings = {name: transport[ours] for ours, name in SETTINGS.items() if ours in transport}
    return {
        "model": {
            "transport": {"target": f"tim.schedulers.transports.{TRANSPORTS[transport['kind']]}", "params": settings},
            "network": {"target": f"tim.models.{'t2i' if is_text else 'c2i'}.tim_model.TiM", "params": given},
        }
    }


def first_line(error: BaseException) -> str:
    """What torch says of a file, without the advice and the traces that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
