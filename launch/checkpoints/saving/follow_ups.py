"""What follows a published checkpoint, in the background on rank 0: copy to the mirror, removal of old checkpoints, `on_checkpoint`."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue, SimpleQueue

from launch.checkpoints.checkpoint import remove, step_folders
from launch.checkpoints.saving.disk import superfluous
from launch.checkpoints.saving.mirror import Mirror
from launch.config.run_sections import CheckpointConfig
from pipeline.errors import kind_and_line


class FollowUps:
    """Two background threads: one for the mirror and old checkpoints, one for commands. They end with the process."""

    def __init__(
        self,
        run_dir: Path,
        section: CheckpointConfig,
        *,
        published: Callable[[Path], None] = lambda _: None,
        in_use: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        """published: told of every checkpoint; in_use: whether something else reads one, which may then not be removed."""
        self._published, self._in_use = published, in_use
        self._run_dir = run_dir
        self._section = section
        self._mirror = None if section.mirror is None else Mirror(section.mirror, run_dir=run_dir)
        self._mirrored: set[Path] = set()
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._command: Path | None = None  # checkpoint that a command runs on
        self._copies = _Worker("checkpoints", self._copy_and_clean, failed=self._failed)
        self._commands = _Worker("on_checkpoint", self._run_command, failed=self._failed)

    def add_missing(self) -> None:
        """Copy checkpoints that the mirror does not have yet, because an earlier process was interrupted, and remove superfluous ones."""
        for folder in step_folders(self._run_dir)[-1:]:
            self._copies.add(folder)

    def add(self, folder: Path) -> None:
        self._published(folder)
        self._copies.add(folder)
        if self._section.on_checkpoint is not None:
            self._commands.add(folder)

    def may_remove(self, folder: Path) -> bool:
        """Whether a checkpoint is in the mirror, if there is one, and nothing reads it."""
        return (self._mirror is None or folder in self._mirrored) and folder != self._command and not self._in_use(folder)

    def messages(self) -> list[str]:
        """Lines to log since the last call."""
        return [self._messages.get_nowait() for _ in range(self._messages.qsize())]

    def wait(self, seconds: float) -> bool:
        """Wait until everything is done. Returns False if it is not after `seconds`."""
        deadline = time.monotonic() + seconds
        return all(worker.wait(deadline - time.monotonic()) for worker in (self._copies, self._commands))

    def _failed(self, folder: Path, error: Exception) -> None:
        self._messages.put(f"warning: {folder.name}: {kind_and_line(error)}; the next checkpoint tries again")

    def _copy_and_clean(self, _: Path) -> None:
        """Copy all checkpoints that the mirror does not have yet, newest first; then remove those that are not kept."""
        if self._mirror is not None:
            for each in reversed(step_folders(self._run_dir)):
                self._copy(self._mirror, each)
        for old in superfluous(self._run_dir, keep_last=self._section.keep_last, keep_every=self._section.keep_every):
            if self.may_remove(old):
                remove(old)

    def _copy(self, mirror: Mirror, folder: Path) -> None:
        """Copy a checkpoint, or check that its copy is complete. A failure is a warning."""
        if folder in self._mirrored:
            return
        try:
            if not mirror.holds(folder):
                mirror.store(folder)
                self._messages.put(f"copied {folder.name} to {self._section.mirror}")
            self._mirrored.add(folder)
        except Exception as error:  # every file system raises its own types
            self._messages.put(f"warning: {folder.name} was not copied: {kind_and_line(error)}; the next checkpoint tries again")

    def _run_command(self, folder: Path) -> None:
        self._command = folder
        words = [word.replace("{path}", str(folder)) for word in shlex.split(self._section.on_checkpoint or "")]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self._messages.put(f"warning: checkpoint.on_checkpoint cannot be run: {error.strerror}: {error.filename}")
            return
        finally:
            self._command = None
        if done.returncode:
            last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
            self._messages.put(f"warning: checkpoint.on_checkpoint failed with {done.returncode} for {folder.name}: {last.strip()}")


class _Worker:
    """A daemon thread that handles folders in order."""

    def __init__(self, name: str, action: Callable[[Path], None], *, failed: Callable[[Path, Exception], None]) -> None:
        self._queue: Queue[Path] = Queue()
        self._action = action
        self._failed = failed
        self._name = name
        self._thread: threading.Thread | None = None

    def add(self, folder: Path) -> None:
        self._queue.put(folder)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait until the queue is empty and the last folder is handled."""
        with self._queue.all_tasks_done:
            return self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, max(0.0, seconds))

    def _work(self) -> None:
        while True:
            folder = self._queue.get()
            try:
                self._action(folder)
            except Exception as error:  # a follow-up never ends a run
                self._failed(folder, error)
            finally:
                self._queue.task_done()
