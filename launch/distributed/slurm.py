"""Requeue a Slurm job whose time is up, so that the run goes on by itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

_SECONDS = 60


def requeue(number: int, *, log: Callable[[str], None]) -> None:
    """Requeue this Slurm job if the signal `number`, which stopped the run, is SIGTERM. Slurm sends it before the time limit.

    The job script asks for it in time to save: `#SBATCH --signal=TERM@120 --requeue`. Does nothing outside a Slurm job. `log` prints a
    line about the outcome.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number != signal.SIGTERM:
        return
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    log(f"warning: {' '.join(command)} failed ({problem}): submit the job again" if problem else f"requeued Slurm job {job}")
