"""docs/tutorial.md: its commands, in their order, and that they print the screens that it shows.

`TIM_WRITE_TUTORIAL=1 pytest -m soak --timeout 1800 tests/test_tutorial.py` writes the screens anew.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.test_docs import Block, blocks

PAGE = REPOSITORY / "docs" / "tutorial.md"
NUMBER = re.compile(r"(?<=-)[0-9a-f]{8}(?=\.png)|(?<=sha256 )[0-9a-f]+|\d[\d,.:]*")
VERDICT = re.compile(r"^(Quality |  \S.* \(pixels\)[: ])")  # another machine trains a slightly different model
PASSING = re.compile(r"^(starting:|\w+ \d[\d,]*(/[\d,]+)?[, ]|step \d+/)")  # lines of progress, which depend on the time that work takes
LEFT_OUT = "…"
PORT = 7860


def sections() -> Iterator[tuple[Block, Block]]:
    """Blocks of commands, each with the block of its screen."""
    page = [block for block in blocks(PAGE) if block.language in ("sh", "text")]
    commands, screens = page[::2], page[1::2]
    assert [block.language for block in commands] == ["sh"] * len(screens)
    assert [block.language for block in screens] == ["text"] * len(commands)
    return zip(commands, screens, strict=True)


def printed(commands: Block, *, folder: Path) -> list[str]:
    """The lines on the screen after some commands."""
    lines: list[str] = []
    for words in commands.commands():
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *words[1:]],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120", "TIM_CACHE": str(folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        if words[1] == "serve":
            lines += served(process)
        else:
            lines += [line.rstrip() for line in process.stdout]
        assert process.wait(timeout=60) == 0, "\n".join(lines)
    return [line.replace(f"{sys.executable} -m launch.cli", "tim").replace(f"{folder}/", "") for line in lines]


def served(process: subprocess.Popen[str]) -> list[str]:
    """The screen of a server, which is stopped when it has answered."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if f"127.0.0.1:{PORT}" in line:
            break
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/model", timeout=5) as answer:
                assert answer.status == 200
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    return lines


def condensed(lines: list[str]) -> list[str]:
    """Lines without those of the start, and without the middle of a long progress."""
    found: list[str] = []
    shown = (line for line in lines if not line.startswith("starting:"))
    for is_passing, group in groupby(shown, key=lambda line: bool(PASSING.match(line))):
        run = list(group)
        found += [*run[:2], LEFT_OUT, *run[-1:]] if is_passing and len(run) > 4 else run
    return found


def kept(lines: list[str]) -> list[str]:
    """Lines that are the same on every machine, without their numbers."""
    same = [line for line in lines if line.strip() not in ("", LEFT_OUT) and not PASSING.match(line) and not VERDICT.match(line)]
    return [NUMBER.sub("0", " ".join(line.split())) for line in same]


def test_every_command_has_its_screen() -> None:
    assert all(screen.text.strip() for _, screen in sections())


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_commands_print_the_screens_of_the_page(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "photos").symlink_to(shared / "corpora" / "photos")
    screens = [(shown, printed(commands, folder=tmp_path)) for commands, shown in sections()]
    if "TIM_WRITE_TUTORIAL" in os.environ:
        text = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
        for shown, lines in reversed(screens):
            text[shown.line : shown.line + shown.text.count("\n")] = [f"{line}\n" for line in condensed(lines)]
        PAGE.write_text("".join(text), encoding="utf-8")
        return
    for shown, lines in screens:
        missing = [line for line in kept(shown.text.splitlines()) if line not in kept(lines)]
        assert not missing, f"{PAGE.name}:{shown.line}: the command did not print {missing}"
