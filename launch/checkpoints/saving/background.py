"""Save checkpoints in the background, while training goes on.

    every rank: copy of its part in host memory → thread: write, fsync, digest → step-000500.tmp/rank-00001.json
    rank 0's thread: wait for the file lists of all ranks → manifest.json → rename to step-000500/ → RUN/latest

The threads communicate through the folder only: collectives of the training and of a save never run at the same time. A save that is
published, or failed on a rank, is concluded by all ranks after the next step (`votes` are part of the step's all-reduce). A checkpoint is
therefore complete even if the next step never ends.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import CheckpointMetadata, fragment_file
from launch.checkpoints.saving.disk import describe, make_room
from launch.checkpoints.saving.follow_ups import FollowUps
from launch.checkpoints.tensor_fragments import Fragment, Shapes
from launch.checkpoints.tensor_fragments import save as save_fragments
from launch.config.run_sections import CheckpointConfig
from launch.distributed.ranks import Ranks
from pipeline.storage.atomic import publish_text
from tim.pretrained.safetensors_files import LazyTensors, write_file

LISTING_SECONDS = 0.05  # between looks of rank 0 for the other ranks' file lists
FINISHING_SECONDS = 20.0  # between collectives while rank 0 waits for the mirror, far below their timeout
CLOSING_SECONDS = 60.0  # that a failed run waits for its last save
_FAILURES = (OSError, SafetensorError)


class Part(NamedTuple):
    """What one rank writes. fragments: by kind and parameter; tensors, texts: whole files by name, of rank 0."""

    shapes: Shapes
    fragments: Mapping[str, Mapping[str, Fragment]]
    tensors: Mapping[str, Mapping[str, Tensor]] = {}
    texts: Mapping[str, str] = {}

    @property
    def nbytes(self) -> int:
        fragments = sum(fragment.values.nbytes for kind in self.fragments.values() for fragment in kind.values())
        tensors = sum(tensor.nbytes for file in self.tensors.values() for tensor in file.values())
        return fragments + tensors + sum(map(len, self.texts.values()))

    def write(self, folder: Path, *, rank: int) -> dict[str, Any]:
        """Write the files to a folder. Returns `bytes` and `sha256` by name. Raises OSError."""
        files = {}
        for kind, fragments in self.fragments.items():
            name = fragment_file(kind, rank)
            files[name] = save_fragments(folder / name, fragments, shapes=self.shapes)
        for name, tensors in self.tensors.items():
            files[name] = write_file(folder / name, LazyTensors.of(tensors), metadata={})
        for name, text in self.texts.items():
            publish_text(folder / name, text)
            files[name] = checkpoint.file_facts(folder / name)
        return files


@dataclass(slots=True)
class _Save:
    """A save in progress on this rank. `written` is set when its own part is, or has failed."""

    metadata: CheckpointMetadata
    partial: Path
    token: str
    written: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    folder: Path | None = None  # on rank 0, once published
    warning: str | None = None  # of a save that is published
    problem: str | None = None
    error: Exception | None = None


class BackgroundSaver:
    """Saves checkpoints of a run. Methods but `votes` and `receive` must be called by all ranks."""

    def __init__(
        self, run_dir: Path, section: CheckpointConfig, *, ranks: Ranks, follow_ups: FollowUps | None = None, log: Callable[[str], None]
    ) -> None:
        """follow_ups: on rank 0; log: prints a line on rank 0."""
        self._run_dir = run_dir
        self._section = section
        self._ranks = ranks
        self._follow_ups = follow_ups
        self._log = log
        self._copies = HostCopies()
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._clock = time.monotonic()
        self._counts: Sequence[float] = (0, 0)
        self._problem: str | None = None  # of the last save

    # At every step

    def votes(self) -> tuple[bool, bool]:
        """This rank's part of the step's all-reduce: the save in progress is published or has failed; `every_minutes` have passed."""
        save, minutes = self._save, self._section.every_minutes
        is_over = save is not None and (save.folder is not None or save.problem is not None or save.error is not None)
        is_due = self._ranks.is_main and minutes is not None and time.monotonic() - self._clock >= 60 * minutes
        return is_over, is_due

    def receive(self, counts: Sequence[float]) -> None:
        """The sums of all ranks' `votes`."""
        self._counts = counts

    def is_due(self, step: int) -> bool:
        return step % self._section.every == 0 or self._counts[1] > 0

    def after_step(self) -> None:
        """Conclude a save that is over, and log what has happened since the last step."""
        if self._counts[0] > 0:
            self.wait()
        self._log_messages()

    # Saving

    def start(self, metadata: CheckpointMetadata, part: Part) -> None:
        """Copy this rank's part and write it in the background. Waits for the save before. A full disk is a warning."""
        self.wait()
        self._clock, self._counts = time.monotonic(), (0, 0)
        needed = sum(self._ranks.gather(part.nbytes))
        partial, token, problem = self._ranks.run_on_rank0(lambda: self._prepare(metadata.step, needed))
        if partial is None:
            self._problem = problem
            self._warn(metadata.step)
            return
        self._save = save = _Save(metadata, partial, token)
        copied = self._copies.of(part)
        self._thread = threading.Thread(target=self._write, args=(save, copied), name=f"save-{metadata.step}", daemon=True)
        self._thread.start()

    def wait(self, *, must_succeed: bool = False) -> None:
        """Wait until the save in progress is published, and log it. If it failed: remove what it wrote and log a warning.

        Raises RuntimeError with `must_succeed`, if the last save failed.
        """
        save, thread = self._save, self._thread
        if save is not None and thread is not None:
            save.written.wait()
            states = self._ranks.gather((save.problem, save.error is not None))
            if any(unexpected for _, unexpected in states):
                self._ranks.run_on_all_ranks(lambda: _raise(save.error))
            problem = next((problem for problem, _ in states if problem), None)
            self._problem = problem = self._ranks.run_on_rank0(lambda: self._conclude(save, thread, problem))
            self._save = self._thread = None
            step = save.metadata.step
            if problem is None:
                self._log(f"saved {checkpoint.step_folder(self._run_dir, step)}")
            elif not must_succeed:
                self._warn(step)
        if must_succeed and self._problem is not None:
            remedy = "then run the same command again, which continues from the newest checkpoint"
            message = f"the last step was not saved: {self._problem}; {remedy}"
            self._ranks.run_on_rank0(lambda: _raise(RuntimeError(message)))

    def finish(self) -> None:
        """Wait for the save in progress, which must succeed, for its copy to the mirror and for commands. Raises RuntimeError."""
        self.wait(must_succeed=True)
        while not self._ranks.broadcast(self._follow_ups is None or self._follow_ups.wait(FINISHING_SECONDS)):
            self._log_messages()
        self._log_messages()

    def remove_superfluous(self) -> None:
        """Remove checkpoints that are not kept and that nothing reads any more, after the last save."""
        if self._follow_ups is not None:
            self._follow_ups.add_missing()
            self._follow_ups.wait(FINISHING_SECONDS)

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error, give the save in progress some time: the other ranks may be gone. An interrupt does not wait."""
        if self._save is not None and self._thread is not None:
            if kind is not KeyboardInterrupt:
                self._thread.join(CLOSING_SECONDS)
            self._save.abandoned.set()

    def _prepare(self, step: int, needed: int) -> tuple[Path | None, str, str | None]:
        """On rank 0: make room, and create the folder to write to. Returns (folder or None, token, what is wrong)."""
        section, follow_ups = self._section, self._follow_ups
        try:
            partial = checkpoint.create_partial_folder(self._run_dir, step=step)
            may_remove = follow_ups.may_remove if follow_ups is not None else lambda _: True
            problem, removed = make_room(
                self._run_dir, needed, keep_last=section.keep_last, keep_every=section.keep_every, may_remove=may_remove
            )
            for folder in removed:
                self._log(f"removed {folder} to make room for step {step}")
            if problem is None:
                return partial, uuid.uuid4().hex, None
            partial.rmdir()
        except OSError as error:
            problem = describe(error, path=self._run_dir / checkpoint.CHECKPOINTS)
        return None, "", problem

    def _write(self, save: _Save, part: Part) -> None:
        """The thread of a save."""
        rank = self._ranks.rank
        try:
            files = part.write(save.partial, rank=rank)
            if not self._ranks.is_main:
                publish_text(save.partial / _list_name(rank), json.dumps({"token": save.token, "files": files}))
                return
            save.written.set()
            listed = self._lists_of_others(save)
            if listed is not None:
                folder = checkpoint.publish(self._run_dir, save.partial, save.metadata, [files, *listed])
                save.warning = self._write_latest(folder)
                save.folder = folder
        except _FAILURES as error:
            save.problem = describe(error, path=save.partial)
        except Exception as error:  # raised again on the main thread
            save.error = error
        finally:
            save.written.set()

    def _write_latest(self, folder: Path) -> str | None:
        """Returns a warning if RUN/latest cannot be written: the checkpoint is complete without it."""
        try:
            checkpoint.write_latest(self._run_dir, folder)
        except OSError as error:
            return f"warning: {describe(error, path=self._run_dir / checkpoint.LATEST)}"
        return None

    def _lists_of_others(self, save: _Save) -> list[dict[str, Any]] | None:
        """On rank 0: the other ranks' file lists, taken out of the folder; None if the save is abandoned."""
        lists: dict[int, dict[str, Any]] = {}
        missing = set(range(1, self._ranks.size))
        while missing:
            present = set(os.listdir(save.partial))
            for rank in [rank for rank in missing if _list_name(rank) in present]:
                found = json.loads((save.partial / _list_name(rank)).read_text(encoding="utf-8"))
                if found["token"] == save.token:
                    lists[rank] = found["files"]
                    missing.discard(rank)
            if missing and save.abandoned.wait(LISTING_SECONDS):
                return None
        for rank in lists:
            (save.partial / _list_name(rank)).unlink()
        return [lists[rank] for rank in sorted(lists)]

    def _conclude(self, save: _Save, thread: threading.Thread, problem: str | None) -> str | None:
        """On rank 0: end a save. problem: of any rank. Returns what went wrong."""
        if problem is not None:
            save.abandoned.set()
        thread.join()
        if save.error is not None:
            raise save.error
        if save.warning is not None:
            self._log(save.warning)
        problem = problem or save.problem
        if problem is not None:
            shutil.rmtree(save.partial, ignore_errors=True)
        elif self._follow_ups is not None and save.folder is not None:
            self._follow_ups.add(save.folder)
        return problem

    def _warn(self, step: int) -> None:
        self._log(f"warning: step {step} was not saved: {self._problem}; the run goes on, the next due step tries again")

    def _log_messages(self) -> None:
        for message in self._follow_ups.messages() if self._follow_ups is not None else ():
            self._log(message)


