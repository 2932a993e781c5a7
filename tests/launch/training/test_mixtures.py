"""Mixtures and schedules as a config states them and `tim plan` shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.text_tables import describe_plan
from launch.training.planning import make_planner
from pipeline.planning.summary import plan_summary
from tests.pipeline.conftest import Sample, write_corpus

CONFIG = """
corpus:
  - {{path: {folder}/photos, weight: 3, where: "width >= 128 and height >= 64", exclude: {folder}/keys.parquet}}
  - {{path: {folder}/art, weight: 1, cap: 20}}
plan:
  max_tokens: 64
  tokens_per_pack: 256
  packs_per_step: 2
  schedule:
    - {{step: 10, max_tokens: 256, packs_per_step: 4}}
    - {{step: 20, weights: {{photos: 1, art: 1}}}}
text: {{caption_weights: [1, 2], shuffle_tags: {{keep: 1}}}}
network: {{params: {{patch_size: 16, depth: 2, hidden_size: 64, num_heads: 4}}}}
train: {{steps: 100}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, width, count in (("photos", 256, 40), ("art", 128, 30)):
        samples = [Sample(128, width, ("a", "b"))] * count + [Sample(128, 100, ("a",))] * 3
        write_corpus(tmp_path / name, shards=[samples], images=False, name=name)
    pq.write_table(pa.table({"key": ["0000000001", "0000000002"]}), tmp_path / "keys.parquet")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "run.yaml"


def test_a_plan_says_of_each_corpus_what_it_gives_and_of_the_schedule_what_changes(config: Path) -> None:
    summary = plan_summary(make_planner(load_config(config)), steps=12, ranks=2)
    assert json.loads(json.dumps(summary)) == summary
    photos, art = summary["corpora"]
    assert (photos["rows"], photos["samples"], photos["left_out"]) == (43, 38, {"where": 3, "exclude": 2})
    assert (art["rows"], art["samples"], art["left_out"]) == (33, 20, {"cap": 13})
    assert summary["left_out"] == {"where": 3, "exclude": 2, "cap": 13}
    assert photos["share"] == pytest.approx(0.75, abs=0.01)
    assert photos["planned"] + art["planned"] == summary["samples"]
    assert art["epochs"] == art["planned"] / 20
    assert [step["packs"] for step in summary["steps"]] == [2] * 10 + [4] * 2
    kinds = {"diffusion_share": 0.5, "consistency_share": 0.1}
    assert summary["schedule"] == [
        {"step": 0, "max_tokens": 64, "packs_per_step": 2, "shares": {"photos": 0.75, "art": 0.25}, **kinds},
        {"step": 10, "max_tokens": 256, "packs_per_step": 4, "shares": {"photos": 0.75, "art": 0.25}, **kinds},
        {"step": 20, "max_tokens": 256, "packs_per_step": 4, "shares": {"photos": 0.5, "art": 0.5}, **kinds},
    ]
    text = describe_plan(summary)
    assert "epochs of 38 samples; left out: where 3, exclude 2 of 43" in text
    assert (
        "from step 20  at most 256 tokens per image, 4 packs per step; photos 50.0%, art 50.0%; r = t in 50% and r = 0 in 10% of the images"
        in text
    )


@pytest.mark.parametrize(
    ("written", "wrong", "problem"),
    [
        (
            "width >= 128 and",
            "widht >= 128 and",
            "corpus photos: where 'widht >= 128 and height >= 64': there is no column widht; did you mean width",
        ),
        (
            "width >= 128 and",
            "width >== 128 and",
            "run.yaml:3: corpus.0.where: where 'width >== 128 and height >= 64' is not an expression",
        ),
        ("cap: 20", "repeats: 2", "run.yaml:4: corpus.1.repeats: weight and repeats both set"),
        ("cap: 20", "caps: 20", "run.yaml:4: corpus.1.caps: unknown key; did you mean corpus.1.cap?"),
        ("weight: 1, ", "", "corpus art has no weight, others have one: give a weight to all corpora, or to none"),
        ("keys.parquet", "kyes.parquet", "kyes.parquet: there is no such file"),
        ("max_tokens: 256, packs", "max_tokens: 512, packs", "plan.schedule.0.max_tokens 512 is more than plan.tokens_per_pack 256"),
        ("step: 20", "step: 10", "step 10 comes after step 10"),
        ("photos: 1, art: 1", "photos: 1, at: 1", "plan.schedule: weights are given to photos, at, but the corpora are photos, art"),
        ("[1, 2]", "[0, 0]", "text.caption_weights: at least one weight must be above 0"),
    ],
)
def test_mistakes_are_named_in_one_line(config: Path, written: str, wrong: str, problem: str) -> None:
    text = config.read_text()
    assert written in text
    config.write_text(text.replace(written, wrong))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make_planner(load_config(config))
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_corpus_by_its_path_alone_stays_the_simple_case(config: Path) -> None:
    planner = make_planner(load_config(config, overrides=[f"corpus={config.parent / 'art'}", "plan.schedule=[]"]))
    assert planner.sample_counts["samples"] == 33
    (stage,) = planner.stages
    assert (stage["step"], stage["shares"]) == (0, {"art": 1.0})
    with pytest.raises(ConfigError, match="input should be greater than 0"):
        load_config(config, overrides=["corpus=[{path: x, repeats: 0}]"])
