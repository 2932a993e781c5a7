"""Where a model is that a user names: the one function for all commands. Imports nothing that reads checkpoints, which takes long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tim.model_folder.folder import is_model_folder
from tim.model_folder.location import local_model
from tim.model_kinds import MODEL_FORMS
from tim.pretrained.official import NETWORK_FILE, WEIGHTS
from tim.pretrained.safetensors_files import INDEX

_CONFIG, _CHECKPOINTS = "config.yaml", "checkpoints"  # in a run folder


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A model on this machine. kind: `export` is a folder with network.yaml, `weights` a file of weights, or a folder that may have one."""

    kind: Literal["folder", "run", "checkpoint", "export", "weights"]
    path: Path

    @property
    def run(self) -> Path | None:
        """The run of a run folder or a checkpoint."""
        if self.kind == "checkpoint":
            return self.path.absolute().parents[1]
        return self.path if self.kind == "run" else None

    @property
    def step(self) -> int | None:
        """The step of a checkpoint. Raises ValueError for a folder with another name."""
        if self.kind != "checkpoint":
            return None
        number = self.path.name.removeprefix("step-")
        if not number.isdecimal():
            raise ValueError(f"{self.path}: not a checkpoint; give RUN/checkpoints/step-000500")
        return int(number)


def locate_model(name: str | Path) -> ModelPlace:
    """Where a model is that a user names by a path or an address of the hub, whose files are downloaded if they are not in the cache.

    Raises ValueError if there is none, or if it cannot be downloaded.
    """
    path = local_model(name)
    if is_model_folder(path):
        return ModelPlace("folder", path)
    if (path / _CONFIG).is_file():
        return ModelPlace("run", path)
    above = path.absolute().parent
    if path.is_dir() and above.name == _CHECKPOINTS and (above.parent / _CONFIG).is_file():
        return ModelPlace("checkpoint", path)
    if (path / NETWORK_FILE).is_file():
        return ModelPlace("export", path)
    if path.is_dir() or (path.is_file() and path.name.endswith((*WEIGHTS, INDEX))):
        return ModelPlace("weights", path)
    raise ValueError(f"{name}: no such folder or weight file; give {MODEL_FORMS}")
