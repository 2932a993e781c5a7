"""Background saves against real limits: full disks, file size limits, read-only file systems."""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import CheckpointError, CheckpointMetadata, check, newest
from launch.checkpoints.resuming import find_checkpoint
from launch.checkpoints.saving import mirror as mirror_module
from launch.checkpoints.saving.background import BackgroundSaver, Part
from launch.checkpoints.saving.follow_ups import FollowUps
from launch.checkpoints.tensor_fragments import Fragment
from launch.config.run_sections import CheckpointConfig
from launch.config.schema import ConfigError
from launch.distributed.ranks import Ranks

Make = Callable[..., "Run"]


class Run:
    """A run folder, its saver, and what it has logged. Weights are `size` numbers equal to the step."""

    def __init__(self, folder: Path, ranks: Ranks, *, size: int, **settings: object) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.weights = torch.zeros(size)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        section = CheckpointConfig.model_validate(settings)
        self.follow_ups = FollowUps(folder, section)
        self.saver = BackgroundSaver(folder, section, ranks=ranks, follow_ups=self.follow_ups, log=self.said.append)

    def start(self, step: int) -> None:
        self.weights.fill_(step)
        part = Part(
            {"w": tuple(self.weights.shape)},
            {"weights": {"w": Fragment(0, self.weights)}},
            texts={"trainer.json": json.dumps({"step": step})},
        )
        self.saver.start(CheckpointMetadata(step=step, world_size=1, config_hash=""), part)

    def save(self, *steps: int) -> None:
        """Save, and wait for all that follows."""
        for step in steps:
            self.start(step)
            self.saver.wait()
            assert self.follow_ups.wait(60)
        self.saver.after_step()

    def steps(self) -> list[int]:
        return [checkpoint.step_of(folder) for folder in checkpoint.step_folders(self.folder)]


@pytest.fixture
def make(tmp_path: Path, alone: Ranks) -> Make:
    return lambda folder=tmp_path / "run", *, size=1000, **settings: Run(folder, alone, size=size, **settings)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_is_the_state_at_the_call_not_what_training_makes_of_it(make: Make) -> None:
    run = make(size=5_000_000)
    run.start(3)
    run.weights.fill_(-1)
    run.saver.wait()
    folder = run.folder / "checkpoints" / "step-000003"
    assert check(folder).step == 3
    assert (checkpoint.consolidate(folder, ema=False)["w"] == 3).all()
    assert run.said == [f"saved {folder}"]
    assert (run.folder / "latest").read_text() == "step-000003\n"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "trainer.json", "weights-00000.safetensors"]


