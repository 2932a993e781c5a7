"""Other libraries to measure beside: an environment of their own, and a process in it that prints one JSON object."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def environment(folder: Path, *, packages: Sequence[str], install: bool) -> tuple[Path, dict[str, str]]:
    """The Python of an environment that has these packages, and why some of them are not there.

    It is made over this one, so that torch, NumPy and Pillow are the same for all unless a package insists on other versions.
    """
    python = folder / "bin" / "python"
    if install and not python.exists():
        venv.create(folder, with_pip=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (own / "over.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not python.exists():
        return python, dict.fromkeys(packages, f"not installed in {folder}: --install does it")
    missing = {}
    for name in packages if install else ():
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", name], capture_output=True, text=True)
        if done.returncode:
            missing[name] = f"cannot be installed: {_last_line(done.stderr)}"
    return python, missing


def run_json(command: Sequence[object], *, seconds: float) -> dict[str, Any]:
    """The JSON object that a command prints last. Raises ChildProcessError, with its last line, if it fails or takes longer than that."""
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"was stuck for {seconds:.0f} s") from error
    if done.returncode:
        raise ChildProcessError(_last_line(done.stderr) or f"exit code {done.returncode}")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ChildProcessError(_last_line(done.stderr) or "it said nothing") from error


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")
