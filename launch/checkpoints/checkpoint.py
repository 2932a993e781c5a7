"""Checkpoints that are whole or not there.

    all ranks write into step-000500.tmp/ → fsync → rank 0 writes manifest.json (sizes, digests, world size, config hash)
    → rename to step-000500/ → RUN/latest

A folder without a manifest that checks out is never resumed from. Its parts:

    manifest.json                 what is here
    trainer.json                  step, counters, the planner's position
    weights-00000.safetensors     float32 masters of rank 0, see `launch.checkpoints.tensor_fragments`; ema-….safetensors: their average
    exp_avg-00000.safetensors     the optimizer's moments of the same pieces, a file for each kind
    replica.safetensors           only where guidance has begun, see `launch.training.guidance_network`

Any number of ranks can go on from it, each with pieces of its own. DeepSpeed writes nothing here, and nothing is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoints import tensor_fragments
from launch.checkpoints.tensor_fragments import Fragment, Shapes, ShardedTensors
from launch.distributed.ranks import Ranks
from pipeline.digests import file_digest

FORMAT = 2
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or no longer one; the message is one line."""


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """What a checkpoint says of the run that wrote it: `step` steps were done, the last ones by `world_size` ranks.

    Format 1 had the optimizer's moments in files of DeepSpeed: its weights can still be exported, but no run goes on from it.
    """

    step: int
    world_size: int
    config_hash: str
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint and what was passed over, newest first, to find it."""

    folder: Path
    metadata: CheckpointMetadata
    passed_over: tuple[str, ...] = ()

    def pieces(self, kind: str) -> ShardedTensors:
        """What all ranks wrote of a kind: "weights", "ema" or one of the optimizer's moments. Raises ValueError."""
        return ShardedTensors([self.folder / fragment_file(kind, rank) for rank in range(self.metadata.world_size)])


def save(run_dir: Path, metadata: CheckpointMetadata, *, ranks: Ranks, write: Callable[[Path], Iterable[Path]], keep_last: int) -> Path:
    """Write a checkpoint; all ranks call it. `write` puts this rank's part into a folder and returns the files it wrote.

    Older checkpoints than the newest `keep_last` are removed, and what an interrupted save has left.
    """
    final = run_dir / "checkpoints" / f"step-{metadata.step:06d}"
    partial = final.with_name(final.name + ".tmp")
    ranks.run_on_rank0(lambda: _make_room(partial))
    mine = {str(path.relative_to(partial)): _fsync_and_hash(path) for path in write(partial)}
    everyone = ranks.gather(mine)
    ranks.run_on_rank0(lambda: _publish(run_dir, partial, final, metadata, everyone, keep_last))
    return final


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest checks out; None if the run has none yet.

    Raises CheckpointError if there are checkpoints and none is intact: starting again is for a person to decide.
    """
    passed_over: list[str] = []
    for folder in reversed(_step_folders(run_dir)):
        metadata = _metadata_or_problem(folder)
        if isinstance(metadata, CheckpointMetadata):
            return Checkpoint(folder, metadata, tuple(passed_over))
        passed_over.append(metadata)
    if passed_over:
        raise CheckpointError(f"no checkpoint of {run_dir} is intact; remove {run_dir} to start again: {'; '.join(passed_over)}")
    return None


def find(run_dir: Path, *, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest one. Raises CheckpointError naming what is there instead."""
    if step is None:
        found = newest(run_dir)
        if found is None:
            raise CheckpointError(f"{run_dir}: no checkpoint here; a run folder has them under checkpoints/step-000500")
        return found
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    if not folder.is_dir():
        known = ", ".join(str(_step(other)) for other in _step_folders(run_dir)) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; there are: {known}")
    return Checkpoint(folder, check(folder))


def check(folder: Path) -> CheckpointMetadata:
    """Read the manifest and compare every file with it. Raises CheckpointError naming the first difference."""
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
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
    for name, expected in files.items():
        if file_digest(folder / name) != expected["sha256"]:
            raise CheckpointError(f"{folder / name} does not have the digest of the manifest")
    return metadata


def consolidate(folder: Path, *, ema: bool) -> dict[str, Tensor]:
    """The whole float32 network of a checkpoint (its average with `ema`), put together from the ranks' fragments.

    Digests are checked first; DeepSpeed is not needed. Raises CheckpointError.
    """
    pieces = Checkpoint(folder, check(folder)).pieces("ema" if ema else "weights")
    return {name: pieces.whole(name) for name in pieces.shapes}


def fragment_file(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def write_pieces(folder: Path, pieces: Mapping[str, Mapping[str, Fragment]], *, rank: int, shapes: Shapes) -> list[Path]:
    """Write what a rank has of every kind, for `Checkpoint.pieces` to read. shapes: those of all of the network's parameters."""
    paths = [folder / fragment_file(kind, rank) for kind in pieces]
    for path, own in zip(paths, pieces.values(), strict=True):
        tensor_fragments.save(path, own, shapes=shapes)
    return paths


def read_trainer_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))


def write_trainer_state(folder: Path, state: Mapping[str, Any]) -> Path:
    path = folder / "trainer.json"
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _metadata_or_problem(folder: Path) -> CheckpointMetadata | str:
    try:
        return check(folder)
    except CheckpointError as problem:
        return str(problem)


def _make_room(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob("step-*.tmp"):
        shutil.rmtree(left)
    partial.mkdir()


def _publish(
    run_dir: Path, partial: Path, final: Path, metadata: CheckpointMetadata, everyone: list[dict[str, Any]], keep_last: int
) -> None:
    files = {name: entry for part in everyone for name, entry in sorted(part.items())}
    written = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()}
    assert written == set(files), f"files without an owner: {written ^ set(files)}"
    write_atomically(partial / MANIFEST, json.dumps({**asdict(metadata), "files": files}, indent=1))
    for folder in {(partial / name).parent for name in files}:
        _sync(folder)
    if final.exists():  # a broken one that was passed over on resume
        _remove(final)
    partial.rename(final)
    _sync(final.parent)
    write_atomically(run_dir / "latest", final.name + "\n")
    for old in _step_folders(run_dir)[:-keep_last]:
        _remove(old)


def _remove(folder: Path) -> None:
    """At no moment is there half a folder under a checkpoint's name."""
    gone = folder.with_name(folder.name + ".gone.tmp")
    folder.rename(gone)
    shutil.rmtree(gone)


def _step_folders(run_dir: Path) -> list[Path]:
    """Folders named like a checkpoint, oldest step first."""
    named = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(named, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fsync_and_hash(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
