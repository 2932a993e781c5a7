"""Copies of a run's checkpoints in another folder or behind a URL.

The mirror has the layout of a run folder: config.yaml, metrics.jsonl, history.json, checkpoints/step-000500/. A copy is complete if it has
the manifest of its checkpoint: the manifest is copied last, after all other files have been read back and compared with it. Nothing is ever
deleted from a mirror.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from launch.checkpoints.checkpoint import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    check,
    create_partial_folder,
    put_in_place,
    step_of,
)
from launch.checkpoints.history import HISTORY
from launch.checkpoints.run_folder import CONFIG, METRICS
from launch.config.schema import ConfigError
from pipeline.digests import file_digest, stream_digest
from pipeline.storage import remote
from pipeline.storage.atomic import publish

_RUN_FILES = (CONFIG, HISTORY, METRICS)  # beside the checkpoints


class Mirror:
    """The mirror of a run. Methods raise OSError if it cannot be reached or written."""

    def __init__(self, url: str, *, run_dir: Path) -> None:
        self._url = url.rstrip("/")
        self._run_dir = run_dir

    def check_owner(self) -> None:
        """Raise ConfigError if the mirror is in use by a run with another `run_dir`."""
        if not self._steps():
            return
        try:
            owner = yaml.safe_load(_read(self._path(CONFIG)))["run_dir"]
        except (FileNotFoundError, KeyError, TypeError, yaml.YAMLError):
            raise ConfigError(f"checkpoint.mirror: {self._url} has checkpoints, but no valid {CONFIG}: give another mirror") from None
        if os.path.abspath(owner) != os.path.abspath(self._run_dir):
            raise ConfigError(
                f"checkpoint.mirror: {self._url} has the checkpoints of run_dir {owner}: give that run_dir, or another mirror"
            )

    def holds(self, folder: Path) -> bool:
        """Whether the mirror has a complete copy of a checkpoint."""
        try:
            return _read(self._path(CHECKPOINTS, folder.name, MANIFEST)) == (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return False

    def store(self, folder: Path) -> None:
        """Copy a checkpoint, and read the copy back to compare it with the manifest. Files that are already there are not copied again.

        Raises ConfigError like `check_owner`.
        """
        self.check_owner()
        self._store_run_files()
        target = self._path(CHECKPOINTS, folder.name)
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        present = _sizes(target)
        for name, facts in files.items():
            copy = f"{target}/{name}"
            if present.get(name) == facts["bytes"] and _digest(copy) == facts["sha256"]:
                continue
            _write(copy, source=folder / name)
            if _digest(copy) != facts["sha256"]:
                raise OSError(f"{copy} differs from the manifest of {folder} after it was copied")
        _write(f"{target}/{MANIFEST}", source=folder / MANIFEST)
        self._store_run_files()

    def restore(self) -> Checkpoint | None:
        """Copy the newest complete checkpoint, and the run's files, to the run folder. None if the mirror has none.

        Raises CheckpointError if there are complete copies, but all of them are damaged.
        """
        skipped: list[str] = []
        for name in self._steps():
            target = self._path(CHECKPOINTS, name)
            try:
                files = json.loads(_read(f"{target}/{MANIFEST}"))["files"]
            except FileNotFoundError:
                continue  # copying was interrupted
            partial = create_partial_folder(self._run_dir, step=step_of(Path(name)))
            for file in (*files, MANIFEST):
                with publish(partial / file) as stream:
                    _copy_to(stream, f"{target}/{file}")
            try:
                metadata = check(partial)
            except CheckpointError as error:
                skipped.append(f"{target}: {error}")
                continue
            self._restore_run_files(name)
            return Checkpoint(put_in_place(self._run_dir, partial, step=metadata.step), metadata, tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self._url} is intact; give another checkpoint.mirror to start over: {'; '.join(skipped)}"
            )
        return None

    def _path(self, *names: str) -> str:
        return "/".join((self._url, *names))

    def _steps(self) -> list[str]:
        """Names of the folders of checkpoints, newest first."""
        names = [name for name in _sizes(self._path(CHECKPOINTS)) if name.startswith("step-") and name.removeprefix("step-").isdecimal()]
        return sorted(names, key=lambda name: -step_of(Path(name)))

    def _store_run_files(self) -> None:
        for name in _RUN_FILES:
            if (self._run_dir / name).is_file():
                _write(self._path(name), source=self._run_dir / name)

    def _restore_run_files(self, newest: str) -> None:
        for name in _RUN_FILES:
            if not (self._run_dir / name).is_file():
                try:
                    content = _read(self._path(name))
                except FileNotFoundError:
                    continue
                with publish(self._run_dir / name, is_private=name == CONFIG) as stream:  # written again at the start
                    stream.write(content)
        with publish(self._run_dir / LATEST) as stream:
            stream.write(f"{newest}\n".encode())


def _read(path: str) -> bytes:
    return remote.read_file(path) if remote.is_remote(path) else Path(path).read_bytes()


def _write(path: str, *, source: Path) -> None:
    """Copy a file; locally it appears when it is complete and on the disk."""
    if remote.is_remote(path):
        remote.write_file(path, source=source)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    is_private = not source.stat().st_mode & 0o077
    with open(source, "rb") as original, publish(Path(path), is_private=is_private) as stream:
        shutil.copyfileobj(original, stream, 1 << 20)


def _copy_to(stream: Any, path: str) -> None:
    with remote.open_file(path) if remote.is_remote(path) else open(path, "rb") as original:
        shutil.copyfileobj(original, stream, 1 << 20)


def _digest(path: str) -> str:
    if not remote.is_remote(path):
        return file_digest(Path(path))
    with remote.open_file(path) as stream:
        return stream_digest(stream)


def _sizes(path: str) -> dict[str, int]:
    """Size of each entry of a folder by name; {} if there is none."""
    if remote.is_remote(path):
        return remote.file_sizes(path)
    folder = Path(path)
    return {entry.name: entry.stat().st_size for entry in folder.iterdir()} if folder.is_dir() else {}
