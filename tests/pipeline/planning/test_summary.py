from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.planning.planner import PlanConfig, Planner
from pipeline.planning.summary import plan_summary
from tests.pipeline.conftest import Sample, write_corpus


def make_planner(folder: Path, *, samples: int) -> Planner:
    sizes = [(20 + 7 * (i % 13), 20 + 5 * (i % 17)) for i in range(samples)] + [(20, 300), (7, 7)]
    corpus = write_corpus(folder, shards=[[Sample(height, width, ("a",)) for height, width in sizes]], images=False)
    plan = PlanConfig(stride=8, max_tokens=64, tokens_per_pack=512, packs_per_step=8)
    return Planner([corpus], plan=plan, seed=0, width=64, diffusion_share=0.5, consistency_share=0.1)


def test_it_says_what_the_steps_will_be_and_leaves_the_plan_where_it_was(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, samples=2000)
    planner.next_step()
    summary = plan_summary(planner, steps=5, ranks=4)
    assert json.loads(json.dumps(summary)) == summary
    steps = [planner.next_step() for _ in range(5)]
    assert [step["keys"] for step in summary["steps"]] == [[key.split("/")[1] for key in step.ids] for step in steps]
    assert [step["index"] for step in summary["steps"]] == [1, 2, 3, 4, 5]
    assert summary["samples"] == sum(step.images for step in steps)
    assert summary["epochs"] == pytest.approx(summary["samples"] / 2000)
    assert summary["left_out"] == {"aspect": 1, "too-small": 1}
    assert summary["account"]["rows"] == 2002
    assert sum(summary["account"]["tokens"].values()) == sum(summary["account"]["aspects"].values()) == 2000
    assert not summary["smaller_than_a_step"]


def test_balance_is_what_the_costs_say(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, samples=2000)
    summary = plan_summary(planner, steps=10, ranks=8)
    costs = [[pack.cost for pack in planner.next_step().packs] for _ in range(10)]
    expected = sum(map(sum, costs)) / (8 * sum(map(max, costs)))  # one pack a rank: both ways of waiting are the same
    assert summary["utilisation"] == pytest.approx(expected)
    assert summary["utilisation_lockstep"] == pytest.approx(expected)
    assert summary["utilisation"] > 0.97
    assert summary["fill"] > 0.97
    assert plan_summary(planner, steps=10, ranks=1)["utilisation"] == pytest.approx(1)


def test_ranks_that_do_not_divide_the_packs_get_more_of_them_and_it_says_so(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, samples=2000)
    summary = plan_summary(planner, steps=3, ranks=3)
    assert summary["added_packs"] == 1
    assert summary["utilisation"] > 0.97  # the samples share them
    assert plan_summary(planner, steps=3, ranks=16)["added_packs"] == 8


def test_a_small_corpus_and_no_steps(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, samples=5)
    assert plan_summary(planner, steps=1, ranks=1)["smaller_than_a_step"]
    with pytest.raises(ValueError, match="steps: 0"):
        plan_summary(planner, steps=0, ranks=1)
    with pytest.raises(ValueError, match="ranks: 0"):
        plan_summary(planner, steps=1, ranks=0)
