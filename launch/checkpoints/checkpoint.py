"""Atomic checkpoints: complete, or absent.

    all ranks write into step-000500.tmp/ → fsync → rank 0 writes manifest.json (sizes, digests, world size, config hash)
    → rename to step-000500/ → RUN/latest

Training saves in the background (`launch.checkpoints.saving.background`).

A folder is only resumed from if its manifest is valid. Files:

    manifest.json                 sizes and digests of all files
    trainer.json                  step, counters, the planner's position
    weights-00000.safetensors     float32 weights of rank 0, see `launch.checkpoints.tensor_fragments`; ema-….safetensors: their average
    ema-0.9999-00000.safetensors  another average, see `launch.checkpoints.averages`
    exp_avg-00000.safetensors     optimizer moments of the same fragments, one file per kind
    replica.safetensors           only after guidance has started, see `launch.training.guidance_network`

A run can resume with any number of ranks. No file is written by DeepSpeed, and none is a pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoints.averages import kind_of
from launch.checkpoints.tensor_fragments import ShardedTensors
from pipeline.digests import file_digest
from pipeline.storage.atomic import fsync_path, publish_text

FORMAT = 2
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.json"
CHECKPOINTS, LATEST = "checkpoints", "latest"  # in a run folder
PARTIAL = ".tmp"


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or a damaged one. The message is one line."""


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """Metadata of a checkpoint: number of steps done, and number of ranks that wrote it.

    Format 1 stored the optimizer's moments in DeepSpeed files: its weights can be exported, but a run cannot resume from it.
    """

    step: int
    world_size: int
    config_hash: str
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint. skipped: problems of newer, damaged checkpoints, newest first."""

    folder: Path
    metadata: CheckpointMetadata
    skipped: tuple[str, ...] = ()

    def pieces(self, kind: str) -> ShardedTensors:
        """Tensors of a kind from all ranks: "weights", "ema" or one of the optimizer's moments. Raises ValueError."""
        return ShardedTensors([self.folder / fragment_file(kind, rank) for rank in range(self.metadata.world_size)])


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint; None if the run has none yet.

    Raises CheckpointError if there are checkpoints but none is intact: the user must decide whether to start again.
    """
    skipped: list[str] = []
    for folder in reversed(step_folders(run_dir)):
        metadata = _metadata_or_problem(folder)
        if isinstance(metadata, CheckpointMetadata):
            return Checkpoint(folder, metadata, tuple(skipped))
        skipped.append(metadata)
    if skipped:
        raise CheckpointError(f"no checkpoint of {run_dir} is intact; remove {run_dir} to start again: {'; '.join(skipped)}")
    return None


def find(run_dir: Path, *, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest one. Raises CheckpointError listing the available ones."""
    if step is None:
        found = newest(run_dir)
        if found is None:
            raise CheckpointError(f"{run_dir}: no checkpoint here; a run folder has them in checkpoints/step-000500")
        return found
    folder = step_folder(run_dir, step)
    if not folder.is_dir():
        known = ", ".join(str(step_of(other)) for other in step_folders(run_dir)) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; available: {known}")
    return Checkpoint(folder, check(folder))


def check(folder: Path) -> CheckpointMetadata:
    """Verify every file against the manifest. Raises CheckpointError for the first difference."""
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{manifest}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
        version = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{manifest}: unknown format {version!r}; this version reads 1 and {FORMAT}")
    try:
        metadata = CheckpointMetadata(**{name: content[name] for name in CheckpointMetadata.__dataclass_fields__})
        files: dict[str, dict[str, Any]] = content["files"]
    except KeyError as error:
        raise CheckpointError(f"{manifest}: {error} is missing") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, but {expected['bytes']} in the manifest")
    for name, expected in files.items():
        if file_digest(folder / name) != expected["sha256"]:
            raise CheckpointError(f"{folder / name} does not match its digest in the manifest")
    return metadata


def consolidate(folder: Path, *, ema: bool | float) -> dict[str, Tensor]:
    """Merge the ranks' fragments into the full float32 weights of a checkpoint (with `ema`: their first average, or that of a decay).

    Verifies digests first. Does not need DeepSpeed. Raises ValueError.
    """
    pieces = Checkpoint(folder, check(folder)).pieces(kind_of(folder, ema))
    return {name: pieces.tensor(name) for name in pieces.shapes}


def fragment_file(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def read_trainer_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))


def _metadata_or_problem(folder: Path) -> CheckpointMetadata | str:
    try:
        return check(folder)
    except CheckpointError as problem:
        return str(problem)


def create_partial_folder(run_dir: Path, *, step: int) -> Path:
    """Create the empty folder that a checkpoint is written to. Removes the remains of interrupted saves."""
    partial = step_folder(run_dir, step).with_suffix(PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    for interrupted in partial.parent.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(interrupted, ignore_errors=True)
    partial.mkdir()
    return partial


def publish(run_dir: Path, partial: Path, metadata: CheckpointMetadata, files_by_rank: list[dict[str, Any]]) -> Path:
    """Turn a written folder into a checkpoint. files_by_rank: `bytes` and `sha256` of the files of each rank, by name. Raises OSError."""
    files = {name: entry for part in files_by_rank for name, entry in sorted(part.items())}
    written = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()}
    assert written == set(files), f"files that no rank reported: {written ^ set(files)}"
    publish_text(partial / MANIFEST, json.dumps({**asdict(metadata), "files": files}, indent=1))
    for folder in {(partial / name).parent for name in files}:
        fsync_path(folder)
    return put_in_place(run_dir, partial, step=metadata.step)


def put_in_place(run_dir: Path, partial: Path, *, step: int) -> Path:
    """Rename a complete folder to that of its step."""
    final = step_folder(run_dir, step)
    if final.exists():  # a damaged one that was skipped on resume
        remove(final)
    partial.rename(final)
    fsync_path(final.parent)
    return final


def write_latest(run_dir: Path, folder: Path) -> None:
    """Name the newest checkpoint in RUN/latest."""
    publish_text(run_dir / LATEST, folder.name + "\n")


def remove(folder: Path) -> None:
    """Remove a checkpoint without leaving a partial folder under its name. No effect if it does not exist."""
    renamed = folder.with_name(f"{folder.name}.gone{PARTIAL}")
    with suppress(FileNotFoundError):
        folder.rename(renamed)
        shutil.rmtree(renamed)


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def step_folders(run_dir: Path) -> list[Path]:
    """Folders named like a checkpoint, oldest step first."""
    named = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(named, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def file_facts(path: Path) -> dict[str, Any]:
    """Flush a file to the disk. Returns its `bytes` and `sha256`, as the manifest has them."""
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
