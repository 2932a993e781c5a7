"""Load trained weights from a model folder, a run, a checkpoint, an official export, or a published file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pipeline.errors import one_line
from tim.model_folder.folder import is_model_folder, read_spec
from tim.model_folder.folder import load_weights as folder_weights
from tim.pretrained.official import NETWORK_FILE, OURS, WEIGHTS, network_description, read_weights
from tim.pretrained.safetensors_files import INDEX, check_files

ROPE_OF_PUBLISHED = "legacy"
KINDS = f"a model folder, a run, an official export ({NETWORK_FILE} and weights), or a {', '.join(WEIGHTS)} file"


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Weights under the published names, float32 or as stored, on the CPU.

    source: folder or file they were read from; params, rope: `network.params` and rotary layout of their network, both None for a bare
    file, which has no metadata.
    """

    source: Path
    state: dict[str, Tensor]
    params: dict[str, Any] | None
    rope: str | None


def load_weights(path: str | Path, *, ema: bool = True) -> InitialWeights:
    """Load the weights of a trained network.

    For a run, load its newest intact checkpoint (with `ema`, the average), or its `model/` if it has no checkpoint. A folder
    RUN/checkpoints/step-000500 gives that step.

    Raises ValueError naming the path if it is none of these, or damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix in WEIGHTS:
        return InitialWeights(path, read_weights(path), None, None)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder or weight file; give {KINDS}")
    if is_model_folder(path):
        return _load_model_folder(path)
    if (path / "config.yaml").is_file():
        return _load_run(path, step=None, ema=ema)
    if path.parent.name == "checkpoints" and (path.parents[1] / "config.yaml").is_file():
        return _load_run(path.parents[1], step=_step(path), ema=ema)
    found = weights_file(path)
    if not (path / NETWORK_FILE).is_file():
        return InitialWeights(found, read_weights(found), None, None)
    content = read_network_file(path)
    params, _ = network_description(content)
    check_files(path, (content.get(OURS) or {}).get("files", {}), source=NETWORK_FILE)
    return InitialWeights(found, read_weights(found), params, (content.get(OURS) or {}).get("rope", ROPE_OF_PUBLISHED))


def weights_file(folder: Path) -> Path:
    """The single weight file in a folder, or the index of its shards. Raises ValueError if there is none, or more than one."""
    index = folder / f"model{INDEX}"
    if index.is_file():
        return index
    found = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS and file.is_file())
    preferred = [file for file in found if file.name == "model.safetensors"] or found
    if not preferred:
        raise ValueError(f"{folder}: not a model folder or a run folder, and has no weight file; give {KINDS}")
    if len(preferred) > 1:
        raise ValueError(f"{folder}: holds {', '.join(file.name for file in preferred[:3])}: give the path of one file")
    return preferred[0]


def read_network_file(folder: Path) -> Mapping[str, Any]:
    """Parse `network.yaml` of an official export. Raises ValueError if it does not describe a network."""
    path = folder / NETWORK_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        network_description(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return content


def _load_model_folder(folder: Path) -> InitialWeights:
    spec = read_spec(folder)
    return InitialWeights(folder, folder_weights(folder), spec.network, spec.rope)


def _load_run(run: Path, *, step: int | None, ema: bool) -> InitialWeights:
    from launch.checkpoints import checkpoint
    from launch.checkpoints.export import is_model, run_config

    network = run_config(run).network
    if step is None and checkpoint.newest(run) is None and is_model(run / "model"):
        return _load_model_folder(run / "model")
    folder = checkpoint.find(run, step=step).folder
    return InitialWeights(folder, checkpoint.consolidate(folder, ema=ema), network.params.model_dump(exclude_none=True), network.rope)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    if not number.isdecimal():
        raise ValueError(f"{folder}: not a checkpoint; give RUN/checkpoints/step-000500")
    return int(number)
