"""`tim sample --dtype`: reaches the sampler, and is stated with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim.model_folder.folder import save_model


def test_the_dtype_of_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", tiny_network().state_dict(), SPEC)

    def pixels(*options: str, says: str) -> np.ndarray:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert main(["sample", str(tmp_path / "model"), "--prompt", "a", "--size", "32x32", "--out", str(out), *options]) == 0
        assert f"precision: {says}\n" in capsys.readouterr().err
        return np.asarray(Image.open(next(out.glob("0000-*.png"))), dtype=int)

    exact = pixels("--dtype", "fp32", says="fp32 (--dtype)")
    half = pixels("--dtype", "bf16", says="bf16 (--dtype)")
    assert 0 < np.abs(half - exact).mean() < 2
    assert np.array_equal(pixels("--dtype", "fp32", says="fp32 (--dtype)"), exact)
