"""What differs between the trackers, behind accelerate's common interface.

accelerate's own class decides by its process state which rank logs. That state would create a process group, so it is bypassed: only rank 0
of a run has trackers.
"""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from launch.config.run_sections import TrackerKind
from launch.config.schema import ConfigError

PACKAGES: Mapping[TrackerKind, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}
_INSTALLED_AS = {"comet_ml": "comet-ml"}
PREVIEW = "preview"  # name of the images


class Backend(Protocol):
    """A tracker of one run. A new process continues the run of the earlier ones under the same `id`.

    takes_back: whether it forgets what it has of steps after the one where a run goes on.
    """

    takes_back: bool

    def start(self, values: Mapping[str, Any]) -> str | None:
        """Open the run, with the values of its configuration. Returns a line that says where it is."""
        ...

    @property
    def id(self) -> str | None: ...

    def write(self, values: Mapping[str, float], *, step: int) -> None: ...

    def show(self, image: Image.Image, *, step: int) -> None: ...

    def finish(self) -> None: ...


def check_installed(kinds: tuple[TrackerKind, ...]) -> None:
    """Raise ConfigError naming the package of a tracker that is not installed."""
    for kind in kinds:
        package = PACKAGES[kind]
        if find_spec(package) is None:
            name = _INSTALLED_AS.get(package, package)
            raise ConfigError(f"log.trackers: {kind} needs the package {name}: pip install {name}, or leave {kind} out")


def make_backend(kind: TrackerKind, *, run_dir: Path, project: str, name: str, id: str | None, step: int, logged: int) -> Backend:
    """The tracker of a run that goes on after `step`; id, logged: what earlier processes have stored, and the last step that they sent."""
    if kind == "tensorboard":
        return TensorBoard(run_dir, step=step)
    if kind == "wandb":
        return WandB(run_dir, project=project, name=name, id=id, logged=logged)
    return {"mlflow": MLflow, "comet": Comet}[kind](run_dir, project=project, name=name, id=id)


class TensorBoard:
    """Files in RUN/tensorboard. A resumed run declares the events after its checkpoint void and writes them again."""

    takes_back = True
    id = None

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self._tracker = _local("TensorBoardTracker")("tensorboard", logging_dir=str(run_dir), purge_step=step + 1)

    def start(self, values: Mapping[str, Any]) -> None:
        """Does not store the configuration: TensorBoard would show it as another run."""
        self._tracker.start()

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, image: Image.Image, *, step: int) -> None:
        self._tracker.log_images({PREVIEW: np.asarray(image)[None]}, step=step, dataformats="NHWC")
        self._tracker.tracker.flush()

    def finish(self) -> None:
        self._tracker.finish()


class WandB:
    """Weights & Biases. Offline without an API key: then each process has a folder in RUN/wandb, all with the same run id."""

    takes_back = False

    def __init__(self, run_dir: Path, *, project: str, name: str, id: str | None, logged: int) -> None:
        self.id = id or uuid.uuid4().hex[:12]
        self._run_dir, self._logged, self._newest = run_dir, logged, 0
        os.environ.setdefault("WANDB_SILENT", "true")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        settings = {"console": "off", "silent": os.environ["WANDB_SILENT"].lower() in ("true", "1")}
        self._tracker = _local("WandBTracker")(
            project, name=name, id=self.id, resume="allow", dir=str(run_dir), mode=mode, settings=settings
        )
        self._mode = mode

    def start(self, values: Mapping[str, Any]) -> str:
        self._tracker.start()
        self._tracker.store_init_configuration(dict(values))
        if self._mode == "offline":
            return f"W&B: run {self.id}, offline; to upload it: wandb sync {self._run_dir}/wandb/offline-run-*"
        return f"W&B: run {self.id}: {self._tracker.tracker.url or self._mode}"

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Steps only grow: the values of an evaluation, which come late, are stored with the newest step. They have a step of their own."""
        self._newest = max(self._newest, step)
        self._tracker.log(dict(values), step=self._newest)

    def show(self, image: Image.Image, *, step: int) -> None:
        """Steps only grow: a preview of a step before the last row is stored after it. Its caption has its own step."""
        import wandb

        self._tracker.log({PREVIEW: [wandb.Image(image, caption=f"step {step}")]}, step=max(step, self._logged + 1))

    def finish(self) -> None:
        self._tracker.finish()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI or MLflow's own default."""

    takes_back = False

    def __init__(self, run_dir: Path, *, project: str, name: str, id: str | None) -> None:
        self.id = id
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        self._tracker = _local("MLflowTracker")(experiment_name=project, run_id=id, run_name=name)

    def start(self, values: Mapping[str, Any]) -> str:
        import mlflow  # pyright: ignore[reportMissingImports]

        is_new = self.id is None
        self._tracker.start()
        self.id = self._tracker.tracker.info.run_id
        if is_new:  # the values of a run cannot change
            self._tracker.store_init_configuration(dict(values))
        return f"MLflow: run {self.id} at {mlflow.get_tracking_uri()}"

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, image: Image.Image, *, step: int) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        mlflow.log_image(image, key=PREVIEW, step=step, synchronous=True)

    def finish(self) -> None:
        self._tracker.finish()


class Comet:
    """Comet. Offline without an API key: then each process leaves an archive in RUN/comet, all with the same key."""

    takes_back = False

    def __init__(self, run_dir: Path, *, project: str, name: str, id: str | None) -> None:
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        import comet_ml  # pyright: ignore[reportMissingImports]

        self.id = id or uuid.uuid4().hex
        self._folder = run_dir / "comet"
        self._online = bool(comet_ml.get_config()["comet.api_key"])
        settings = {"name": name} if self._online else {"name": name, "offline_directory": str(self._folder)}
        config = comet_ml.ExperimentConfig(**settings)
        self._tracker = _local("CometMLTracker")(
            project, experiment_key=self.id, mode="get_or_create", online=self._online, experiment_config=config
        )

    def start(self, values: Mapping[str, Any]) -> str:
        self._folder.mkdir(exist_ok=True)
        self._tracker.start()
        self._tracker.store_init_configuration(dict(values))
        return f"Comet: experiment {self.id}" + ("" if self._online else f", offline; to upload it: comet upload {self._folder}/*.zip")

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, image: Image.Image, *, step: int) -> None:
        self._tracker.tracker.log_image(image, name=PREVIEW, step=step)

    def finish(self) -> None:
        self._tracker.finish()


def _local(name: str) -> type[Any]:
    """A tracker class of accelerate that neither needs nor creates accelerate's process state."""
    from accelerate import tracking

    tracking.logger = logging.getLogger("accelerate.tracking")  # pyright: ignore[reportAttributeAccessIssue]  (its own needs the state)
    return type(name, (getattr(tracking, name),), {"main_process_only": False})


def _has_wandb_key() -> bool:
    """Whether W&B finds an API key without asking: it would ask on the terminal otherwise."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
