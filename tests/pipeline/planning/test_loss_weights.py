"""Loss weights of corpora: in batches, saved states and exported plans, and in nothing that decides what a step holds."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.corpus.corpus import Corpus
from pipeline.loading.dataset import PackedDataset
from pipeline.loading.loader import Batch, Loader
from pipeline.planning.config import PlanConfig
from pipeline.planning.export import export_buckets, export_steps
from pipeline.planning.planner import Planner
from pipeline.streams.corpus_view import CorpusView
from tests.pipeline.conftest import varied, write_corpus

PLAN = PlanConfig(stride=8, max_tokens=36, tokens_per_pack=144, packs_per_step=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("subject", "others")):
        write_corpus(tmp_path / name, shards=[varied(10, seed=seed)], name=name)
    return tmp_path


def make_planner(folder: Path, loss_weight: float) -> Planner:
    views = [CorpusView(Corpus.open(folder / "subject")), CorpusView(Corpus.open(folder / "others"), loss_weight=loss_weight)]
    return Planner(views, plan=PLAN, seed=2, width=32, diffusion_share=0.5, consistency_share=0.1)


def batches(planner: Planner) -> list[Batch]:
    loader = Loader(planner, seed=2, channels=3, factor=1, workers=0)
    return [batch for step in islice(iter(loader), 3) for batch in step.batches]


def test_a_loss_weight_is_in_the_weights_of_a_batch_and_changes_nothing_else(folder: Path) -> None:
    plain, weighted = batches(make_planner(folder, 1.0)), batches(make_planner(folder, 0.25))
    seen = set()
    for one, other in zip(plain, weighted, strict=True):
        assert one.ids == other.ids
        assert all(map(torch.equal, one.images + one.noise, other.images + other.noise))
        assert torch.equal(one.weights, torch.ones(len(one.ids)))
        assert other.weights.tolist() == [0.25 if id.startswith("others/") else 1.0 for id in other.ids]
        seen |= set(other.weights.tolist())
    assert seen == {0.25, 1.0}


def test_a_state_says_what_has_changed_and_goes_on(folder: Path) -> None:
    before = make_planner(folder, 0.5)
    before.next_step()
    state = json.loads(json.dumps(before.state_dict()))
    assert state["loss_weights"] == {"others": 0.5}
    after = make_planner(folder, 0.75)
    assert (after.changes_since(state), after.plan_hash) == ([], before.plan_hash)
    assert list(map(str, after.loss_weights_since(state))) == ["corpus others: loss_weight was 0.5 and is 0.75"]
    after.load_state_dict(state)
    assert after.next_step().ids == before.next_step().ids
    assert before.loss_weights_since(state) == []
    del state["loss_weights"]  # of an older version
    assert list(map(str, before.loss_weights_since(state))) == ["corpus others: loss_weight was 1 and is 0.5"]


def test_an_exported_plan_has_it_and_buckets_refuse_it(folder: Path) -> None:
    export_steps(make_planner(folder, 0.25), file=folder / "plan.jsonl", steps=2)
    packs = [json.loads(line) for line in (folder / "plan.jsonl").read_text().splitlines()]
    found = {(sample["id"].split("/")[0], sample["loss_weight"]) for pack in packs for sample in pack["samples"]}
    assert found == {("subject", 1.0), ("others", 0.25)}
    plan = PLAN.model_copy(update={"stride": 32})
    planner = Planner(
        [CorpusView(Corpus.open(folder / "others"), loss_weight=0.5)], plan=plan, seed=2, width=32, diffusion_share=1, consistency_share=0
    )
    with pytest.raises(ValueError, match="corpus others: the official code weights every sample alike, leave out loss_weight"):
        export_buckets(planner, folder=folder / "buckets")


def test_loops_of_others_get_it_and_zero_is_refused(folder: Path) -> None:
    view = CorpusView(Corpus.open(folder / "others"), loss_weight=0.5)
    batch = next(iter(PackedDataset(view, plan=PLAN)))
    assert batch.weights.tolist() == [0.5] * len(batch.ids)
    with pytest.raises(ValueError, match="corpus others: loss_weight 0 must be above 0"):
        CorpusView(Corpus.open(folder / "others"), loss_weight=0)
