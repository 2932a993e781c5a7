"""Adapters with other optimizers, moments and averages on the host, and compiled blocks: kill -9 and resume change no bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.checkpoints import checkpoint
from launch.checkpoints.model_spec import spec_of
from launch.config.load import load_config
from tests.distributed import jobs
from tests.tim.tiny import tiny_network
from tim.model_folder.folder import save_model

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 64, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 1000, lr: 1.0e-3, ema: 0.9, lora: {rank: 4, dropout: 0.2}}
loader: {workers: 0}
checkpoint: {every: 1, keep_last: 99}
log: {every: 1, trackers: []}
"""
OFFLOAD = "train.deepspeed={zero_force_ds_cpu_optimizer: false, zero_optimization: {offload_optimizer: {device: cpu, pin_memory: false}}}"
SETTINGS = {
    "muon": ["train.optimizer=muon"],
    "8-bit moments": ["train.optimizer=adamw8bit"],
    "on the host": ["train.zero=2", OFFLOAD, "train.ema_device=cpu"],
    "8-bit moments on the host": ["train.zero=2", OFFLOAD, "train.ema_device=cpu", "train.optimizer=adamw8bit"],
    "muon in ZeRO 3": ["train.optimizer=muon", "train.zero=3"],
    "compiled": ["train.compile=true"],
}
QUICK = ("muon", "8-bit moments on the host")


def contents(run: Path) -> dict[str, str]:
    """Digests of the tensors of a run's newest checkpoint."""
    folder = checkpoint.find(run).folder
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != checkpoint.TRAINER_STATE}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in SETTINGS])
def test_a_killed_run_goes_on_bit_by_bit(figures: Path, tmp_path: Path, name: str) -> None:
    config, base, log, broken, unbroken = (tmp_path / part for part in ("run.yaml", "base", "log", "broken", "unbroken"))
    config.write_text(f"corpus: {figures}\n{CONFIG}")
    spec = spec_of(load_config(config))
    save_model(base, tiny_network(spec.network).state_dict(), spec)
    arguments = ("launch.cli", "train", str(config), f"train.init={base}", *SETTINGS[name])
    size = 1 if name == "compiled" else 2
    ranks = jobs.start_ranks(*arguments, f"run_dir={broken}", log=log, ranks=size)
    jobs.wait_for_row(broken, 3, ranks, log=log, patience=900)  # compilers take their time
    ranks.kill()
    killed = checkpoint.find(broken).metadata.step
    for run_dir in (broken, unbroken):
        jobs.run_ranks(*arguments, f"run_dir={run_dir}", f"train.steps={killed + 2}", log=log, ranks=size)
    assert log.read_text().count("continuing from ") == 1
    columns = ["step", "loss", "grad_norm", "ids_digest"]
    assert jobs.story(broken, columns=columns) == jobs.story(unbroken, columns=columns)
    assert contents(broken) == contents(unbroken)
    assert any("exp_avg" in kind for kind in contents(broken))
