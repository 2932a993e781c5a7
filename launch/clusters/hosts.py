"""Start a training on every host of a hostfile by ssh, and keep the hosts together: output, signals, failures."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.console import STOPPED
from launch.distributed.signals import HANDLED
from launch.distributed.supervisor import GRACE_AFTER_STOP, say

PORT = 29500  # of the rendezvous on the first host
# Passwords would be asked for on the terminal, by all hosts at once. A host that is gone is noticed after a minute.
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
GRACE = 40.0  # seconds after a failure in which the other hosts can report theirs: longer than a supervisor's
GRACE_AFTER_SAVE = GRACE_AFTER_STOP + 10.0  # the same after a host has saved and stopped
KILL_SECONDS = 10.0
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_EXACT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")
_PREFIXES = (
    *("CUDA_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "DS_", "TRITON_"),
    *("HF_", "AWS_", "WANDB_", "MLFLOW_", "COMET_", "TIM_"),
)
_SSH_FAILED = 255  # exit code of ssh itself


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a hostfile. slots: number of training processes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read DeepSpeed's format: a line `NAME slots=N` for each host; `#` starts a comment.

    Raises:
        ValueError: naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"--hostfile {path}: no such file; write a line `NAME slots=N` for each host")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--hostfile {path}: not a text file; write a line `NAME slots=N` for each host") from None
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or not int(match[2]) or match[1].startswith("-"):
            raise ValueError(f"{path}:{number}: {line!r} is not a host; write NAME slots=N, with N of at least 1")
        if match[1] in hosts:
            raise ValueError(f"{path}:{number}: host {match[1]} is listed twice; give it one line with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise ValueError(f"{path}: lists no host; write a line `NAME slots=N` for each host")
    return list(hosts.values())


def host_commands(hosts: Sequence[Host], *, endpoint: str | None, arguments: Sequence[str]) -> dict[str, list[str]]:
    """The `tim launch` command of each host, by its name. arguments: config, overrides and options that are the same on all.

    Raises ValueError if the hosts cannot meet at the first.
    """
    if endpoint is None and len(hosts) > 1:
        endpoint = _endpoint_at(hosts[0])
    commands = {}
    for rank, host in enumerate(hosts):
        layout = ["--nproc-per-node", str(host.slots)]
        if len(hosts) > 1:
            layout += ["--nnodes", str(len(hosts)), "--node-rank", str(rank), "--rdzv-endpoint", str(endpoint)]
        commands[host.name] = [sys.executable, "-m", "launch.cli", "launch", *arguments, *layout]
    return commands


def _endpoint_at(host: Host) -> str:
    """Where other hosts find a host. Raises ValueError for a name by which every machine means itself."""
    name = host.name.rpartition("@")[2]
    if name in ("localhost", "::1") or name.startswith("127."):
        raise ValueError(
            f"--hostfile: the hosts meet at the first, but {name} is another machine on each of them: write its name or address"
        )
    return f"[{name}]:{PORT}" if ":" in name else f"{name}:{PORT}"


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process that all hosts get: Python's, CUDA's, NCCL's and those of storage and trackers."""
    return {name: value for name, value in environment.items() if name in _EXACT or name.startswith(_PREFIXES)}


def setup_lines(setup: Sequence[str]) -> list[str]:
    """Lines of a shell script under `set -e` that run `cluster.setup`, and say so if one of them fails."""
    failure = 'echo "cluster.setup: a line failed with exit code $?" >&2'
    return [f"trap '{failure}' EXIT", *setup, "trap - EXIT"] if setup else []


