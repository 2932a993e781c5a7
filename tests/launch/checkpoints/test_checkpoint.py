from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import CheckpointError, CheckpointMetadata, check, find, newest
from launch.checkpoints.saving.background import Part
from launch.distributed.ranks import Ranks
from tests.launch.checkpoints import writing

PART = "weights-00000.safetensors"


def save(run: Path, step: int, ranks: Ranks, *, keep_last: int = 9) -> Path:
    part = Part({}, {}, texts={PART: "0123456789abcdef" * 16 * step, checkpoint.TRAINER_STATE: json.dumps({"step": step})})
    metadata = CheckpointMetadata(step=step, world_size=1, config_hash="c")
    return writing.save(run, metadata, part, ranks=ranks, keep_last=keep_last)


def cut_off(folder: Path) -> None:
    (folder / PART).write_bytes((folder / PART).read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / PART).read_bytes())
    content[100] ^= 1
    (folder / PART).write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / "trainer.json").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_off_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:50])


def come_from_the_future(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (cut_off, "weights-00000.safetensors has 511 bytes, but 512 in the manifest"),
    (flip_a_bit, "weights-00000.safetensors does not match its digest in the manifest"),
    (lose_a_file, "trainer.json is missing"),
    (lose_the_manifest, "is not a checkpoint: it has no manifest.json"),
    (cut_off_the_manifest, "manifest.json: cannot be read"),
    (come_from_the_future, "unknown format 3; this version reads 1 and 2"),
]


def test_what_is_saved_is_found(tmp_path: Path, alone: Ranks) -> None:
    for step in (1, 2):
        folder = save(tmp_path, step, alone)
    found = newest(tmp_path)
    assert found is not None
    assert (found.folder, found.metadata.step, found.skipped) == (folder, 2, ())
    assert (tmp_path / "latest").read_text().strip() == "step-000002"
    assert find(tmp_path, step=1).metadata.step == 1
    assert checkpoint.read_trainer_state(folder) == {"step": 2}


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_noticed_and_passed_over(tmp_path: Path, alone: Ranks, damage: Callable[[Path], None], message: str) -> None:
    save(tmp_path, 1, alone)
    damaged = save(tmp_path, 2, alone)
    damage(damaged)
    with pytest.raises(CheckpointError, match="step-000002"):
        check(damaged)
    found = newest(tmp_path)
    assert found is not None
    assert found.metadata.step == 1
    assert message in found.skipped[0]
    assert save(tmp_path, 2, alone) == damaged  # the run goes on and reaches this step again
    assert check(damaged).step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_run_without_an_intact_checkpoint_does_not_start_again_silently(tmp_path: Path, alone: Ranks) -> None:
    cut_off(save(tmp_path, 1, alone))
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact.*has 255 bytes, but 256 in the manifest"):
        newest(tmp_path)


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path, alone: Ranks) -> None:
    left = tmp_path / "checkpoints" / "step-000001.tmp"
    left.mkdir(parents=True)
    (left / "trainer.json").write_text("{}")
    assert newest(tmp_path) is None
    save(tmp_path, 2, alone)
    assert not left.exists()


def test_only_the_newest_are_kept(tmp_path: Path, alone: Ranks) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, alone, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000010"]


def test_what_is_not_there_is_said(tmp_path: Path, alone: Ranks) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find(tmp_path)
    save(tmp_path, 4, alone)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; available: 4"):
        find(tmp_path, step=7)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        check(tmp_path)


def test_a_file_that_nobody_owns_is_a_mistake(tmp_path: Path) -> None:
    partial = checkpoint.create_partial_folder(tmp_path, step=1)
    (partial / "stray").write_text("x")
    with pytest.raises(AssertionError, match="stray"):
        checkpoint.publish(tmp_path, partial, CheckpointMetadata(step=1, world_size=1, config_hash=""), [{}])
    assert newest(tmp_path) is None
