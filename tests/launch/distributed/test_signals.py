"""Signals are acknowledged at once, whatever the main thread does, and evaluated by the loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.clusters.requeue import requeue
from launch.distributed.signals import Signals, catch_signals
from tests import REPOSITORY

LOOP = """
import sys, time
import numpy as np
from launch.distributed.signals import catch_signals

matrix = np.ones((2500, 2500))
with catch_signals() as signals:
    signals.log = lambda line: print(line, flush=True)
    signals.step = 812
    print("ready", flush=True)
    while signals.stop is None or "twice" in sys.argv:
        matrix @ matrix  # handlers do not run during this product
        print("step", flush=True)
        if signals.take_save_request():
            print("saved", flush=True)
print("left by", signals.stop, flush=True)
"""


@pytest.fixture(params=[""])
def loop(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOOP, request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def lines_until(process: subprocess.Popen[str], end: str) -> list[str]:
    """Lines other than "step", up to one that starts with `end`."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines += [line.strip()] * (line != "step\n")
        if line.startswith(end):
            return lines
    raise AssertionError(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_acknowledged_before_the_step_ends(loop: subprocess.Popen[str], number: signal.Signals) -> None:
    time.sleep(0.1)  # the product has begun, which takes longer
    loop.send_signal(number)
    assert loop.stdout is not None
    while (line := loop.stdout.readline()) == "step\n":
        pass
    assert line == f"{number.name}: finishing step 812, then saving\n"
    assert loop.stdout.read().splitlines() == ["step", f"left by {int(number)}"]


def test_a_request_to_save_does_not_stop(loop: subprocess.Popen[str]) -> None:
    for _ in range(2):
        loop.send_signal(signal.SIGUSR1)
        assert lines_until(loop, "saved") == ["SIGUSR1: finishing step 812, then saving", "saved"]
    loop.send_signal(signal.SIGINT)
    first = "SIGINT: finishing step 812, then saving; press Ctrl-C again to stop without saving"
    assert lines_until(loop, "left") == [first, "left by 2"]


@pytest.mark.parametrize("loop", ["twice"], indirect=True)
def test_a_second_ctrl_c_interrupts_and_one_that_arrives_twice_does_not(loop: subprocess.Popen[str]) -> None:
    loop.send_signal(signal.SIGINT)
    assert len(lines_until(loop, "SIGINT")) == 1
    loop.send_signal(signal.SIGINT)  # the same press, forwarded by a launcher
    loop.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert loop.poll() is None
    loop.send_signal(signal.SIGINT)
    assert lines_until(loop, "SIGINT") == ["SIGINT: stopping without saving"]
    assert loop.wait(timeout=30) == -signal.SIGINT  # by KeyboardInterrupt


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]
    with catch_signals() as signals:
        assert signals.stop is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)] == before


def test_before_the_first_step_nothing_is_promised_that_is_not_done() -> None:
    signals = Signals()
    assert signals.receive(signal.SIGUSR1) == "SIGUSR1: saving after the first step"
    assert signals.receive(signal.SIGTERM) == "SIGTERM: stopping before the first step"
    assert signals.receive(signal.SIGTERM) is None


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_requeues_after_its_own_signal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """With a stand-in for Slurm's command that records its arguments."""
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho "slurm_update error: no such job" >&2\nexit {code}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lines: list[str] = []
    requeue(signal.SIGTERM, log=lines.append)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    requeue(signal.SIGINT, log=lines.append)
    assert not (tmp_path / "calls").exists()
    requeue(signal.SIGTERM, log=lines.append)
    assert (tmp_path / "calls").read_text() == "requeue 77\n"
    failed = "warning: scontrol requeue 77 failed (slurm_update error: no such job): submit the job again"
    assert lines == [failed if code else "requeued Slurm job 77"]
    monkeypatch.setenv("PATH", "")
    requeue(signal.SIGTERM, log=lines.append)
    assert "No such file or directory: 'scontrol'" in lines[-1]
