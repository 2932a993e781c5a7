"""`tim bench prepare`: that it measures, everybody on the same images, and says what it could not compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.dataprep.helpers import photo, write_folder


def test_everybody_keeps_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{number}.jpg": photo(number) for number in range(4)} | {"thin.png": photo(9, height=8, width=90, format="PNG")}
    folder = write_folder(tmp_path / "pictures", {**files, "note.txt": b"no image"})
    assert main(["bench", "prepare", str(folder), "--out", str(tmp_path / "out"), "--copies", "2", "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["workers"]) == (10, 1)
    assert found["kept"] == {"tim": 8, "bare decoder": 10, "datasets map": 8}
    for what in ("images_per_second", "images_per_cpu_second"):
        assert set(found[what]) == set(found["kept"])
        assert min(found[what].values()) > 0
    assert set(found["not_measured"]) == {"img2dataset no", "img2dataset keep_ratio", "py-data-juicer"}
    assert all(why.startswith("not installed in ") and why.endswith("; use --install") for why in found["not_measured"].values())


def test_folders_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "prepare", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no images: give folders of images" in capsys.readouterr().err
