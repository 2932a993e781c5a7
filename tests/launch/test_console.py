"""Exit codes, one-line errors, and nothing but one JSON object on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from launch.console import session


def run(body: str, *, as_json: bool = False, debug: bool = False) -> subprocess.CompletedProcess[str]:
    lines = ["import os, subprocess", "from launch.console import session", f"with session(as_json={as_json}, debug={debug}) as console:"]
    program = "\n".join([*lines, *("    " + line for line in body.splitlines())])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("ValueError('corpus: no such folder\\n  look again')", 2, "error: corpus: no such folder look again"),
        ("RuntimeError('a rank died')", 1, "error: a rank died"),
        ("FileNotFoundError(2, 'No such file or directory', 'x.tar')", 1, "error: No such file or directory: x.tar"),
        ("KeyError('x')", 1, "error: KeyError: 'x' (unexpected error: run the command again with --debug for the traceback)"),
        ("KeyboardInterrupt()", 130, "error: interrupted"),
    ],
)
def test_an_exception_is_one_line_and_a_code(raised: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, session(as_json=False, debug=False):
        raise eval(raised)
    output = capsys.readouterr()
    assert ended.value.code == code
    assert output.err == said + "\n"
    assert output.out == ""


def test_stopped_by_a_signal_passes_through() -> None:
    with pytest.raises(SystemExit) as ended, session(as_json=False, debug=False):
        raise SystemExit(75)
    assert ended.value.code == 75


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), session(as_json=False, debug=True):
        raise ValueError("wrong")
    output = capsys.readouterr()
    assert "Traceback" in output.err
    assert output.err.endswith("error: wrong\n")


def test_json_is_alone_on_stdout_whoever_else_prints() -> None:
    body = (
        "print('from a library')\nos.system('echo from a child process')\nconsole.line('a remark')\n"
        "console.result('text', data={'loss': float('nan'), 'n': 3})"
    )
    done = run(body, as_json=True)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"loss": None, "n": 3}
    assert done.stdout.count("\n") == 1
    for text in ("from a library", "from a child process", "a remark"):
        assert text in done.stderr


def test_json_holds_the_error_too() -> None:
    done = run("raise ValueError('seed: not a number')", as_json=True)
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": "seed: not a number", "exit": 2}


def test_a_reader_that_has_enough_is_no_error() -> None:
    program = "from launch.console import session\nwith session(as_json=False, debug=False) as c:\n c.result('y\\n' * 200000, data={})"
    done = subprocess.run(f'{sys.executable} -c "{program}" | head -1', shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "y\n"
    assert done.stderr == ""


def test_progress_in_a_log_is_few_lines_with_the_final_count_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with session(as_json=False, debug=False) as console, console.progress() as report:
        for done in range(101):
            report("examine", done, None)
        for done in range(51):
            report("write", done, 50)
    assert capsys.readouterr().err.splitlines() == ["examine 100", "write 50/50"]


def test_a_bar_whose_end_was_not_known_is_full_when_the_work_is_done() -> None:
    program = "from launch.console import session\nwith session(as_json=False, debug=False) as c, c.progress() as p: p('examine', 7, None)"
    reader, terminal = os.openpty()
    try:
        subprocess.run([sys.executable, "-c", program], stderr=terminal, env={**os.environ, "COLUMNS": "80", "TERM": "xterm"}, check=True)
        shown = os.read(reader, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(reader)
    assert shown.rindex("7/7") > shown.rfind("7/?")
