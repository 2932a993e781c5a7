"""`train.deepspeed`: what may be set, and what is refused with the key to use instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.config.deepspeed_settings import merged
from launch.config.load import load_config
from launch.config.schema import ConfigError

GOOD = """\
network:
  params: {patch_size: 2, depth: 2, hidden_size: 32, num_heads: 2}
train:
  steps: 100
"""
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_a_file_is_read_into_the_resolved_configuration(good: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(OFFLOAD))
    from_file = load_config(good, overrides=[f"train.deepspeed={tmp_path / 'ds.json'}"])
    inline = load_config(good, overrides=["train.deepspeed.zero_optimization.offload_optimizer.device=cpu",
                                          "train.deepspeed.zero_force_ds_cpu_optimizer=false"])  # fmt: skip
    assert from_file.train.deepspeed == inline.train.deepspeed == OFFLOAD


REFUSED = {
    "train_batch_size: 8": "deepspeed.train_batch_size: the plan sets it: use plan.tokens_per_pack and plan.packs_per_step",
    "gradient_accumulation_steps: 2": "deepspeed.gradient_accumulation_steps: the plan sets it: use plan.tokens_per_pack and",
    "gradient_clipping: 1.0": "deepspeed.gradient_clipping: use train.clip",
    "fp16: {enabled: true}": "deepspeed.fp16: use train.precision",
    "bf16: {enabled: true}": "deepspeed.bf16: use train.precision",
    "optimizer: {type: AdamW}": "deepspeed.optimizer: use train.optimizer, train.lr, train.betas and train.weight_decay",
    "scheduler: {type: WarmupLR}": "deepspeed.scheduler: use train.schedule and train.warmup",
    "zero_optimization: {stage: 2}": "deepspeed.zero_optimization.stage: use train.zero",
    "zero_optimization: {zero_hpz_partition_size: 8}": "deepspeed.zero_optimization.zero_hpz_partition_size: ZeRO++ and MiCS",
    "sequence_parallel_size: 2": "deepspeed.sequence_parallel_size: sequence parallelism is not supported: a pack fits on one device",
    "communication_data_type: bf16": "communication_data_type: got bf16, but gradients are summed over ranks in fp32: leave it out",
    "zero_optimisation: {}": "deepspeed.zero_optimisation: not supported; did you mean zero_optimization?",
    "zero_optimization: {reduce_bucket_sise: 5}": "zero_optimization.reduce_bucket_sise: not supported; did you mean reduce_bucket_size?",
    "zero_optimization: {reduce_bucket_size: auto}": "zero_optimization.reduce_bucket_size: auto is a value of Hugging Face",
    "zero_optimization: 2": "deepspeed.zero_optimization: must be a mapping, got 2",
    "zero_optimization: {overlap_comm: true}": "overlap_comm: DeepSpeed overlaps only under ZeRO 2 while",
    "zero_optimization: {offload_param: {device: cpu}}": "offload_param: train.zero=1 keeps whole weights on the GPU: use train.zero=3",
    "zero_optimization: {offload_optimizer: {device: disk}}": "offload_optimizer.device: got 'disk', must be none or cpu",
    "zero_optimization: {offload_optimizer: {device: nvme}}": "offload_optimizer.device: offloading to NVMe is not supported, because",
    "zero_optimization: {offload_optimizer: {ratio: 0.5}}": "offload_optimizer.ratio: it would change the layout of checkpoints",
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED.items(), ids=REFUSED)
def test_a_key_that_the_run_decides_is_refused_with_the_key_to_use(good: Path, tmp_path: Path, line: str, message: str) -> None:
    good.write_text(f"{GOOD}  deepspeed:\n    {line}\n")
    with pytest.raises(ConfigError) as error:
        load_config(good)
    text = str(error.value)
    assert text.startswith(f"{good}:")
    assert message in text
    assert "\n" not in text

    (tmp_path / "ds.yaml").write_text(f"{line}\n")
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides=[f"train={{steps: 3, deepspeed: {tmp_path / 'ds.yaml'}}}", "network={recipe: t2i-xl-1}"])
    assert str(error.value).startswith(f"command line: train.deepspeed: {tmp_path / 'ds.yaml'}.")
    assert message.removeprefix("deepspeed.") in str(error.value)


def test_offloading_needs_shards(good: Path) -> None:
    good.write_text(f"{GOOD}  deepspeed: {json.dumps(OFFLOAD)}\n")
    with pytest.raises(ConfigError, match=r"offload_optimizer: train\.zero=0 keeps everything on the GPU: use train\.zero=1, 2 or 3"):
        load_config(good, overrides=["train.zero=0"])


@pytest.mark.parametrize("content", [None, "a: [1", "7"])
def test_a_file_that_cannot_be_read_is_named(good: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match=r"command line: train\.deepspeed: \S*ds\.json: (no such file|cannot be read|holds no mapping)"):
        load_config(good, overrides=[f"train.deepspeed={tmp_path / 'ds.json'}"])


def test_sections_are_merged() -> None:
    base = {"a": 1, "zero_optimization": {"stage": 2, "overlap_comm": False}}
    assert merged(base, {"zero_optimization": {"overlap_comm": True}, "b": 2}) == {
        "a": 1, "b": 2, "zero_optimization": {"stage": 2, "overlap_comm": True}
    }  # fmt: skip
    assert base["zero_optimization"] == {"stage": 2, "overlap_comm": False}
