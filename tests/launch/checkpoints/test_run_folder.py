from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.checkpoints.run_folder import changes_on_resume, exclusive_lock, write_config
from launch.config.load import load_config
from launch.config.schema import Config, ConfigError

HOLD = """
import sys, time
from pathlib import Path
from launch.checkpoints.run_folder import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


def config(*overrides: str) -> Config:
    needed = ["network.params={depth: 1, hidden_size: 8, num_heads: 1}", "train.steps=5"]
    return load_config(None, overrides=[*needed, *overrides])


def test_a_run_in_use_is_refused_and_that_of_a_killed_process_is_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is in use by process {holder.pid} on"), exclusive_lock(run):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (run / "lock").exists()
    (run / "config.yaml").touch()
    (run / "model.tmp").mkdir()  # the process was writing the model folder
    with exclusive_lock(run):
        pass
    assert not (run / "lock").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"is not a run folder \(it holds thesis\.tex\)"), exclusive_lock(tmp_path):
        pass
    with pytest.raises(ConfigError, match="is a file"), exclusive_lock(tmp_path / "thesis.tex"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_environment_variables_are_neither_shown_nor_readable_by_others(tmp_path: Path) -> None:
    write_config(tmp_path, config())
    assert (tmp_path / "config.yaml").stat().st_mode & 0o044
    write_config(tmp_path, config("cluster.env={API_KEY: secret}"))
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert changes_on_resume(tmp_path, config("cluster.env={API_KEY: other}")) == ["cluster.env.API_KEY: changed"]


def test_what_changed_is_told_and_what_cannot_change_is_refused(tmp_path: Path) -> None:
    assert changes_on_resume(tmp_path, config()) == []
    write_config(tmp_path, config())
    now = config("train.steps=9", "text.caption_dropout=0.2")
    assert changes_on_resume(tmp_path, now) == [
        "text.caption_dropout: 0.1 → 0.2",
        "train.steps: 5 → 9",
    ]
    with pytest.raises(ConfigError, match=r"network\.params\.depth was 1 in .* and is 2"):
        changes_on_resume(tmp_path, config("network.params.depth=2"))
    with pytest.raises(ConfigError, match=r"objective\.transport was 'ot_fm' in .* and is 'trigflow'"):
        changes_on_resume(tmp_path, config("objective.transport=trigflow"))


def test_the_memory_of_the_codec_may_change_but_not_its_latents(tmp_path: Path) -> None:
    codec = "codec={kind: dc-ae, path: weights}"
    write_config(tmp_path, config(codec))
    assert changes_on_resume(tmp_path, config(codec, "codec.memory_gb=2")) == ["codec.memory_gb: None → 2.0"]
    (tmp_path / "pixel").mkdir()
    write_config(tmp_path / "pixel", config())
    with pytest.raises(ConfigError, match=r"codec\.channels was None in .* and is 1: the run's weights do not fit"):
        changes_on_resume(tmp_path / "pixel", config("codec.channels=1"))
    for typed, said in (
        ("codec.memory_gb=2", "pixel is never processed in tiles"),
        ("codec={kind: kl, path: x, channels: 1}", "give kind pixel"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(typed)
