"""`tim estimate` in process: what it prints, and its parts by themselves. Measured memory: tests/distributed/test_memory.py."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.config.load import load_config
from launch.config.schema import Config
from launch.estimate.activations import Line, PassBytes, parameters_of, pass_bytes, quick_pass_bytes
from launch.estimate.estimate import Situation, setting_of, work_of
from launch.estimate.frozen_models import frozen_memory
from launch.estimate.memory import Activations, RunFacts, largest_pack, step_memory
from launch.estimate.trained_part import TrainedPart
from launch.estimate.work import planned_work
from launch.hardware.devices import TABLE, find_device, read_devices
from tests.pipeline.conftest import Sample, write_corpus
from tim import codecs
from tim.network import OFFICIAL_PARAMS

PARAMS: dict[str, Any] = {**OFFICIAL_PARAMS, "patch_size": 1, "in_channels": 32, "depth": 6, "hidden_size": 1152, "num_heads": 16}
PARAMS |= {"cap_feat_dim": 1152, "z_dim": 0}
CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 256, packs_per_step: 4}
network: {params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 10, zero: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def test_the_command_prints_memory_time_and_price(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(config), "--gpus", "2", "--device", "4090", "--price", "1.5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(each["zero"], each["checkpointing"]) for each in facts["settings"]] == [
        (stage, checkpointing) for stage in range(4) for checkpointing in ("none", "full")
    ]
    assert all(each["fits"] and each["largest_pack"] > 256 for each in facts["settings"])
    assert facts["chosen"] == facts["settings"][4]
    assert facts["chosen"]["peak"] == pytest.approx(sum(facts["chosen"]["parts"].values()))
    assert facts["price"] == pytest.approx(facts["hours"] * 2 * 1.5)
    assert facts["work"]["images"] == 16  # full packs of the largest images
    assert facts["limit"].startswith("compute")
    assert main(["estimate", str(config), "--device", "4090"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ *\*2 +none ", text, re.MULTILINE)
    assert max(map(len, text.splitlines()[5:13])) <= 80
    assert "price: $" in text


def test_devices_are_the_users_too(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text("big: {title: Big, memory: 1.0e+12, bf16: 1.0e+15, fp32: 1.0e+14, price: 9}\n")
    assert find_device("BIG", table=table).price == 9
    assert find_device("h200", table=table).memory == 141e9
    assert {"h100", "h200", "b200", "a100", "4090", "3060"} <= read_devices(TABLE).keys()
    with pytest.raises(SystemExit) as ended:
        main(["estimate", str(config), "--device", "h1000"])
    assert ended.value.code == 2
    assert "did you mean h100?" in capsys.readouterr().err


def test_formulas_and_traces_agree() -> None:
    for every in (0, 1):
        traced = pass_bytes(PARAMS, rope="rowcol", text_share=0.25, checkpoint_every=every)
        quick = quick_pass_bytes(PARAMS, text_share=0.25, precision="fp32", checkpoint_every=every)
        assert quick.of(4096) == pytest.approx(traced.of(4096), rel=0.1)


def test_adapters_need_less() -> None:
    part = TrainedPart(depth=6, targets=("attn.qkv", "blocks.*.mlp.*"), rank=4)
    parameters = parameters_of(PARAMS, limit=part)
    trained = {name: each.shape for name, each in parameters.items() if each.trained}
    width, hidden = 1152, 4 * 1152 * 2 // 3
    assert sum(map(math.prod, trained.values())) == 6 * 4 * (4 * width + 3 * (width + hidden))
    assert all("lora_" in name for name in trained)
    everywhere = parameters_of(
        {**PARAMS, "z_dim": 16, "encoder_depth": 1}, limit=TrainedPart(depth=6, targets=("*",), rank=4, alignment=True)
    )
    assert {name for name, each in everywhere.items() if each.trained and "lora_" not in name} == {
        name for name in everywhere if name.startswith("projector.")
    }
    whole, limited = (pass_bytes(PARAMS, rope="rowcol", text_share=0.25, limit=limit) for limit in (None, part))
    assert 0.3 * whole.of(4096) < limited.of(4096) < 0.95 * whole.of(4096)
    frozen = parameters_of(PARAMS, limit=TrainedPart(depth=6, freeze=("blocks.*", "x_embedder.*", "blocks.0.mlp.*")))
    assert not any(each.trained for name, each in frozen.items() if name.startswith(("blocks.", "x_embedder.")))
    assert all(each.trained for name, each in frozen.items() if name.startswith(("t_embedder.", "final_layer.")))


def facts_of(**changes: Any) -> RunFacts:
    settings: dict[str, Any] = {"zero_optimization": {"reduce_bucket_size": 1000}}
    given: dict[str, Any] = {"matrices": frozenset(), "optimizer": "adamw", "averages": 1, "ranks": 4, "packs": 2, "tokens": 100}
    return RunFacts(parameters=parameters_of(PARAMS), settings=settings, **{**given, **changes})


def test_stages_share_what_they_should() -> None:
    activations = Activations(PassBytes((Line(0.0, 1e6),)), None, None)
    total = facts_of().total
    parts = [step_memory(facts_of(), activations, stage=stage).parts for stage in (0, 1, 2, 3)]
    assert [each["moments"] for each in parts] == [8 * total, 2 * total, 2 * total, 2 * total]
    assert [each["gradients"] for each in parts] == [4 * total, 4 * total, total, total]
    assert [each["weights"] for each in parts] == [4 * total, 5 * total, 5 * total, 2 * total]
    assert {each["averages"] for each in parts} == {total}
    assert "averages" not in step_memory(facts_of(averages=0), activations, stage=2).parts
    eight = step_memory(facts_of(optimizer="adamw8bit"), activations, stage=1).parts["moments"]
    assert 2 * total / 4 < eight < 2.3 * total / 4
    fits = largest_pack(facts_of(), activations, stage=2, available=4e9)
    assert step_memory(facts_of(), activations, stage=2, tokens=fits).peak <= 4e9
    assert step_memory(facts_of(), activations, stage=2, tokens=fits + 1).peak > 4e9


def test_a_run_that_does_not_fit_is_told_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("t2i-xl-1")
    situation = Situation(ranks=1, device=find_device("4090"), quick=True)
    setting = setting_of(config, situation, work=work_of(config, situation))
    assert not setting.fits
    small = load_config("t2i-xl-1", overrides=["train.checkpointing=full", "train.optimizer=adamw8bit", "train.ema_device=cpu"])
    cached = Situation(ranks=8, device=find_device("4090"), cached=True, quick=True)
    assert setting_of(small, cached, work=work_of(small, cached)).fits


def test_the_codec_takes_what_its_tiling_takes() -> None:
    def work(*options: str) -> float:
        return frozen_memory(load_config("t2i-native", overrides=options), cached=False, tokens=1024, images=4).work

    unlimited = work()
    assert unlimited == codecs.without_weights("dc-ae").plan_tiling(1024, 1024, "encode").bytes
    assert work("codec.memory_gb=2") <= 2e9 < unlimited


def test_planned_steps_are_those_of_the_corpus(tmp_path: Path, config: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", shards=[[Sample(32, 32, ("a",))] * 6])
    arguments: dict[str, Any] = {"ranks": 2, "trained_share": 1.0, "checkpointed_share": 0.0}
    planned = planned_work(load_config(config, overrides=[f"corpus={corpus.path}"]), **arguments)
    limits = planned_work(load_config(config), **arguments)
    assert planned.tokens == 16 * planned.images  # images of 32 × 32 pixels in patches of 8
    assert planned.source.startswith("the plan of")
    assert limits.source.startswith("plan.* limits")
    twice = planned_work(load_config(config, overrides=["train.steps=20"]), **arguments)
    assert twice.flops == pytest.approx(2 * limits.flops)
    staged: Config = load_config(config, overrides=["plan.schedule=[{step: 5, max_tokens: 16}]"])
    assert planned_work(staged, **arguments).images == (limits.images + 4 * limits.images) / 2
