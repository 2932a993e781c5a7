"""Which previews of an earlier process stay when a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config.load import load_config
from launch.previews.files import forget_stale, has_preview

NETWORK = "network.params={patch_size: 2, depth: 1, hidden_size: 8, num_heads: 1}"


@pytest.mark.parametrize(
    ("changes", "overrides", "stay"),
    [
        ([], (), True),
        (["log.every: 10 → 20", "preview.seed: 0 → 1", "train.steps: 500 → 600"], (), True),
        (["train.lr: 0.1 → 0.2"], (), False),
        (["train.steps: 500 → 600"], ("train.schedule=cosine",), False),
        (["plan.schedule: [] → [{'step': 9}]"], (), False),
    ],
)
def test_later_previews_stay_unless_training_may_go_another_way(
    tmp_path: Path, changes: list[str], overrides: tuple[str, ...], stay: bool
) -> None:
    names = ["step-000004.png", "step-000006.png", "step-1000000.png", "step-1000000.unfinished", "step-last.png", "time-lapse.webp"]
    (tmp_path / "previews").mkdir()
    for name in names:
        (tmp_path / "previews" / name).write_text("")
    config = load_config(None, overrides=[NETWORK, "train.steps=500", f"run_dir={tmp_path}", *overrides])

    forget_stale(tmp_path, config, step=4, changes=changes, replan=False)
    later = [name for name in names if "6" in name or "1000000" in name]
    assert {path.name for path in (tmp_path / "previews").iterdir()} == {*names} - ({*()} if stay else {*later})
    forget_stale(tmp_path, config, step=4, changes=[], replan=True)
    assert {path.name for path in (tmp_path / "previews").iterdir()} == {*names} - {*later}


def test_a_damaged_file_is_no_preview(tmp_path: Path) -> None:
    (tmp_path / "step-000004.png").write_bytes(b"\x89PNG\r\n")
    assert not has_preview(tmp_path / "step-000004.png", settings={"step": 4})
    assert not has_preview(tmp_path / "step-000005.png", settings={"step": 5})
