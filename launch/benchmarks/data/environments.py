"""Virtual environments for other libraries, and processes in them that print one JSON object."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def environment(folder: Path, *, packages: Sequence[str], install: bool) -> tuple[Path, dict[str, str]]:
    """Python executable of an environment with these packages, and the reason for each missing one.

    The environment extends the current one, so that torch, NumPy and Pillow are the same unless a package requires other versions.
    """
    python = folder / "bin" / "python"
    if install and not python.exists():
        venv.create(folder, with_pip=True)
        site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (site_packages / "over.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not python.exists():
        return python, dict.fromkeys(packages, f"not installed in {folder}; use --install")
    missing = {}
    for name in packages if install else ():
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", name], capture_output=True, text=True)
        if done.returncode:
            missing[name] = f"cannot be installed: {_last_line(done.stderr)}"
    return python, missing


def run_json(command: Sequence[object], *, seconds: float) -> dict[str, Any]:
    """Run a command and parse its last output line as JSON. Raises ChildProcessError with its last line if it fails or times out."""
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ChildProcessError(f"timed out after {seconds:.0f} s") from error
    if done.returncode:
        raise ChildProcessError(_last_line(done.stderr) or f"exit code {done.returncode}")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ChildProcessError(_last_line(done.stderr) or "no output") from error


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")
