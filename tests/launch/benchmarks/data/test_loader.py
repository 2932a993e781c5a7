"""`tim bench data`: that it measures, and says what it could not compare with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.benchmarks.data import loader, loader_peers
from launch.cli import main


def test_the_loader_is_measured_and_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIXELS_PER_STEP", 64 * 64**2)
    images = tmp_path / "pictures"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
    Image.new("RGB", (80, 80)).save(images / "left-out.png")
    options = ["--max-side", "64", "--workers", "1", "--seconds", "0.2", "--repeats", "1"]
    assert main(["bench", "data", str(images), "--out", str(tmp_path / "out"), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["max_side"], found["workers"]) == (8, 64, 1)
    for what in ("images_per_second", "images_per_cpu_second"):
        assert set(found[what]) == {"tim", "bare decoder"}
        assert min(found[what].values()) > 0
    assert found["gigabytes_read_per_cpu_second"] > 0
    assert set(found["not_measured"]) == set(loader_peers.LOADERS)
    settings = {"tars": tmp_path / "out/pictures-corpus", "work": tmp_path, "max-pixels": 64**2, "workers": 1, "seconds": 0.2}
    assert loader.peer_rates(Path(sys.executable), "webdataset", settings)["images_per_cpu_second"] > 0
    with pytest.raises(ChildProcessError, match="No module named"):
        loader.peer_rates(Path(sys.executable), "megatron-energon", settings)


def test_a_folder_without_jpegs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no JPEGs: give a folder of images" in capsys.readouterr().err
