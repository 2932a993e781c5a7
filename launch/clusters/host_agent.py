"""Run a command on a host for `tim launch --hostfile`, which started this by ssh: `python -m launch.clusters.host_agent`.

Standard input is the connection: the first line is the job in JSON (`command`, `folder`, `environment`), so that no secret is in the list
of processes; each further line is the name of a signal. The end of the input means that the launcher or the connection is gone: the command
gets SIGHUP, which lets a training save. Its output passes through here because ranks that write to a broken pipe would fail before.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Returns the exit code of the command, 1 if a signal killed it."""
    job = json.loads(sys.stdin.buffer.readline())
    command = subprocess.Popen(
        job["command"],
        cwd=job["folder"],
        env={**os.environ, **job["environment"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    threading.Thread(target=_forward_signals, args=(sys.stdin.buffer, command), daemon=True).start()
    assert command.stdout is not None
    for line in command.stdout:
        with suppress(OSError):  # nobody listens any more
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    code = command.wait()
    return code if code >= 0 else 1


def _forward_signals(connection: BinaryIO, command: subprocess.Popen[bytes]) -> None:
    while line := connection.readline():
        command.send_signal(signal.Signals[line.decode().strip()])
    command.send_signal(signal.SIGHUP)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a thread holds the lock of standard input
