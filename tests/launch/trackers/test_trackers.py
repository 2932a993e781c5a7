"""Trackers show one run after resumes, with growing steps; one that fails does not stop the run."""

from __future__ import annotations

import struct
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from launch.config.load import load_config
from launch.config.schema import Config, ConfigError
from launch.trackers import trackers
from launch.trackers.backends import check_installed
from launch.trackers.trackers import Trackers

BLOCK = 32768  # of W&B's file format, that of LevelDB's log


def config_of(run: Path, *overrides: str) -> Config:
    network = "network.params={patch_size: 2, depth: 1, hidden_size: 8, num_heads: 1}"
    return load_config(None, overrides=[network, "train.steps=100", f"run_dir={run}", *overrides])


def run_process(config: Config, steps: Sequence[int], *, ahead: int, preview: int, lines: list[str]) -> None:
    """What a process sends that goes on before `steps`."""
    with Trackers(config, step=steps[0] - 2, ahead=ahead, log=lines.append) as sending:
        for step in steps:
            sending.write({"step": step, "loss": 1 / step, "loss_diffusion": None, "first_ids": ["a"], "images": 10 * step})
            if step == preview:
                sending.show(Image.new("RGB", (8, 4), "red"), step)


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    (file,) = folder.glob("*.wandb")
    data, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break  # it is being written
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def records_to_the_end(folder: Path) -> list[Any]:
    """The records of an offline run that has ended. W&B's own process may still be writing them."""
    deadline, found = time.monotonic() + 60, wandb_records(folder)
    while not any(record.HasField("exit") for record in found) and time.monotonic() < deadline:
        time.sleep(0.1)
        found = wandb_records(folder)
    return found


def test_two_resumes_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 500.0)  # a machine that is busy with other tests
    run, lines = tmp_path / "run", []
    run.mkdir()
    config = config_of(run, "log={trackers: [tensorboard, wandb], project: tests, name: first}")
    run_process(config, [2, 4, 6, 8], ahead=0, preview=6, lines=lines)
    run_process(config, [6, 8, 10], ahead=8, preview=6, lines=lines)  # the checkpoint of step 4 was the newest
    run_process(config, [10, 12], ahead=10, preview=12, lines=lines)
    assert not [line for line in lines if "warning" in line]

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Images("preview")] == [6, 12]
    assert not [path for path in (run / "tensorboard").iterdir() if path.is_dir()], "TensorBoard shows a folder as another run"

    folders = sorted((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_ctime_ns)
    assert len(folders) == 3
    records = [record for folder in folders for record in records_to_the_end(folder)]
    runs = [record.run for record in records if record.HasField("run")]
    assert len({each.run_id for each in runs}) == 1
    assert {(each.project, each.display_name) for each in runs} == {("tests", "first")}
    rows = [record.history for record in records if record.HasField("history")]
    values = [{(*item.nested_key, item.key)[0]: item.value_json for item in row.item} for row in rows]
    assert [int(each["_step"]) for each in values] == [2, 4, 6, 8, 10, 12]
    assert [int(each["_step"]) for each in values if "preview" in each] == [6, 12]
    assert float(values[-1]["loss"]) == 1 / 12
    assert list((folders[0] / "files" / "media" / "images").glob("preview_6_*.png"))


def test_a_preview_that_is_drawn_after_a_kill_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 500.0)
    run, lines = tmp_path / "run", []
    run.mkdir()
    config = config_of(run, "log={trackers: [tensorboard, wandb]}")
    run_process(config, [2, 4, 6], ahead=0, preview=0, lines=lines)  # killed before the preview of step 6 was drawn
    time.sleep(1)  # TensorBoard orders files of the same second by process id
    for step in (8, 10):  # both go on from the checkpoint of step 6
        with Trackers(config, step=6, ahead=step - 2, log=lines.append) as sending:
            sending.show(Image.new("RGB", (8, 4), "red"), 6)
            sending.write({"step": step, "loss": 1 / step})
    assert not [line for line in lines if "warning" in line]

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("preview")] == [6]
    folders = sorted((run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_ctime_ns)
    rows = [record.history for folder in folders for record in wandb_records(folder) if record.HasField("history")]
    values = [{".".join(item.nested_key) or item.key: item.value_json for item in row.item} for row in rows]
    steps = [int(each["_step"]) for each in values]
    assert steps == sorted(set(steps))
    assert [(each["_step"], each["preview.captions"]) for each in values if "preview.captions" in each] == [("7", '["step 6"]')]


def test_a_tracker_that_fails_warns_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    lines: list[str] = []
    run_process(config_of(tmp_path), [2, 4, 6], ahead=0, preview=4, lines=lines)
    (line,) = lines
    assert line.startswith("warning: log.trackers: tensorboard failed and is off until the run is started again: ")
    assert line.endswith("metrics.jsonl has every row")


def test_environment_variables_of_a_cluster_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    backend = SimpleNamespace(id=None, takes_back=True, start=sent.update, finish=lambda: None)
    monkeypatch.setattr(trackers, "make_backend", lambda kind, **settings: backend)
    with Trackers(config_of(tmp_path, "cluster={partition: gpu, env: {API_KEY: secret}}"), step=0, ahead=0, log=print):
        pass
    assert sent["cluster.partition"] == "gpu"
    assert "secret" not in str(sent)


def test_a_stopped_job_does_not_wait_twice_for_a_slow_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is full, and its end is waited for as well."""
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 3.0)
    monkeypatch.setattr(trackers, "WAITING", 1)
    busy, is_over = threading.Event(), threading.Event()

    def start(*arguments: object, **named: object) -> Any:
        busy.set()
        is_over.wait(60)
        raise RuntimeError("over")

    waits: list[float] = []
    monkeypatch.setattr(trackers, "make_backend", start)
    lines: list[str] = []
    with Trackers(config_of(tmp_path), step=0, ahead=0, log=lines.append) as sending:
        assert busy.wait(60)
        join = sending._thread.join
        monkeypatch.setattr(sending._thread, "join", lambda timeout: (waits.append(timeout), join(timeout)))
        sending.write({"step": 1, "loss": 1.0})
    is_over.set()
    assert waits[0] < 1.0
    assert "too slow: not all was sent" in lines[0]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ConfigError, match=r"^log\.trackers: comet needs the package comet-ml: pip install comet-ml, or leave comet out$"):
        check_installed(("tensorboard", "comet"))