class HostCopies:
    """Copies of fragments in host memory, pinned if they are on a GPU. The memory is used again by the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def of(self, part: Part) -> Part:
        """A copy of a part. Overwrites the one before."""
        fragments = {kind: self._copied(kind, tensors) for kind, tensors in part.fragments.items()}
        whole = {file: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()} for file, tensors in part.tensors.items()}
        if any(fragment.values.is_cuda for kind in part.fragments.values() for fragment in kind.values()):
            torch.cuda.synchronize()
        return part._replace(fragments=fragments, tensors=whole)

    def _copied(self, kind: str, fragments: Mapping[str, Fragment]) -> dict[str, Fragment]:
        sizes: dict[torch.dtype, int] = {}
        for fragment in fragments.values():
            sizes[fragment.values.dtype] = sizes.get(fragment.values.dtype, 0) + fragment.values.numel()
        pinned = any(fragment.values.is_cuda for fragment in fragments.values())
        for dtype, size in sizes.items():
            if (kind, dtype) not in self._buffers or self._buffers[kind, dtype].numel() != size:
                self._buffers[kind, dtype] = torch.empty(size, dtype=dtype, pin_memory=pinned)
        copies, ends = {}, dict.fromkeys(sizes, 0)
        for name, fragment in fragments.items():
            dtype = fragment.values.dtype
            start, ends[dtype] = ends[dtype], ends[dtype] + fragment.values.numel()
            target = self._buffers[kind, dtype][start : ends[dtype]].view(fragment.values.shape)
            copies[name] = Fragment(fragment.start, target.copy_(fragment.values, non_blocking=True))
        return copies


def _list_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
