"""Images that are kept for validation: never planned, counted as left out, the same for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.corpus.corpus import Corpus
from pipeline.loading.loader import Loader
from pipeline.planning.plan_changes import PlanChangedError
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.planning.validation_plan import ValidationPlan
from pipeline.streams.corpus_view import CorpusView
from tests.pipeline.conftest import varied, write_corpus

PLAN = PlanConfig(stride=8, max_tokens=40, tokens_per_pack=100, packs_per_step=3)


@pytest.fixture
def large(tmp_path: Path) -> Corpus:
    samples = varied(120, seed=3)
    return write_corpus(tmp_path / "large", shards=[samples[first : first + 30] for first in range(0, 120, 30)])


def planner(corpus: Corpus, share: float | None, **settings: Any) -> Planner:
    view = CorpusView(corpus, validation_share=share, **settings)
    return Planner([view], plan=PLAN, seed=7, width=64, diffusion_share=0.5, consistency_share=0.1)


def validation(view: CorpusView, *, images: int = 1000, ranks: int = 1, plan: PlanConfig = PLAN) -> ValidationPlan:
    return ValidationPlan([view.held_out()], plan=plan, width=64, images=images, ranks=ranks)


def ids(plan: ValidationPlan) -> list[str]:
    return [id for pack in plan.packs for id in pack.ids]


def test_the_split_is_left_out_of_the_plan_and_counted(large: Corpus) -> None:
    training = planner(large, 0.2, where="width > 20")
    counts = training.sample_counts
    held_out = set(ids(validation(training.sources[0])))
    assert len(held_out) == counts["left_out"]["validation"] > 10
    assert counts["rows"] == 120 == counts["samples"] + sum(counts["left_out"].values())
    assert counts["left_out"]["where"] == planner(large, None, where="width > 20").sample_counts["left_out"]["where"]
    planned = {id for _ in range(20) for id in training.next_step().ids}
    assert len(planned) == counts["samples"]
    assert not planned & held_out


def test_a_larger_share_keeps_the_images_of_a_smaller_one(large: Corpus) -> None:
    smaller, larger = (set(ids(validation(CorpusView(large, validation_share=share)))) for share in (0.1, 0.4))
    assert smaller < larger


def test_the_packs_do_not_depend_on_ranks_and_every_rank_gets_as_many(large: Corpus) -> None:
    view = CorpusView(large, validation_share=0.3)
    alone = validation(view)
    for ranks in (2, 4):
        plan = validation(view, ranks=ranks)
        assert [pack.ids for pack in plan.packs] == [pack.ids for pack in alone.packs]
        loaders = [Loader(plan, seed=0, rank=rank, world_size=ranks, channels=3, factor=1, workers=0) for rank in range(ranks)]
        seen: list[str] = []
        for loader in loaders:
            loader.load_state_dict({"step": 0})
            steps = iter(loader)
            batches = [batch for _ in range(plan.steps) for batch in next(steps).batches]
            assert len(batches) == plan.steps
            seen += [id for batch in batches for id in batch.ids if id]
            loader.close()
        assert sorted(seen) == sorted(ids(alone))
    assert all(pack.tokens <= PLAN.tokens_per_pack for pack in alone.packs)
    assert len(alone.packs) <= alone.images * PLAN.max_tokens / PLAN.tokens_per_pack + 1


def test_few_images_are_taken_from_few_shards(large: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = Corpus.read

    def counted(self: Corpus, shard: int, *, columns: Any) -> Any:
        read.append(shard)
        return whole(self, shard, columns=columns)

    view = CorpusView(large, validation_share=0.3)
    every = ids(validation(view))
    monkeypatch.setattr(Corpus, "read", counted)
    few = validation(view, images=5)
    assert few.images == 5
    assert len(read) == 1
    assert set(ids(few)) < set(every)


def test_images_have_their_first_caption_and_are_not_mirrored(large: Corpus) -> None:
    plan = validation(CorpusView(large, validation_share=0.3), plan=PLAN.model_copy(update={"flip": 1.0}))
    samples = [sample for pack in plan.packs for sample in pack.samples]
    assert {(sample.caption, sample.flip, sample.visit) for sample in samples} == {(0, False, 0)}
    assert np.unique([sample.id for sample in samples]).size == plan.images


def test_a_split_of_nothing_is_an_error(large: Corpus) -> None:
    with pytest.raises(ValueError, match=r"none of the 120 samples of corpus is selected: raise validation\.share"):
        validation(CorpusView(large, validation_share=1e-6))


def test_another_share_is_another_plan_and_none_is_the_plan_of_before(large: Corpus) -> None:
    before = Planner([large], plan=PLAN, seed=7, width=64, diffusion_share=0.5, consistency_share=0.1).state_dict()
    assert planner(large, None).changes_since(before) == []
    with pytest.raises(PlanChangedError, match=r"corpus corpus: validation\.share was None and is 0.2"):
        planner(large, 0.2).load_state_dict(before)
    assert [str(change) for change in planner(large, 0.3).changes_since(planner(large, 0.2).state_dict())] == [
        "corpus corpus: validation.share was 0.2 and is 0.3"
    ]
