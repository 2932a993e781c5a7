"""PackedDataset: the same stream for any number of workers, exact resume, ranks that share each step."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline
from pipeline.corpus.corpus import Corpus
from pipeline.loading.dataset import PackedBatch, PackedDataset
from pipeline.planning.config import PlanConfig
from tests import REPOSITORY

PLAN = PlanConfig(stride=16, max_tokens=16, tokens_per_pack=24, packs_per_step=4, flip=0.5)
COUNT = 22  # packs, with any split of a step among them


def packed(corpus: Corpus, **changes: Any) -> PackedDataset:
    return PackedDataset(corpus.folder, plan=PLAN, seed=7, caption_dropout=0.2, **changes)


def contents(batches: Iterable[PackedBatch]) -> list[tuple[Any, ...]]:
    """All that a training step sees of each."""
    return [
        (
            batch.step,
            batch.is_last,
            batch.step_images,
            batch.ids,
            batch.captions,
            [image.tolist() for image in batch.images],
            [noise.sum().item() for noise in batch.noise],
            batch.uniforms.tolist(),
            batch.kinds.tolist(),
        )
        for batch in batches
    ]


@pytest.fixture
def unbroken(corpus: Corpus) -> list[tuple[Any, ...]]:
    return contents(islice(packed(corpus), COUNT))


def test_the_names_at_the_top_load_no_torch_before_they_are_used() -> None:
    check = "import sys, pipeline; assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True, timeout=120)
    assert pipeline.PackedDataset is PackedDataset
    assert all(hasattr(pipeline, name) for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pipeline.Nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_packs_have_their_place_in_the_step(corpus: Corpus) -> None:
    batches = list(islice(packed(corpus), 8))
    assert [batch.step for batch in batches] == [0] * 4 + [1] * 4
    assert [batch.is_last for batch in batches] == ([False] * 3 + [True]) * 2
    assert all(batch.step_images == sum(len(each.ids) for each in batches[:4]) for batch in batches[:4])
    assert all(batch.tokens <= PLAN.tokens_per_pack for batch in batches)
    assert all(image.shape == noise.shape for batch in batches for image, noise in zip(batch.images, batch.noise, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_stream_is_the_same_for_any_number_of_workers(workers: int, corpus: Corpus, unbroken: list[tuple[Any, ...]]) -> None:
    loader = DataLoader(packed(corpus), batch_size=None, num_workers=workers)
    assert contents(islice(loader, COUNT)) == unbroken


@pytest.mark.parametrize(("workers", "taken"), [(0, 7), (2, 7), (2, 4)])
def test_a_stateful_loader_resumes_exactly(workers: int, taken: int, corpus: Corpus, unbroken: list[tuple[Any, ...]]) -> None:
    """Between two steps and within one, twice in a row."""
    batches: list[tuple[Any, ...]] = []
    state: dict[str, Any] = {}
    for _ in range(2):
        loader = StatefulDataLoader(packed(corpus), batch_size=None, num_workers=workers)
        loader.load_state_dict(state)  # an empty one is none
        batches += contents(islice(loader, taken))
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    loader = StatefulDataLoader(packed(corpus), batch_size=None, num_workers=workers)
    loader.load_state_dict(state)
    batches += contents(islice(loader, COUNT - 2 * taken))
    assert batches == unbroken


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_the_state_of_a_batch_continues_with_other_workers(
    before: int, after: int, corpus: Corpus, unbroken: list[tuple[Any, ...]]
) -> None:
    first = list(islice(DataLoader(packed(corpus), batch_size=None, num_workers=before), 6))
    resumed = packed(corpus)
    resumed.load_state_dict(first[-1].state)
    rest = islice(DataLoader(resumed, batch_size=None, num_workers=after), COUNT - 6)
    assert contents([*first, *rest]) == unbroken


def test_without_workers_the_data_set_has_its_own_state(corpus: Corpus, unbroken: list[tuple[Any, ...]]) -> None:
    dataset = packed(corpus)
    batches = list(islice(dataset, 5))
    assert dataset.state_dict()["plan"] == batches[-1].state["plan"]
    resumed = pickle.loads(pickle.dumps(dataset))
    resumed.load_state_dict(dataset.state_dict())
    assert contents([*batches, *islice(resumed, COUNT - 5)]) == unbroken


@pytest.mark.parametrize("lockstep", [False, True])
def test_ranks_share_each_step(lockstep: bool, corpus: Corpus) -> None:
    whole = list(islice(packed(corpus), 8))
    shares = [list(islice(packed(corpus, rank=rank, world_size=2, lockstep=lockstep), 4)) for rank in range(2)]
    assert [[batch.is_last for batch in share] for share in shares] == [[False, True] * 2] * 2
    for step in range(2):
        ids = sorted(id for share in shares for batch in share if batch.step == step for id in batch.ids)
        assert ids == sorted(id for batch in whole if batch.step == step for id in batch.ids)
    assert shares[0][2].state == shares[1][2].state


def test_ranks_may_change_between_steps_only(corpus: Corpus, unbroken: list[tuple[Any, ...]]) -> None:
    within, between = [batch.state for batch in islice(packed(corpus, rank=1, world_size=2), 2)]
    alone = packed(corpus)
    with pytest.raises(ValueError, match="within a step of 2 ranks, and there are 1: use as many"):
        alone.load_state_dict(within)
    alone.load_state_dict(between)
    assert contents(islice(alone, 4)) == unbroken[4:8]


def test_states_of_other_plans_and_other_workers_are_refused(corpus: Corpus) -> None:
    dataset = packed(corpus)
    state = dataset.state_dict()
    with pytest.raises(ValueError, match="seed"):
        PackedDataset(corpus, plan=PLAN, seed=8, caption_dropout=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="of format 2, this version of tim reads format 1"):
        dataset.load_state_dict({**state, "format": 2})
    dataset.load_state_dict({**state, "workers": 3, "skip": 2})
    with pytest.raises(ValueError, match="saved by one of 3 workers, and there are 1"):
        next(iter(dataset))


def test_impossible_arguments_are_refused_at_once(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        packed(corpus, rank=2, world_size=2)
    with pytest.raises(ValueError, match="is not a corpus"):
        PackedDataset(tmp_path / "nothing", plan=PLAN)


def test_a_batch_travels_in_few_tensors(corpus: Corpus) -> None:
    batch = next(batch for batch in packed(corpus) if len(batch.ids) > 2)
    joined = batch.__reduce__()[1][0]
    assert isinstance(joined["images"].flat, torch.Tensor)
    assert contents([pickle.loads(pickle.dumps(batch))]) == contents([batch])
    assert pickle.loads(pickle.dumps(batch)).images[0].stride() == batch.images[0].stride()
