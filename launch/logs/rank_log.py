"""A log file per rank: its lines, warnings and tracebacks.

RUN/logs/rank-00003.log    appended by every start, each of which begins with a header
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

FOLDER = "logs"
_OWN_HANDLERS = ("DeepSpeed", "transformers", "diffusers", "datasets")  # libraries whose loggers do not pass records on


@dataclass(slots=True)
class RankLog:
    """The log file of this process. Without an open file, lines are dropped. A full disk ends the log, not the training."""

    _file: TextIO | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def line(self, text: str) -> None:
        """Append lines with the time. May be called from any thread."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write("".join(f"{now} {part}\n" for part in text.splitlines()))
            except (OSError, ValueError) as error:
                file, self._file = self._file, None
                with suppress(OSError):
                    file.close()
                print(f"warning: {file.name} ends here: {getattr(error, 'strerror', None) or error}", file=sys.stderr, flush=True)

    @contextmanager
    def opened(self, run_dir: Path, *, rank: int, ranks: int) -> Iterator[None]:
        """Write to the rank's file in RUN/logs until the end of the context, and there how it ended."""
        path = log_path(run_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        restart = f", restart {attempt}" if attempt else ""
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)  # names of files need not be Unicode
        self.line(f"---- start: rank {rank} of {ranks}, process {os.getpid()} on {socket.gethostname()}{restart}")
        try:
            with self._recorded():
                yield
        except SystemExit as end:
            self.line(f"end: exit code {end.code}")
            raise
        except BaseException:
            self.line(traceback.format_exc())
            raise
        else:
            self.line("end: complete")
        finally:
            with self._lock:
                file, self._file = self._file, None
                if file is not None:
                    file.close()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Also record Python's warnings, warnings and errors of all loggers, and errors of threads. They are shown as before."""
        show, thread_hook = warnings.showwarning, threading.excepthook

        def show_and_record(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            show(message, category, filename, lineno, file, line)
            self.line(warnings.formatwarning(message, category, filename, lineno, line))

        def record_thread(error: threading.ExceptHookArgs) -> None:
            thread_hook(error)
            if error.exc_value is not None and error.exc_type is not SystemExit:
                self.line("".join(traceback.format_exception(error.exc_value)))

        handler = _Records(self)
        loggers = [logging.getLogger(), *map(logging.getLogger, _OWN_HANDLERS)]
        loggers = [logger for logger in loggers if logger.parent is None or not logger.propagate]
        for logger in loggers:
            logger.addHandler(handler)
        warnings.showwarning, threading.excepthook = show_and_record, record_thread
        try:
            yield
        finally:
            warnings.showwarning, threading.excepthook = show, thread_hook
            for logger in loggers:
                logger.removeHandler(handler)


RANK_LOG = RankLog()


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank-{rank:05d}.log"


class _Records(logging.Handler):
    """Log records of level WARNING and above, to the rank's file."""

    def __init__(self, target: RankLog) -> None:
        super().__init__(level=logging.WARNING)
        self._target = target
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._target.line(self.format(record))
