"""A real Slurm on this machine: munge, controller and node daemon in a folder, without Slurm's own configuration."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.processes import is_running

DAEMONS = ("munged", "slurmctld", "slurmd")
_SECONDS = 60
_SECONDS_TO_END = 10
# A requeued job waits as long as credentials are valid. Slurm 22.05 cannot tell cgroup v1 by itself.
_CONFIG = """\
ClusterName=tim
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobCompType=jobcomp/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Path]:
    """Yields the path of slurm.conf, for the environment variable SLURM_CONF.

    Raises:
        RuntimeError: Slurm is not installed, or does not start here.
    """
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    daemons = {name: shutil.which(name, path=search) for name in DAEMONS}
    if missing := [name for name, path in daemons.items() if path is None]:
        raise RuntimeError(f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid():
        raise RuntimeError("slurmd needs the rights of root")
    ports = [_free_port(), _free_port()]
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports, cores=os.cpu_count()))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    files = {"key-file": "key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
    try:
        munged = [str(daemons["munged"]), "--force", *(f"--{option}={folder / name}" for option, name in files.items())]
        for command in (munged, [str(daemons["slurmctld"])], [str(daemons["slurmd"])]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode:
                raise RuntimeError(f"{command[0]} does not start: {done.stderr.strip()}")
        _wait_until_idle(environment)
        yield config
    finally:
        for name in reversed(DAEMONS):
            with suppress(OSError, ValueError):
                _end(int((folder / f"{name}.pid").read_text()))


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_END
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)  # slurmd waits for a controller that is gone


def _wait_until_idle(environment: dict[str, str]) -> None:
    deadline, state = time.monotonic() + _SECONDS, ""
    while time.monotonic() < deadline:
        done = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True, check=False)
        state = done.stdout.strip() or done.stderr.strip()
        if state == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"the node is {state}, not idle, after {_SECONDS} s")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
