"""Folders are replaced as a whole, or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY
from tim.model_folder.replacing import FolderInUseError, replaced_folder


def write(folder: Path, name: str) -> None:
    with replaced_folder(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / name).write_text(name)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "model.tmp").mkdir()  # of a process that was killed
    (tmp_path / "model.tmp" / "remains").touch()
    for name in ("one", "two"):
        write(tmp_path / "new" / "model", name)
        write(tmp_path / "model", name)
    assert files(tmp_path) == ["model/inner/two", "new/model/inner/two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "model", "one")

    def fail(partial: Path) -> None:
        (partial / "half").touch()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), replaced_folder(tmp_path / "model") as partial:
        fail(partial)
    assert files(tmp_path) == ["model/inner/one"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    """A second one is refused, and leaves the folder of the first alone; the lock ends with its process, even a killed one."""
    script = f"""
from tim.model_folder.replacing import replaced_folder
with replaced_folder({str(tmp_path / "model")!r}) as partial:
    (partial / "half").touch()
    print("writes", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writes\n"
        with pytest.raises(FolderInUseError, match="model: another process is writing it"):
            write(tmp_path / "model", "two")
        assert files(tmp_path) == ["model.tmp/half"]
        process.kill()
    write(tmp_path / "model", "three")
    assert files(tmp_path) == ["model/inner/three"]


def test_a_folder_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "model", "one")
    (tmp_path / "model").rename(tmp_path / "model.old.tmp")  # as a process leaves it that is killed between its two moves
    with pytest.raises(OSError, match="no space"), replaced_folder(tmp_path / "model"):
        raise OSError("no space")
    assert files(tmp_path) == ["model/inner/one"]


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "model", "one")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    write(tmp_path / "model", "two")
    assert (tmp_path / "model").is_symlink()
    assert files(tmp_path / "disk") == ["model/inner/two"]
