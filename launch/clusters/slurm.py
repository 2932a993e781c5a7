"""Slurm: the job script of a training, and its submission.

One task on each node runs `tim launch`. Two minutes before the time limit Slurm sends SIGTERM; the training saves, requeues the job and
exits (`launch.clusters.requeue`), and the job resumes when Slurm starts it again. Job arrays work: log, port and requeue are those of the
array's task.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.clusters.hosts import GRACE_AFTER_SAVE, setup_lines
from launch.clusters.requeue import REQUEUE_FILE
from launch.config.run_sections import ClusterConfig
from pipeline.storage.atomic import publish_text

SCRIPT = "launch.sh"
_FIRST_PORT, _PORTS = 20000, 10000  # below the ports that the kernel gives away


@dataclass(frozen=True, slots=True)
class Job:
    """A training on `nnodes` nodes with `nproc` processes each. arguments: those of `tim launch` that are the same on all nodes."""

    run_dir: Path
    nnodes: int
    nproc: int
    workers: int
    arguments: Sequence[str]

    @property
    def folder(self) -> Path:
        """Absolute path of the run's folder for Slurm: script and logs."""
        return self.run_dir.absolute() / "slurm"


def job_script(job: Job, cluster: ClusterConfig) -> str:
    """The script for sbatch."""
    lines = ["#!/bin/bash", "# Written by `tim launch --slurm`. Submitted again, it resumes the run."]
    lines += [f"#SBATCH {option}" for option in _options(job, cluster)]
    lines += ["", "set -e", f"cd {shlex.quote(str(Path.cwd()))}", *setup_lines(cluster.setup)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    lines += [
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port=$(({_FIRST_PORT} + SLURM_JOB_ID % {_PORTS}))  # another one for each job, and for each task of an array",
    ]
    end = [] if cluster.container is None else _requeue_from_outside(job)
    lines += [*end[:2], "code=0", " \\\n  ".join(_step(job, cluster)) + " || code=$?", *end[2:], "exit $code"]
    return "\n".join(lines) + "\n"


def submit(job: Job, script: str, *, is_private: bool = False) -> tuple[str, Path]:
    """Write the script into the run folder and submit it. Returns the job's id and the path of the script.

    is_private: whether only its owner may read the script.

    Raises:
        ValueError: sbatch is not installed, or refuses the job.
    """
    path = job.folder / SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, script, is_private=is_private)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError("--slurm: there is no sbatch on this machine; run it on a login node, or print the script by --dry-run") from None
    if done.returncode:
        raise ValueError(f"--slurm: sbatch refused {path}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0], path


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Options of sbatch. Those of the config come last and replace ours."""
    folder = str(job.folder).replace("%", "%%")  # Slurm replaces %j in names of files
    is_array = any(option.startswith(("--array", "-a")) for option in cluster.options)
    given = {"partition": cluster.partition, "account": cluster.account, "time": cluster.time}
    options = {
        "job-name": job.run_dir.absolute().name,
        "nodes": job.nnodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus or job.nproc * (job.workers + 2),
        "gres": None if cluster.gres is None else cluster.gres.replace("{n}", str(job.nproc)),
        **given,
        "output": f"{folder}/{'%A_%a' if is_array else '%j'}.log",
        "open-mode": "append",
        "signal": "TERM@120",
    }
    listed = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return [*listed, "--requeue", *cluster.options]


def _step(job: Job, cluster: ClusterConfig) -> list[str]:
    """The srun command, one line for each part. Once a node has ended, the others have some minutes to do the same."""
    srun = ["srun", "--ntasks-per-node=1", '--cpus-per-task="$SLURM_CPUS_PER_TASK"', f"--wait={GRACE_AFTER_SAVE:.0f}"]
    inside: list[str] = []
    command = [sys.executable, "-m", "launch.cli"]
    if cluster.container is not None:
        command = ["tim"]
        if cluster.container.endswith(".sif"):
            binds = [word for mount in cluster.mounts for word in ("--bind", mount)]
            inside = ["apptainer", "exec", "--nv", *binds, cluster.container]
        else:
            mounts = [f"--container-mounts={','.join(cluster.mounts)}"] * bool(cluster.mounts)
            options = [f"--container-image={cluster.container}", *mounts, f"--container-workdir={Path.cwd()}"]
            srun.append(shlex.join(options))
    words = [*inside, "sh", "-c", 'exec "$@" --node-rank "$SLURM_NODEID"', "tim", *command, "launch"]
    layout = f'--nproc-per-node {job.nproc} --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-endpoint "$first:$port"'
    return [" ".join(srun), shlex.join(words), shlex.join(job.arguments), layout]


def _requeue_from_outside(job: Job) -> list[str]:
    """Lines before and after the step: a container seldom has scontrol."""
    file = shlex.quote(str(job.folder))
    task = '"${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"'
    return [
        f"export {REQUEUE_FILE}={file}/requeue-$SLURM_JOB_ID",
        f'rm -f "${REQUEUE_FILE}"',
        f"job={task}",
        f'[ ! -e "${REQUEUE_FILE}" ] || scontrol requeue "${{job:-$SLURM_JOB_ID}}"',
    ]
