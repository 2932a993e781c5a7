"""What a command shows while it starts."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

from tests import REPOSITORY

SCRIPT = """
import sys, time
from launch.logs.startup import STARTUP
with STARTUP.shown("importing torch"):
    time.sleep(1.4)
    STARTUP.stage("a stage with so long a name that it does not fit")
    time.sleep(0.6)
    STARTUP.line("a line")
    STARTUP.end()
    print("result", file=sys.stderr)
"""


def test_a_log_gets_a_line_within_two_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"starting: importing torch, \d+ s\na line\nresult\n", done.stderr), done.stderr


def shown_on_a_terminal(script: str) -> str:
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env={**os.environ, "COLUMNS": "40"}, stdout=theirs, stderr=theirs, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    return shown


def test_a_result_ends_it_and_lines_stand_above() -> None:
    """Whatever the command has not ended itself."""
    script = """
import time
from launch.console import session
from launch.logs.startup import STARTUP
with session(as_json=False, debug=False) as console, STARTUP.shown("first"):
    time.sleep(0.4)
    console.line("a line")
    {action}
    time.sleep(0.6)
    with STARTUP.shown("second"), STARTUP.shown("third"):
        time.sleep(0.6)
"""
    shown = shown_on_a_terminal(script.format(action="console.result('result', data={})"))
    before, _, after = shown.partition("result\r\n")
    assert "\r\x1b[Ka line\r\n" in before
    assert "first" in before
    assert "first" not in after
    assert set(re.findall("second|third", after.rpartition("second")[2])) == {"third"}, "one at a time"
    assert shown.endswith("\r\x1b[K")
    shown = shown_on_a_terminal(script.format(action="console.progress().__enter__()('read', 1, 2)"))
    assert "first" not in shown.partition("read")[2]


def test_other_ranks_are_silent() -> None:
    environment = {**os.environ, "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "a line\nresult\n"


def test_a_terminal_gets_one_line_that_fits_and_goes() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40"}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, env=environment, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert shown.startswith("\r\x1b[Kstarting: importing torch, 0 s\r")
    live = [part for part in re.split(r"[\r\n]|\x1b\[K", shown) if part.startswith("starting: ")]
    assert len(live) > 4
    assert max(map(len, live)) == 39
    assert shown.endswith("\r\x1b[Kresult\r\n")
