"""The published networks' files: safe reading of weights, nested or not, and network descriptions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tim.pretrained.safetensors_files import INDEX, ShardsError, read_shards

# Keys under which training checkpoints keep their weights, averaged ones first.
NESTS = ("ema", "ema_model", "state_dict_ema", "model_ema", "state_dict", "model", "module")
PREFIXES = ("module.", "model.", "ema_model.")  # before every name: from DDP, Lightning and averaging
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
COUNTERS = ("n_averaged", "initted", "step")  # tensors of averaging that are not weights
PICKLES = (".bin", ".pt", ".pth")
WEIGHTS = (".safetensors", *PICKLES)
TRANSPORTS = {"ot_fm": "OT_FM", "trigflow": "TrigFlow", "vp": "VP_SDE", "ve": "VE_SDE"}  # their EDM step is wrong
SETTINGS = {"mean": "P_mean", "std": "P_std", "sigma_d": "sigma_d"}
NETWORK_FILE = "network.yaml"  # network description in the published form, next to the weights
Weight = TypeVar("Weight")
OURS = "tim"  # key of NETWORK_FILE for settings outside the published form: rope, codec, text encoder, sampling defaults


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a `.safetensors`, `.bin`, `.pt` or `.pth` file, or in the shards of an index file, on the CPU.

    Pickles are read as tensors only: no code in them runs.

    Raises ValueError naming the file if it is missing, damaged, of another type, or has no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in WEIGHTS and not path.name.endswith(INDEX):
        raise ValueError(f"{path}: weights are read from {', '.join(WEIGHTS)} files")
    try:
        content = _loaded(path)
    except ShardsError:
        raise
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(f"{path}: cannot read weights ({unreadable(error)})") from error
    try:
        return unnested(content)
    except ValueError as error:
        raise ValueError(f"{path}: cannot read weights ({error})") from error


def _loaded(path: Path) -> Any:
    if path.name.endswith(INDEX):
        return read_shards(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about file types that it then rejects
        return torch.load(path, map_location="cpu", weights_only=True)


def unnested(content: Any) -> dict[str, Tensor]:
    """The weights in a checkpoint's content, at the top level or under one of `NESTS` (in this order), without wrapper prefixes.

    Raises ValueError if there are none.
    """
    if isinstance(content, Mapping):
        if content and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
            return unprefixed(content)
        nest = next((name for name in NESTS if isinstance(content.get(name), Mapping) and content[name]), None)
        if nest is not None:
            return unnested(content[nest])
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"expected names and tensors, at the top level or under {', '.join(NESTS)}; found {found or 'nothing'}")


def unprefixed(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Weights (values of any type) with the network's own names: without prefixes of DDP, FSDP, Lightning, torch.compile and averaging."""
    averaged = {name: value for name, value in weights.items() if name.startswith("ema_model.")}
    kept = averaged or {name: value for name, value in weights.items() if name not in COUNTERS} or dict(weights)
    kept = {re.sub(rf"(^|\.)(?:(?:{'|'.join(WRAPPERS)})\.)+", r"\1", name): value for name, value in kept.items()}
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in kept)), None):
        kept = {name.removeprefix(prefix): value for name, value in kept.items()}
    return kept


def published_config(params: Mapping[str, Any], *, rope: str, transport: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a published YAML file that the published code needs to build and sample this network.

    params: with the published names; rope: the network's rotary layout; transport: {kind} and all its settings.
    Raises ValueError if the published code would compute different results on every image.
    """
    is_text = params.get("cap_feat_dim") is not None
    if is_text and rope == "centred":
        raise ValueError("rope: centred is unknown to the published code, which counts positions from the corner")
    if transport["kind"] not in TRANSPORTS:
        raise ValueError(f"transport {transport['kind']}: the published code implements it incorrectly; supported: {', '.join(TRANSPORTS)}")
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


def network_description(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(network.params, transport {kind, settings}) of a parsed published YAML file. Raises ValueError naming what is missing."""
    model = content.get("model") if isinstance(content, Mapping) else None
    network = model.get("network") if isinstance(model, Mapping) else None
    params = network.get("params") if isinstance(network, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(params, Mapping):
        raise ValueError("has no model.network.params: give one in the published layout, as `tim export` or the published code writes")
    section = model.get("transport") or {}
    target = str(section.get("target", "OT_FM")).rpartition(".")[2]
    kinds = {theirs: ours for ours, theirs in TRANSPORTS.items()}
    if target not in kinds:
        raise ValueError(f"model.transport.target {target}: expected one of {', '.join(kinds)}")
    theirs = section.get("params") or {}
    settings = {ours: theirs[name] for ours, name in SETTINGS.items() if name in theirs}
    return dict(params), {"kind": kinds[target], **settings}


def first_line(error: BaseException) -> str:
    """The first line of an error message, without terminal colours."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip()
    return (plain.splitlines() or [type(error).__name__])[0][:200]


def unreadable(error: BaseException) -> str:
    """Why a weights file cannot be loaded, and the remedy, in one line. Omits torch's advice to run unknown code."""
    chain = [error]
    while (before := chain[-1].__context__) is not None:
        chain.append(before)
    everything = " ".join(str(each) for each in chain)
    if found := re.search(r"GLOBAL ([\w.]+)|Trying to (?:call|load|set|use)\D*? ([A-Za-z_]\w*\.[\w.]+)", everything):
        return f"it contains {found[1] or found[2]}, which could run code: save its weights alone with torch.save, or as .safetensors"
    if "TorchScript" in everything:
        return "it is a TorchScript archive: save only the module's state_dict"
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.strerror):
        return first_line(error)
    return "it is truncated, damaged, or not a torch.save file: download it again, or save its weights as .safetensors"
