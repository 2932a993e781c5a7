"""Requeue a Slurm job whose time is up, so that the run goes on by itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

REQUEUE_FILE = "TIM_REQUEUE_FILE"  # environment variable: created to ask the job script for it, from a container without scontrol
_SECONDS = 60


def requeue(number: int, *, log: Callable[[str], None]) -> None:
    """Requeue this Slurm job if the signal `number`, which stopped the run, is SIGTERM. Slurm sends it before the time limit.

    The job script asks for it in time to save: `#SBATCH --signal=TERM@120 --requeue`. Does nothing outside a Slurm job. `log` prints a
    line about the outcome. A job that is ending already is not requeued: `scancel` sends SIGTERM too.
    """
    job = _job()
    if job is None or number != signal.SIGTERM:
        return
    if (state := _state(job)) not in (None, "RUNNING"):
        log(f"Slurm job {job} is {state}, by scancel or after its time: not requeued")
        return
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        problem = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is None:
        log(f"requeued Slurm job {job}")
        return
    try:
        if _ask_job_script():
            log(f"Slurm job {job}: the job script will requeue it")
            return
    except OSError as error:
        problem += f"; {error.strerror}: {error.filename}"
    log(f"warning: {' '.join(command)} failed ({problem}): submit the job again")


def _ask_job_script() -> bool:
    """Create the file by which the job script requeues the job. Returns False if the script waits for none. Raises OSError."""
    file = os.environ.get(REQUEUE_FILE)
    if file is None:
        return False
    Path(file).touch()
    return True


def _state(job: str) -> str | None:
    """Slurm's word for the state of a job; None if it cannot be told, as in a container."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _job() -> str | None:
    """Id of this job. The first task of an array has the array's id as its own: requeuing that would requeue every task."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
