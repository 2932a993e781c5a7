"""How machines meet: arguments of torchrun, interfaces, and signals while waiting."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.distributed.rendezvous import parse_endpoint, rendezvous_arguments, socket_environment
from tests import REPOSITORY

# Its handlers do nothing, as if native code were waiting.
WAIT = """
import signal, sys, time
from launch.distributed.rendezvous import exit_on_signals
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
with exit_on_signals(lambda: sys.argv[1] == "waits"):
    print("ready", flush=True)
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        time.sleep(0.1)
"""


def test_endpoints() -> None:
    assert parse_endpoint("node-0.cluster:29500") == ("node-0.cluster", 29500)
    assert parse_endpoint("[fe80::1]:29500") == ("fe80::1", 29500)
    for wrong in ("node", "node:", ":29500", "node:x", "node:0", "node:99999", "fe80::1:29500"):
        with pytest.raises(ValueError, match="give HOST:PORT"):
            parse_endpoint(wrong)


def test_without_node_ranks_the_machine_with_the_address_is_the_host() -> None:
    own = rendezvous_arguments("127.0.0.1:29500", nnodes=2, node_rank=None)
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29500", "--local-addr=127.0.0.1"} <= set(own)
    assert any(argument.startswith("--rdzv-conf=is_host=1,") for argument in own)
    other = rendezvous_arguments("192.0.2.1:29500", nnodes=2, node_rank=None)  # an address for documentation
    assert any(argument.startswith("--rdzv-conf=is_host=0,") for argument in other)
    with pytest.raises(ValueError, match=r"this machine cannot resolve no-such-host\.invalid"):
        rendezvous_arguments("no-such-host.invalid:29500", nnodes=2, node_rank=None)


def test_gloo_takes_the_interface_that_leads_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert socket_environment("127.0.0.1:29500", nnodes=2) == {}, "all machines are this one"
    assert socket_environment(None, nnodes=1) == {}
    names = {name for _, name in socket.if_nameindex()}
    assert set(socket_environment("192.0.2.1:29500", nnodes=2).values()) <= names
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert socket_environment("192.0.2.1:29500", nnodes=2) == {}


@pytest.mark.parametrize(
    ("state", "number", "code"),
    [("waits", signal.SIGTERM, 75), ("waits", signal.SIGINT, 130), ("runs", signal.SIGTERM, 0)],
)
def test_a_signal_ends_the_wait_for_other_machines(state: str, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", WAIT, state, "60" if state == "waits" else "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    waiting = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    waiting.stdout.readline()
    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == code
    assert said == (f"{number.name}: stopped while waiting for the other machines\n" if code else "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slurm", "--hostfile", "hosts"], "--hostfile and --slurm exclude each other"),
        (["--slurm"], "--nproc-per-node N: missing"),
        (["--slurm", "--nproc-per-node", "8", "--rdzv-endpoint", "a:1"], "--slurm chooses it itself"),
        (["--hostfile", "hosts", "--node-rank", "1"], "--hostfile numbers the machines itself"),
        (["--hostfile", "hosts", "--nnodes", "3"], "--nnodes 3: hosts lists 1"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("a slots=8\n")
    with pytest.raises(SystemExit, match="2"):
        main(["launch", "photos", "run_dir=run", *arguments])
    assert message in capsys.readouterr().err


def test_the_rank_that_deepspeeds_launcher_adds_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "recipes", "list"]) == 0
    assert "photos" in capsys.readouterr().out


def test_waiting_for_other_machines_is_shown() -> None:
    """`tim doctor` meets them as `tim launch` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "launch.cli", "doctor", "--nodes", "--nnodes", "2", "--rdzv-endpoint", endpoint]
    waiting = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    lines = []
    while not lines or "other machine" not in lines[-1]:
        lines.append(waiting.stderr.readline())
        assert lines[-1], lines
    assert lines[0].startswith("starting: importing torch, ")
    assert re.fullmatch(rf"starting: waiting for 1 other machine at {endpoint}, \d+ s\n", lines[-1])
    waiting.send_signal(signal.SIGTERM)
    _, said = waiting.communicate(timeout=60)
    assert (waiting.returncode, said.splitlines()[-1]) == (75, "SIGTERM: stopped while waiting for the other machines")
