"""Signals of a training process: acknowledge at once, act after the step.

SIGTERM, SIGHUP   save and exit; under Slurm, SIGTERM also requeues the job
SIGINT            save and exit; a second one exits without saving
SIGUSR1           save and go on
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

_SAME_PRESS_SECONDS = 0.5  # Ctrl-C may arrive twice: from the terminal, and forwarded by a launcher
_EXIT_SECONDS = 10.0
_INTERRUPTED = 130  # exit code


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Signals:
    """What signals ask of the training loop.

    stop: the signal that asks to stop; None before the first. step: the step in hand, for the acknowledgement; None before the first
    step. log: prints a line. is_interrupted: whether to stop without saving.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.step: int | None = None
        self.log: Callable[[str], None] = _print_line
        self.is_interrupted = False
        self._stopped_at = 0.0
        self._saves_asked = self._saves_taken = 0

    def receive(self, number: int) -> str | None:
        """Note a signal. Returns the line that acknowledges it; None if it changes nothing."""
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            self._saves_asked += 1
            return f"{name}: {'saving after the first step' if self.step is None else f'finishing step {self.step}, then saving'}"
        if self.stop is None:
            self.stop, self._stopped_at = number, time.monotonic()
            again = "; press Ctrl-C again to stop without saving" if number == signal.SIGINT else ""
            return f"{name}: {'stopping before the first step' if self.step is None else f'finishing step {self.step}, then saving'}{again}"
        if number != signal.SIGINT or self.is_interrupted or time.monotonic() - self._stopped_at < _SAME_PRESS_SECONDS:
            return None
        self.is_interrupted = True
        return f"{name}: stopping without saving"

    def asks_to_stop(self) -> bool:
        return self.stop is not None

    def take_save_request(self) -> bool:
        """Whether a signal has asked to save since the last call."""
        asked, before = self._saves_asked, self._saves_taken
        self._saves_taken = asked
        return asked > before


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Record signals instead of exiting, so that the loop can save first. A second SIGINT raises KeyboardInterrupt.

    A thread receives and acknowledges them, because Python's handlers wait for the current operation of the main thread. One process of
    each machine prints the acknowledgement. Child processes that inherit the handlers ignore the signals.
    """
    signals, pid = Signals(), os.getpid()
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == pid and signals.is_interrupted:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in HANDLED}
    wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    thread = threading.Thread(target=_receive, args=(readable, signals), daemon=True)
    thread.start()
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(wakeup)
        if signals.stop == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            previous[signal.SIGTERM] = signal.SIG_IGN  # Slurm sends it again when it requeues the job, which has saved
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writable)  # ends the thread
        thread.join()
        os.close(readable)


def _receive(readable: int, signals: Signals) -> None:
    """Receive the signals whose numbers can be read, until the other end closes."""
    prints = os.environ.get("LOCAL_RANK", "0") == "0"
    emergency = threading.Timer(_EXIT_SECONDS, os._exit, args=[_INTERRUPTED])
    emergency.daemon = True
    while numbers := os.read(readable, 64):
        for number in numbers:
            was_interrupted = signals.is_interrupted
            text = signals.receive(number) if number in HANDLED else None
            if text and prints:
                signals.log(text)
            if signals.is_interrupted and not was_interrupted:
                _thread.interrupt_main()
                emergency.start()  # the main thread may never come back
    emergency.cancel()
