from __future__ import annotations

import os
from pathlib import Path

import pytest

# As sshd, it gives one line to a shell. The host `lost` cannot be reached.
SSH = """\
#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
[ "$1" != lost ] || { echo "ssh: connect to host lost port 22: Connection refused" >&2; exit 255; }
export HOST="$1"
exec sh -c "$2"
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-in commands, first on the PATH: `ssh`, which runs everything on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    add_command(folder / "ssh", SSH)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def add_command(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)
