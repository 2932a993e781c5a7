"""The end of a training that a signal stops."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from launch.distributed.signals import Signals
from launch.training import train


def test_rank_0_requeues_last_whichever_rank_got_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    ranks = SimpleNamespace(is_main=True, gather=lambda own: [own, int(signal.SIGTERM)])
    trainer: Any = SimpleNamespace(step=3, ranks=ranks, log=said.append)
    monkeypatch.setattr(train, "requeue", lambda number, log: said.append(number))
    with ExitStack() as after_cleanup, ExitStack() as cleanup:
        cleanup.callback(said.append, "cleaned up")
        with pytest.raises(SystemExit, match="75"):
            train._stop(trainer, Signals(), after_cleanup=after_cleanup)
    assert said == ["stopped by a signal after step 3: run the same command again to continue", "cleaned up", signal.SIGTERM]