def test_a_save_is_published_without_another_step_and_said_at_the_next(make: Make) -> None:
    run = make()
    run.start(1)
    deadline = time.monotonic() + 60
    while not any(run.saver.votes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.steps() == [1]
    assert not run.said
    run.saver.receive([1, 0])
    run.saver.after_step()
    assert run.said == [f"saved {run.folder}/checkpoints/step-000001"]
    run.start(2)
    run.start(3)  # waits for step 2
    assert 2 in run.steps()
    run.saver.finish()
    assert run.steps() == [2, 3]


def test_a_second_save_waits_and_the_remains_of_a_killed_one_are_removed(make: Make) -> None:
    run = make()
    remains = run.folder / "checkpoints" / "step-000001.tmp"
    remains.mkdir()
    (remains / "rank-00001.json").write_text("{}")
    assert newest(run.folder) is None
    run.save(2)
    assert not remains.exists()


def test_multiples_of_keep_every_stay(make: Make) -> None:
    run = make(every=10, keep_last=2, keep_every=20)
    run.save(10, 20, 30, 40, 50, 60, 70)
    assert run.steps() == [20, 40, 60, 70]


def test_minutes_make_a_save_due(make: Make) -> None:
    run = make(every=1000, every_minutes=0.001)
    time.sleep(0.1)
    assert run.saver.votes() == (False, True)
    assert not run.saver.is_due(7)
    run.saver.receive([0, 1])
    assert run.saver.is_due(7)
    run.save(7)
    assert not run.saver.is_due(8)


def test_a_full_disk_loses_no_run_and_room_is_made_first(tmp_path: Path, make: Make) -> None:
    with mounted(tmp_path / "disk", "size=12m") as disk:
        run = make(disk / "run", size=1_000_000, keep_last=2)  # 4 MB each, and the margin
        run.save(1, 2, 3)
        assert run.steps() == [2, 3]
        assert f"removed {disk}/run/checkpoints/step-000001 to make room for step 3" in run.said
        (disk / "other").write_bytes(bytes(2_000_000))
        run.save(4)
        assert run.steps() == [3, 4]

        big = make(disk / "run", size=2_400_000, keep_last=1)
        big.save(5)
        assert big.steps() == [4]  # what is beyond keep_last was removed, the newest was not
        (warning,) = [line for line in big.said if "warning" in line]
        assert "step 5 was not saved" in warning
        assert "a checkpoint needs 11.7 MB: free space there, or lower checkpoint.keep_last" in warning
        with pytest.raises(RuntimeError, match=r"the last step was not saved: .*free space there"):
            big.saver.finish()
        assert not list((disk / "run" / "checkpoints").glob("*.tmp"))


def test_a_file_that_cannot_be_written_is_named_with_its_errno_and_tried_again(make: Make) -> None:
    run = make(size=1_000_000)
    with file_size_limit(1_000_000):
        run.save(1)
    path = run.folder / "checkpoints" / "step-000001.tmp" / "weights-00000.safetensors"
    reason = f"{path}: File too large (EFBIG)"
    assert run.said == [f"warning: step 1 was not saved: {reason}; the run goes on, the next due step tries again"]
    assert list((run.folder / "checkpoints").iterdir()) == []
    run.save(2)
    assert run.steps() == [2]
    run.saver.finish()
    with file_size_limit(1_000_000):
        run.start(3)
        with pytest.raises(RuntimeError, match=r"the last step was not saved: .*File too large \(EFBIG\)"):
            run.saver.finish()
    assert run.steps() == [2]


def test_a_disk_that_fills_during_the_save_and_one_that_is_read_only(tmp_path: Path, make: Make) -> None:
    with mounted(tmp_path / "disk", "size=9m,nr_inodes=5") as disk:
        run = make(disk, size=1000)  # root, checkpoints, step, weights, trainer.json: no inode is left for the manifest
        run.save(1)
        assert "No space left on device (ENOSPC): free space there, or lower checkpoint.keep_last" in run.said[0]
        assert list((disk / "checkpoints").iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run.save(2)
        assert "Read-only file system (EROFS)" in run.said[-1]
        subprocess.run(["mount", "-o", "remount,rw,nr_inodes=6", str(disk)], check=True)
        run.save(3)  # now for the manifest, but not for latest
        assert run.steps() == [3]
        assert "latest" in run.said[-2]
        assert run.said[-1] == f"saved {disk}/checkpoints/step-000003"


def test_a_missing_disk_is_not_a_new_run(make: Make) -> None:
    run = make()
    (run.folder / "config.yaml").write_text("")
    assert find_checkpoint(run.folder, mirror=None) is None  # killed before the first save
    run.save(1)
    assert find_checkpoint(run.folder, mirror=None) is not None
    checkpoints = run.folder / "checkpoints"
    checkpoints.rename(run.folder / "away")
    with pytest.raises(CheckpointError, match=r"checkpoints is missing.*\(latest, config\.yaml\): mount its disk; to start over, remove"):
        find_checkpoint(run.folder, mirror=None)
    checkpoints.mkdir()  # the mount point
    with pytest.raises(CheckpointError, match=r"is empty, but .*latest names step-000001"):
        find_checkpoint(run.folder, mirror=None)


@pytest.fixture(params=["folder", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "mirror") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/runs/mine"


def test_a_mirror_is_checked_before_anything_is_removed_and_resumed_from(tmp_path: Path, make: Make, mirror: str) -> None:
    run = make(keep_last=1, mirror=mirror)
    (run.folder / "config.yaml").write_text(f"run_dir: {run.folder}\n")
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    run.save(1, 2)
    assert run.steps() == [2]
    assert [line for line in run.said if "copied" in line] == [f"copied step-00000{step} to {mirror}" for step in (1, 2)]

    for name in ("checkpoints", "config.yaml", "metrics.jsonl", "latest"):
        (run.folder / name).rename(tmp_path / name)
    found = find_checkpoint(run.folder, mirror=mirror)
    assert found is not None
    assert (found.folder, found.metadata.step) == (run.folder / "checkpoints" / "step-000002", 2)
    assert (checkpoint.consolidate(found.folder, ema=False)["w"] == 2).all()
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (run.folder / "config.yaml").is_file()
    with pytest.raises(ConfigError, match=r"has the checkpoints of run_dir .*: give that run_dir, or another mirror"):
        find_checkpoint(tmp_path / "other", mirror=mirror)
    again = make(keep_last=1, mirror=mirror)
    again.follow_ups.add_missing()
    assert again.follow_ups.wait(60)
    assert again.follow_ups.messages() == []  # it was there


def test_nothing_is_removed_while_the_mirror_fails_and_a_damaged_copy_is_passed_over(tmp_path: Path, make: Make) -> None:
    copies = tmp_path / "mirror"
    copies.write_text("in the way")
    run = make(keep_last=1, mirror=str(copies))
    (run.folder / "config.yaml").write_text(f"run_dir: {run.folder}\n")
    run.save(1, 2)
    assert run.steps() == [1, 2]
    assert sum("was not copied" in line for line in run.said) >= 2
    copies.unlink()
    run.save(3)
    assert run.steps() == [3]
    weights = copies / "checkpoints" / "step-000003" / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for path in (*(run.folder / "checkpoints").rglob("*.*"), run.folder / "latest"):
        path.unlink()
    found = find_checkpoint(run.folder, mirror=str(copies))
    assert found is not None
    assert found.metadata.step == 2
    assert "step-000003" in found.skipped[0]


def test_a_command_gets_the_path_without_a_shell_and_its_failure_is_a_warning(tmp_path: Path, make: Make) -> None:
    run = make(on_checkpoint=f"cp -r {{path}}/trainer.json '{tmp_path}/copy of; $HOME'")
    run.save(1)
    assert json.loads((tmp_path / "copy of; $HOME").read_text()) == {"step": 1}
    failing = make(on_checkpoint="ls {path} /nowhere/at/all")
    failing.save(2)
    (warning,) = [line for line in failing.said if "warning" in line]
    assert "on_checkpoint failed with 2 for step-000002: " in warning
    unknown = make(on_checkpoint="no-such-command {path}")
    unknown.save(3)
    assert "warning: checkpoint.on_checkpoint cannot be run: No such file or directory: no-such-command" in unknown.said


def test_the_section_is_checked() -> None:
    for settings, message in (
        ({"every": 400, "keep_every": 1000}, "1000 is not a multiple of checkpoint.every=400"),
        ({"on_checkpoint": "ls 'x"}, "cannot be split into words"),
        ({"on_checkpoint": " "}, "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            CheckpointConfig.model_validate(settings)


def test_a_copy_of_a_private_file_is_private(tmp_path: Path) -> None:
    source, copy = tmp_path / "config.yaml", tmp_path / "mirror" / "config.yaml"
    source.touch()
    for mode in (0o600, 0o644):
        source.chmod(mode)
        mirror_module._write(str(copy), source=source)
        assert copy.stat().st_mode & 0o077 == mode & 0o077