def ssh_command(host: str, *, setup: Sequence[str] = ()) -> list[str]:
    """The command that starts `launch.clusters.host_agent` on a host. setup: shell lines to run there first, in this folder.

    Standard input is the job, which the set-up lines must not read.
    """
    agent = [sys.executable, "-m", "launch.clusters.host_agent"]
    if path := os.environ.get("PYTHONPATH"):
        agent = ["env", f"PYTHONPATH={path}", *agent]
    lines = ["set -e", f"cd {shlex.quote(os.getcwd())}"]
    if setup:
        lines += ["exec 3<&0 </dev/null", *setup_lines(setup), "exec 0<&3 3<&-"]
    return [*SSH, host, "\n".join([*lines, f"exec {shlex.join(agent)}"])]


def run_on_hosts(commands: Mapping[str, Sequence[str]], *, environment: Mapping[str, str], setup: Sequence[str] = ()) -> int:
    """Run a command on each host. Returns the exit code of the first that failed, else 75 if one has saved and stopped, else 0.

    Lines of output carry the host's name. Signals reach all hosts. If a host fails, the others have GRACE seconds to end by themselves,
    and GRACE_AFTER_SAVE seconds if it has stopped.

    Raises:
        ValueError: ssh is not installed.
    """
    if shutil.which("ssh") is None:
        raise ValueError("--hostfile: ssh is not installed; install an ssh client, or run `tim launch` on each host yourself")
    width = max(map(len, commands))
    connections = [_Connection(host, command, environment, setup=setup, width=width) for host, command in commands.items()]
    with _forwarded_signals(connections):
        failed = _wait(connections)
    codes = [connection.exit_code for connection in connections]  # waits for the last lines
    return failed.exit_code if failed else max(codes, key=lambda code: (code not in (0, STOPPED), code))


def _wait(connections: Sequence[_Connection]) -> _Connection | None:
    """Wait until all hosts have ended, and end those that take too long after another one. Returns the first that has failed."""
    failed, deadline, is_ending = None, math.inf, False
    while living := [connection for connection in connections if connection.poll() is None]:
        now, ends = time.monotonic(), [connection for connection in connections if connection.poll()]
        if failed is None and (failed := next((each for each in ends if each.poll() != STOPPED), None)):
            deadline = now + GRACE
        elif ends and deadline == math.inf:
            deadline = now + GRACE_AFTER_SAVE
        if now > deadline and not is_ending:
            is_ending = True
            for connection in living:
                say(f"ending {connection.host}")
                connection.end()
        time.sleep(0.05)
    return failed


class _Connection:
    """A running ssh command, and the thread that prints its output."""

    def __init__(self, host: str, command: Sequence[str], environment: Mapping[str, str], *, setup: Sequence[str], width: int) -> None:
        self.host = host
        self._process = subprocess.Popen(  # in a session of its own: Ctrl-C on the terminal must not end the connection
            ssh_command(host, setup=setup),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._write(json.dumps({"command": list(command), "folder": os.getcwd(), "environment": dict(environment)}))
        self._thread = threading.Thread(target=self._print, args=(f"{host + ':':{width + 1}}",), daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        return self._process.poll()

    @property
    def exit_code(self) -> int:
        """Exit code of the host, once all of its output is printed. Reports a connection that failed."""
        code = self._process.wait()
        self._thread.join(timeout=KILL_SECONDS)
        if code == _SSH_FAILED or code < 0:
            return 1
        return code

    def send(self, number: int) -> None:
        self._write(signal.Signals(number).name)

    def end(self) -> None:
        """Kill the command on the host; the connection too if that does not answer."""
        self.send(signal.SIGKILL)
        timer = threading.Timer(KILL_SECONDS, self._process.kill)
        timer.daemon = True
        timer.start()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _print(self, prefix: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            say(f"{prefix} {line.decode(errors='replace').rstrip()}")
        if self._process.wait() == _SSH_FAILED:
            say(f"{prefix} ssh could not connect, or lost the connection: try `ssh {self.host} true`, which must not ask for a password")


@contextmanager
def _forwarded_signals(connections: Sequence[_Connection]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for connection in connections:
            connection.send(number)

    previous = {number: signal.signal(number, forward) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
