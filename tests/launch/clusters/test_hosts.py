"""`tim launch --hostfile`: real processes behind a stand-in for ssh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.clusters import hosts as module
from launch.clusters.hosts import Host, host_commands, read_hostfile, run_on_hosts, shared_environment
from tests import REPOSITORY
from tests.processes import is_running

pytestmark = pytest.mark.usefixtures("commands")
# Says that it runs, then waits for a signal and says which one.
WAIT = """
import os, signal, sys, time
from pathlib import Path
def end(number, frame):
    Path(os.environ["HOST"] + ".signal").write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, end)
Path(os.environ["HOST"] + ".pid").write_text(str(os.getpid()))
time.sleep(600)
"""


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.is_file() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def test_a_hostfile_is_deepspeeds(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two machines\nnode-1 slots=8\n\nme@node-2  slots=4   # half of them\n")
    assert read_hostfile(file) == [Host("node-1", 8), Host("me@node-2", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1", r"hosts:1: 'node-1' is not a host; write NAME slots=N"),
        ("node-1 slots=0", r"hosts:1: .* N of at least 1"),
        ("a slots=1\n-oProxyCommand=x slots=1", r"hosts:2: .* is not a host"),
        ("a slots=1\na slots=2", r"hosts:2: host a is listed twice"),
        ("# none", r"hosts: lists no host"),
    ],
)
def test_what_is_wrong_in_a_hostfile_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"--hostfile .*hosts: not a text file"):
        read_hostfile(tmp_path / "hosts")


def test_hosts_get_their_place() -> None:
    commands = host_commands([Host("me@a", 8), Host("b", 4)], endpoint=None, arguments=["photos", "seed=1"])
    assert commands["me@a"][3:] == (
        ["launch", "photos", "seed=1", "--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "a:29500"]
    )
    assert commands["b"][6:] == ["--nproc-per-node", "4", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "a:29500"]
    numbered = host_commands([Host("fe80::1", 1), Host("b", 1)], endpoint=None, arguments=[])
    assert numbered["b"][-2:] == ["--rdzv-endpoint", "[fe80::1]:29500"]
    with pytest.raises(ValueError, match="localhost is another machine on each of them"):
        host_commands([Host("localhost", 1), Host("b", 1)], endpoint=None, arguments=[])
    assert "--nnodes" not in host_commands([Host("a", 8)], endpoint=None, arguments=["photos"])["a"]


def test_output_is_named_and_the_environment_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "WARN it's")
    monkeypatch.setenv("UNRELATED", "1")
    environment = shared_environment(os.environ)
    assert environment["NCCL_DEBUG"] == "WARN it's"
    assert "UNRELATED" not in environment
    program = "import os, launch; print(os.getcwd(), os.environ['NCCL_DEBUG'], os.environ['SET'], os.isatty(0)); print(input())"
    command = [sys.executable, "-c", program]
    code = run_on_hosts(
        {"node-1": ["true"], "me@node-22": command}, environment={**environment, "PYTHONPATH": str(REPOSITORY)}, setup=["export SET=up"]
    )
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"me@node-22: {tmp_path} WARN it's up False"
    assert said[-1] == "me@node-22: EOFError: EOF when reading a line"
    assert code == 1


def test_setup_lines_are_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """They may end in comments and read standard input, run in the folder of the training, and must succeed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "activate").write_text("export SET=up")
    command = [sys.executable, "-c", "import os; print(os.environ['SET'])"]
    setup = [". ./activate  # the environment", "cat", "if true", "then echo set up; fi"]
    assert run_on_hosts({"a": command}, environment={}, setup=setup) == 0
    assert capfd.readouterr().err.splitlines() == ["a: set up", "a: up"]
    assert run_on_hosts({"a": command}, environment={}, setup=["(exit 3)", "true"]) == 3
    assert capfd.readouterr().err == "a: cluster.setup: a line failed with exit code 3\n"


def test_a_host_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "GRACE", 1.0)
    fails = "from pathlib import Path; import sys, time\nwhile not Path('a.pid').exists(): time.sleep(0.02)\nsys.exit('no GPU')"
    code = run_on_hosts({"a": [sys.executable, "-c", WAIT], "b": [sys.executable, "-c", fails]}, environment={})
    assert code == 1
    assert capfd.readouterr().err.splitlines() == ["b: no GPU", "ending a"]
    assert not is_running(int(Path("a.pid").read_text()))
    assert not Path("a.signal").exists(), "it could not save without b"


def test_a_host_that_has_saved_waits_for_those_that_still_close(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 closes trackers and requeues the job. A failure after a stop is the result, and limits the wait."""
    monkeypatch.setattr(module, "GRACE", 0.0)
    stops, closes = ["sh", "-c", "exit 75"], ["sh", "-c", "sleep 1.5; exit 75"]
    assert run_on_hosts({"a": stops, "b": closes}, environment={}) == 75
    assert run_on_hosts({"a": stops, "b": ["sh", "-c", "sleep 1; exit 3"], "c": ["sleep", "600"]}, environment={}) == 3
    monkeypatch.setattr(module, "GRACE_AFTER_SAVE", 0.5)
    assert run_on_hosts({"a": stops, "b": ["sleep", "600"]}, environment={}) == 1
    assert capfd.readouterr().err.splitlines() == ["ending c", "ending b"]


def test_a_host_that_cannot_be_reached_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_on_hosts({"a": ["true"], "lost": ["true"]}, environment={}) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "lost: ssh: connect to host lost port 22: Connection refused"
    assert said[1].startswith("lost: ssh could not connect, or lost the connection: try `ssh lost true`")


def test_ctrl_c_reaches_all_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def press() -> None:
        wait_for(Path("a.pid"), Path("b.pid"))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert run_on_hosts({host: [sys.executable, "-c", WAIT] for host in ("a", "b")}, environment={}) == 75
    assert Path("a.signal").read_text() == Path("b.signal").read_text() == "SIGINT"


def test_hosts_notice_that_the_launcher_is_gone(tmp_path: Path) -> None:
    program = f"from launch.clusters.hosts import run_on_hosts; run_on_hosts({{'a': {[sys.executable, '-c', WAIT]!r}}}, environment={{}})"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    wait_for(tmp_path / "a.pid")
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path / "a.signal")
    assert (tmp_path / "a.signal").read_text() == "SIGHUP"
