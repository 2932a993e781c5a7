"""Run by `jobs.run_ranks`: forks ranks after it has imported what a training imports, which is most of what a short one costs.

Reads jobs as lines of JSON. Answers each with the pids of its ranks, and at their end with their exit codes. Tests of launching itself
use `tim launch`.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path

from launch.engine.deepspeed_internals import import_deepspeed
from tim.text.byte_pairs import simple_tokenizer

IMPORTED = (
    "launch.training.train",
    "launch.commands.model",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "accelerate.tracking",
    "pandas",
    "peft",
)


def main() -> None:
    for name in IMPORTED:
        import_module(name)
    import_deepspeed()
    simple_tokenizer()
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = [_fork(rank, port=port, **job) for rank in range(job["ranks"])]
        print(json.dumps(ranks), flush=True)
        print(json.dumps(_exit_codes(ranks)), flush=True)


def _exit_codes(ranks: list[int]) -> list[int]:
    """Wait for all ranks; where one fails, the other would wait for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        ended, status = os.wait()
        codes[ended] = os.waitstatus_to_exitcode(status)
        if codes[ended]:
            for rank in set(ranks) - set(codes):
                os.kill(rank, signal.SIGKILL)
    return [codes[rank] for rank in ranks]


def _fork(rank: int, *, ranks: int, port: int, module: str, arguments: list[str], log: str) -> int:
    """The process of a rank, which runs `python -m MODULE ARGUMENTS…` with its output in a file."""
    if process := os.fork():
        return process
    with Path(log).open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    place = {"RANK": rank, "LOCAL_RANK": rank, **sizes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    sys.argv = [module, *arguments]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
