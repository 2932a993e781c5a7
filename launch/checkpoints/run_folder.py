"""Run folders: exclusive lock, stored configuration, and allowed changes on resume."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from launch.checkpoints.checkpoint import CHECKPOINTS
from launch.checkpoints.history import History, write
from launch.config.schema import Config, ConfigError, to_yaml
from pipeline.storage.atomic import publish_text, remove_temporary_files

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = "lock"
FINETUNE_CONFIG, FINETUNE_CORPUS, FINETUNE_FEATURES = "finetune.yaml", "corpus", "features"  # of a run that `tim finetune` starts
# written before config.yaml, and left by a start that was killed
BEFORE_CONFIG = {LOCK, "logs", "ranks", "stacks", "slurm", FINETUNE_CONFIG, FINETUNE_CORPUS, FINETUNE_FEATURES}
DRAWS = (
    "text.caption_dropout",
    "text.caption_weights",
    "text.shuffle_tags",
    "network.params.class_dropout_prob",
)  # affect only the plan, not the weights
SECRET = ("cluster.env",)  # values that may be keys: not shown
FIXED = (
    "codec.kind",
    "codec.path",
    "codec.channels",
    "text",
    "network",
    "condition",
    "objective.transport",
    "objective.sigma_d",
)  # determine the meaning of the weights


@contextmanager
def exclusive_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock. The operating system releases it when the process ends, even by SIGKILL.

    Raises:
        ConfigError: the run is in use, or the folder is not a run folder.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir {run_dir} is a file; give a folder")
    existing = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    if existing and CONFIG not in existing and not BEFORE_CONFIG.issuperset(existing):
        raise ConfigError(f"run_dir {run_dir} is not a run folder (it holds {', '.join(existing[:3])}); give another folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text("utf-8", errors="replace").strip() if path.exists() else ""
        raise ConfigError(f"run_dir {run_dir} is in use by {holder or 'another process'}; wait for it, or give another folder") from None
    except OSError as error:
        raise OSError(error.errno, f"the file system cannot lock {path}: {error.strerror}") from None
    try:
        remove_temporary_files([run_dir])
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def changes_on_resume(run_dir: Path, config: Config) -> list[str]:
    """Differences from the configuration that the run was last trained with, one line per key.

    Raises:
        ConfigError: a changed key is not compatible with the run's weights.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return []
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _flat(yaml.safe_load(to_yaml(config)))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    for key in changed:
        if _is_within(key, FIXED) and not _is_within(key, DRAWS):
            change = f"was {before.get(key)!r} in {path} and is {now.get(key)!r}"
            raise ConfigError(f"{key} {change}: the run's weights do not fit; restore the value, or give another run_dir")
    return [f"{key}: changed" if _is_within(key, SECRET) else f"{key}: {before.get(key)!r} → {now.get(key)!r}" for key in changed]


def publish_config(path: Path, config: Config, *, comments: str = "") -> None:
    """Write a configuration as YAML after comments, for its owner only if it sets environment variables."""
    publish_text(path, comments + to_yaml(config), is_private=bool(config.cluster.env))


def write_config(run_dir: Path, config: Config, *, history: History = History()) -> None:  # noqa: B008  (frozen)
    """Write RUN/config.yaml, with the run's history as leading comments, and RUN/history.json. Creates RUN/checkpoints.

    From then on a missing RUN/checkpoints is an error (`launch.checkpoints.saving.disk.check_mounted`).
    """
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    write(run_dir, history)
    comments = "".join(f"# {line}\n" for line in history.lines())
    publish_config(run_dir / CONFIG, config, comments=comments)


def _is_within(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} → {"train.lr": 1}"""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
