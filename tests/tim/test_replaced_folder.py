"""Folders are replaced as a whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tim.model_folder.replacing import replaced_folder


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


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "model", "one")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    write(tmp_path / "model", "two")
    assert (tmp_path / "model").is_symlink()
    assert files(tmp_path / "disk") == ["model/inner/two"]
