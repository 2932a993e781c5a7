"""Which warnings reach the screen of a command and of its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.foreign_warnings import HIDDEN
from tests import REPOSITORY

# What a command and a worker do first, and then warnings of another library and of our own modules.
LIBRARY = """
import warnings
def warn(module):
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning):
        warnings.warn_explicit(f"{module} {category.__name__}", category, "file.py", 1, module=module)
"""
WORKER = """
import sys, library
from pipeline.foreign_warnings import hide_if_asked
hide_if_asked()
for name in sys.argv[1:]: library.warn(name)
"""
COMMAND = """
import subprocess, sys, library
from launch.cli import main
main(["recipes", *sys.argv[2:]])
for name in ("torch.distributed", "timm.models", "tim.network", "launch"): library.warn(name)
subprocess.run([sys.executable, "-c", sys.argv[1], "torch.worker", "pipeline.worker"], check=True)
"""
OWN_OR_FOR_USERS = {
    *(f"{module} UserWarning" for module in ("torch.distributed", "timm.models", "torch.worker")),
    *(f"{module} {name}" for module in ("tim.network", "launch", "pipeline.worker") for name in ("FutureWarning", "UserWarning")),
}


def shown(tmp_path: Path, *options: str, user: str | None = None) -> set[str]:
    (tmp_path / "library.py").write_text(LIBRARY)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONWARNINGS", HIDDEN)}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{tmp_path}"
    if user is not None:
        environment["PYTHONWARNINGS"] = user
    done = subprocess.run([sys.executable, "-c", COMMAND, WORKER, *options], env=environment, capture_output=True, text=True, check=True)
    return {" ".join(line.split()[-2:]) for line in done.stderr.splitlines() if line.startswith("file.py")}


def test_deprecations_of_other_libraries_are_hidden_in_commands_and_workers(tmp_path: Path) -> None:
    assert shown(tmp_path) == OWN_OR_FOR_USERS


@pytest.mark.parametrize(("options", "user"), [((), "default"), (("--debug",), None)])
def test_the_users_own_filters_win_and_debug_shows_all(options: tuple[str, ...], user: str | None, tmp_path: Path) -> None:
    found = shown(tmp_path, *options, user=user)
    for module in ("torch.distributed", "timm.models", "torch.worker", "launch"):
        assert {f"{module} {name}" for name in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning")} <= found


def test_loggers_of_other_libraries_that_nobody_can_act_on_are_silent() -> None:
    warn = "; ".join(f"logging.getLogger({name!r}).warning('noise')" for name in ("bitsandbytes.backends", "diffusers.configuration_utils"))
    command = f"import logging, launch.cli; launch.cli.main(['recipes']); import diffusers.configuration_utils; {warn}"
    done = subprocess.run([sys.executable, "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "noise" not in done.stderr
