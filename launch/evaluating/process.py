"""The process that evaluates a checkpoint: `python -m launch.evaluating.process PARENT RUN STEP MODEL ARGUMENT…`.

Exports the checkpoint of STEP to the folder MODEL, then becomes `tim eval MODEL ARGUMENT…`. Runs at a low priority, and is killed when
its parent ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

NICENESS = 10  # at 19 it would stand still beside a training on the CPU
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, run, step, model, *options = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also after execv
    if os.getppid() != int(parent):
        os._exit(1)
    os.nice(NICENESS)
    from launch.checkpoints.export import export

    export(Path(run), out=Path(model), step=int(step))
    os.execv(sys.executable, [sys.executable, "-m", "launch.cli", "eval", model, *options])


if __name__ == "__main__":
    main(sys.argv[1:])
