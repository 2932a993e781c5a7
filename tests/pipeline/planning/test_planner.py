from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.corpus.corpus import Corpus
from pipeline.packing.rank_assignment import assign_to_ranks, step_makespan
from pipeline.planned_steps import Pack, Step
from pipeline.planning.plan_changes import PlanChangedError
from pipeline.planning.planner import CONSISTENCY, DIFFUSION, TRANSITION, PlanConfig, Planner
from pipeline.planning.summary import plan_summary
from pipeline.size_rule import SizeRule, target_size
from pipeline.streams.corpus_view import CorpusView
from pipeline.streams.size_only_corpus import SizeCorpus
from tests.pipeline.conftest import Sample, write_corpus


@dataclass(frozen=True)
class Case:
    """A corpus, given by the sizes and numbers of captions of its samples in each shard, and how to plan it."""

    shards: list[list[tuple[int, int, int]]]
    plan: PlanConfig
    seed: int
    shares: tuple[float, float]
    caption_dropout: float

    def write(self, folder: str) -> Corpus:
        shards = [[Sample(height, width, tuple("abcd"[:captions]), 3) for height, width, captions in shard] for shard in self.shards]
        return write_corpus(Path(folder), shards=shards, images=False)

    @property
    def rule(self) -> SizeRule:
        limits = self.plan.model_dump(include={"stride", "max_tokens", "max_pixels", "min_tokens", "max_aspect", "fit"})
        return SizeRule(**limits)

    def planner(self, *corpora: Corpus) -> Planner:
        diffusion, consistency = self.shares
        return Planner(
            corpora,
            plan=self.plan,
            seed=self.seed,
            width=64,
            diffusion_share=diffusion,
            consistency_share=consistency,
            caption_dropout=self.caption_dropout,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    samples = st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(0, 4))
    shards = draw(st.lists(st.lists(samples, min_size=1, max_size=25), min_size=1, max_size=5))
    max_tokens = draw(st.integers(1, 80))
    groups = draw(st.integers(1, min(3, len(shards))))
    plan = PlanConfig(
        stride=draw(st.sampled_from([4, 16])),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(1, 3 if max_tokens >= 9 else 1)),
        max_aspect=draw(st.sampled_from([3.0, 8.0])),
        fit=draw(st.sampled_from(["crop", "squash"])),
        tokens_per_pack=max_tokens * draw(st.integers(1, 5)),
        packs_per_step=groups * draw(st.integers(1, 6 // groups)),
        window=draw(st.integers(1, 3)),
        groups=groups,
        flip=draw(st.sampled_from([0.0, 0.5])),
    )
    for shard in shards[:groups]:
        shard.append((64, 64, 1))  # one sample at least is kept
    return Case(
        shards=shards,
        plan=plan,
        seed=draw(st.integers(0, 2**63)),
        shares=draw(st.sampled_from([(0.5, 0.1), (0.0, 0.0), (1.0, 0.0), (0.3, 0.7)])),
        caption_dropout=draw(st.sampled_from([0.0, 0.3])),
    )


def contents(step: Step) -> list[Any]:
    return [[(sample, pack.tokens, pack.cost) for sample in pack.samples] for pack in step.packs]


with_tables = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@with_tables
@given(case=cases())
def test_every_kept_sample_once_per_epoch_and_no_pack_over_its_limits(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        planner = case.planner(case.write(folder))
        kept = {
            f"corpus/{shard:06d}{row:04d}"
            for shard, samples in enumerate(case.shards)
            for row, (height, width, _) in enumerate(samples)
            if not target_size(height, width=width, rule=case.rule).left_out
        }
        assert planner.sample_counts["samples"] == len(kept)
        seen: dict[int, Counter[str]] = {}
        for index in range(500):
            step = planner.next_step()
            assert (step.index, len(step.packs)) == (index, case.plan.packs_per_step)
            for pack in step.packs:
                assert pack.tokens == sum(sample.tokens for sample in pack.samples) <= case.plan.tokens_per_pack
                assert pack.cost == pytest.approx(sum(sample.cost for sample in pack.samples))
            for sample in (sample for pack in step.packs for sample in pack.samples):
                seen.setdefault(sample.visit, Counter())[sample.id] += 1
            check_draws(step, case=case)
            carried = [sample for group in planner.state_dict()["groups"] for sample in group["carried"]]
            assert max((waited for *_, waited in carried), default=0) <= 8
            if len(seen.get(0, ())) == len(seen.get(1, ())) == len(kept):
                break
        else:
            pytest.fail("two epochs did not end")
        assert seen[0] == seen[1] == Counter(kept)
        assert all(counted.total() == len(counted) for counted in seen.values())


def by_group(step: Step) -> list[tuple[Pack, ...]]:
    size = len(step.packs) // step.groups
    return [step.packs[first : first + size] for first in range(0, len(step.packs), size)]


def check_draws(step: Step, *, case: Case) -> None:
    for packs in by_group(step):
        samples = [sample for pack in packs for sample in pack.samples]
        kinds = Counter(sample.kind for sample in samples)
        assert kinds[DIFFUSION] == int(case.shares[0] * len(samples) + 0.5)
        assert kinds[CONSISTENCY] == min(int(case.shares[1] * len(samples) + 0.5), len(samples) - kinds[DIFFUSION])
        assert kinds[TRANSITION] == len(samples) - kinds[DIFFUSION] - kinds[CONSISTENCY]
    samples = [sample for pack in step.packs for sample in pack.samples]
    assert step.images == len(samples) > 0
    for sample in samples:
        height, width, captions = case.shards[sample.shard][sample.row]
        target = target_size(height, width=width, rule=case.rule)
        assert (sample.resize, sample.height, sample.width, sample.tokens) == (target.resize, target.height, target.width, target.tokens)
        assert -1 <= sample.caption < max(captions, 1)
        assert sample.label == (-1 if sample.caption < 0 else 3)
        assert case.caption_dropout or sample.caption >= 0
        assert case.plan.flip or not sample.flip


@with_tables
@given(case=cases(), steps=st.integers(0, 6))
def test_resume_at_any_step_equals_the_unbroken_plan(case: Case, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = case.write(folder)
        unbroken = case.planner(corpus)
        for _ in range(steps):
            unbroken.next_step()
        saved = json.dumps(unbroken.state_dict())
        assert len(saved) < 100_000
        resumed = case.planner(Corpus.open(corpus.path))
        resumed.load_state_dict(json.loads(saved))
        for _ in range(4):
            assert json.dumps(resumed.state_dict()) == json.dumps(unbroken.state_dict())
            assert contents(resumed.next_step()) == contents(unbroken.next_step())


@with_tables
@given(case=cases(), resume_after=st.integers(0, 2))
def test_every_number_of_ranks_shares_the_same_steps_also_after_another_has_begun(case: Case, resume_after: int) -> None:
    """The planner, and so its state, knows of no ranks: whoever deals its steps deals the same samples with the same draws."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = case.write(folder)
        planner, resumed = case.planner(corpus), case.planner(corpus)
        for _ in range(resume_after):
            planner.next_step()
        resumed.load_state_dict(planner.state_dict())
        for _ in range(2):
            expected, step = drawn(planner.next_step().packs), resumed.next_step()
            for ranks, lockstep in itertools.product((1, 2, 8, 64), (False, True)):
                rank_packs = assign_to_ranks(step, ranks=ranks, lockstep=lockstep)
                packs = [pack for hand in rank_packs for pack in hand]
                assert drawn(packs) == expected
                assert {len(hand) for hand in rank_packs} == {-(-case.plan.packs_per_step // ranks)}
                assert max(pack.tokens for pack in packs) <= case.plan.tokens_per_pack
                if ranks % step.groups == 0:
                    for group, own in enumerate(np.split(np.arange(ranks), step.groups)):
                        shards = {sample.shard for rank in own for pack in rank_packs[rank] for sample in pack.samples}
                        assert {shard % step.groups for shard in shards} <= {group}


def drawn(packs: Iterable[Pack]) -> list[tuple[Any, ...]]:
    """Everything that must not depend on the number of ranks."""
    samples = [sample for pack in packs for sample in pack.samples]
    return sorted((sample.id, sample.visit, sample.kind, sample.caption, sample.flip) for sample in samples)


def small_plan(**changes: Any) -> PlanConfig:
    return PlanConfig(**{"stride": 16, "max_tokens": 64, "tokens_per_pack": 256, "packs_per_step": 4, **changes})


def make_planner(*corpora: Corpus | CorpusView, seed: int = 0, **changes: Any) -> Planner:
    return Planner(corpora, plan=small_plan(**changes), seed=seed, width=64, diffusion_share=0.5, consistency_share=0.1)


def random_corpus(folder: Path, *, shards: int, samples: int, name: str = "corpus") -> Corpus:
    random = np.random.default_rng(len(name))
    sizes = random.lognormal(np.log(100), 0.4, (shards, samples, 2)).astype(int) + 16
    return write_corpus(folder, shards=[[Sample(h, w, ("a",)) for h, w in shard] for shard in sizes.tolist()], images=False, name=name)


def test_packs_are_full_and_balanced(tmp_path: Path) -> None:
    planner = make_planner(random_corpus(tmp_path, shards=4, samples=400), packs_per_step=8)
    steps = [planner.next_step() for _ in range(60)]
    costs = np.array([[pack.cost for pack in step.packs] for step in steps])
    assert np.mean([step.fill for step in steps]) > 0.97
    assert (costs.mean(axis=1) / costs.max(axis=1)).mean() > 0.97


def test_large_images_fill_packs_too(tmp_path: Path) -> None:
    planner = make_planner(random_corpus(tmp_path, shards=4, samples=400), max_tokens=256)
    steps = [planner.next_step() for _ in range(30)]
    assert np.mean([step.fill for step in steps]) > 0.9


def test_a_state_stays_small_where_hardly_anything_fits() -> None:
    """Of images of just over half a pack as many would be left over as are packed."""
    sides = np.full(10_000, 184)
    corpus = SizeCorpus(name="sizes", digest="", count=len(sides), sizes=lambda first, last: (sides[first:last], sides[first:last]))
    settings: Any = {"packs_per_step": 1500, "tokens_per_pack": 240, "max_tokens": 240}
    planner = make_planner(corpus, **settings)
    seen: Counter[tuple[str, int]] = Counter()
    state: dict[str, Any] = {}
    for _ in range(4):
        step = planner.next_step()
        seen.update((sample.id, sample.visit) for pack in step.packs for sample in pack.samples)
        state = planner.state_dict()
        assert len(state["groups"][0]["carried"]) <= 1000
        assert len(json.dumps(state)) < 100_000
    assert max(seen.values()) == 1
    again = make_planner(corpus, **settings)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.next_step().ids == planner.next_step().ids


def test_a_corpus_smaller_than_a_step_is_repeated_and_fills_it(tmp_path: Path) -> None:
    planner = make_planner(write_corpus(tmp_path, shards=[[Sample(32, 32, ("a",)), Sample(48, 32, ("b",))]], images=False))
    step = planner.next_step()
    assert step.fill > 0.97
    visits = Counter((sample.id, sample.visit) for pack in step.packs for sample in pack.samples)
    assert max(visits.values()) == 1
    assert {visit for _, visit in visits} >= set(range(step.images // 2 - 20))


def test_epochs_are_shuffled_anew_and_seeds_differ(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path, shards=8, samples=20)
    first, again, other = (make_planner(corpus, seed=seed, window=2) for seed in (0, 0, 1))
    plans = [[step.ids for step in (planner.next_step() for _ in range(30))] for planner in (first, again, other)]
    assert plans[0] == plans[1] != plans[2]
    of_visit: dict[int, list[str]] = {}
    for step in (other.next_step() for _ in range(30)):
        for sample in (sample for pack in step.packs for sample in pack.samples):
            of_visit.setdefault(sample.visit, []).append(sample.id)
    last = max(of_visit)
    assert of_visit[last - 1][:40] != of_visit[last - 2][:40]


def test_a_window_bounds_what_is_open(tmp_path: Path) -> None:
    """Samples of one step come from the shards of one window, or two where it ends: memory does not grow with the corpus."""
    planner = make_planner(random_corpus(tmp_path, shards=12, samples=60), window=3)
    for _ in range(30):
        samples = [sample for pack in planner.next_step().packs for sample in pack.samples]
        assert len({(sample.shard, sample.visit) for sample in samples}) <= 6


def test_groups_of_shards_keep_as_busy_and_each_has_its_own(tmp_path: Path) -> None:
    """Eight ranks on four nodes: a node reads a quarter of the shards, the same in every epoch."""
    corpus = random_corpus(tmp_path, shards=16, samples=60)
    planner = make_planner(corpus, packs_per_step=32, groups=4)
    read: dict[int, set[int]] = {}
    used, waited = 0.0, 0.0
    for _ in range(20):
        step = planner.next_step()
        rank_packs = assign_to_ranks(step, ranks=8, lockstep=True)
        used, waited = used + step.cost, waited + 8 * step_makespan(rank_packs, lockstep=True)
        for rank, hand in enumerate(rank_packs):
            read.setdefault(rank // 2, set()).update(sample.shard for pack in hand for sample in pack.samples)
    assert read == {group: set(range(group, 16, 4)) for group in range(4)}
    assert used / waited > 0.95
    summary = plan_summary(planner, steps=1, ranks=6)
    assert (summary["groups"], summary["groups_apart"]) == (4, 2)


def test_impossible_groups(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path, shards=3, samples=20)
    with pytest.raises(ValueError, match=r"plan\.packs_per_step 6 is not a multiple of plan\.groups 4"):
        small_plan(packs_per_step=6, groups=4)
    with pytest.raises(ValueError, match=r"plan\.schedule\.0\.packs_per_step 6 is not a multiple of plan\.groups 4"):
        small_plan(packs_per_step=8, groups=4, schedule=[{"step": 1, "packs_per_step": 6}])
    with pytest.raises(ValueError, match=r"corpus corpus has 3 shards, fewer than plan\.groups 4"):
        make_planner(corpus, groups=4)
    with pytest.raises(ValueError, match="corpus corpus has 1 samples by its cap"):
        make_planner(CorpusView(corpus, cap=1), groups=2)


def test_several_corpora_are_mixed_by_size(tmp_path: Path) -> None:
    corpora = [random_corpus(tmp_path / name, shards=count, samples=100, name=name) for name, count in (("photos", 6), ("art", 2))]
    planner = make_planner(*corpora, window=8)
    seen = Counter(sample.id.split("/")[0] for _ in range(10) for pack in planner.next_step().packs for sample in pack.samples)
    assert 0.65 < seen["photos"] / seen.total() < 0.85
    with pytest.raises(ValueError, match="two corpora are named 'photos'"):
        make_planner(corpora[0], corpora[0])


def test_a_state_of_another_plan_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "one", shards=1, samples=20)
    state = make_planner(corpus).state_dict()
    with pytest.raises(PlanChangedError, match=r"plan\.max_tokens was 64 and is 32, seed was 0 and is 1; "):
        make_planner(corpus, seed=1, max_tokens=32).load_state_dict(state)
    grown, other = (random_corpus(tmp_path / name, shards=1, samples=count, name=name) for name, count in (("corpus", 23), ("other", 4)))
    with pytest.raises(PlanChangedError, match="corpus corpus: had 20 samples and has 23, 3 added; "):
        make_planner(grown).load_state_dict(state)
    with pytest.raises(PlanChangedError, match="corpus corpus: was in the saved plan and is missing, corpus other: is new, 4 samples; "):
        make_planner(other).load_state_dict(state)
    with pytest.raises(PlanChangedError, match="their order was corpus, other and is other, corpus; "):
        make_planner(other, corpus).load_state_dict(make_planner(corpus, other).state_dict())
    with pytest.raises(PlanChangedError, match=r"plan\.schedule was \[\] and is \[\{step: 3, max_tokens: 32\}\]; "):
        make_planner(corpus, schedule=[{"step": 3, "max_tokens": 32}]).load_state_dict(state)
    pq.write_table(pa.table({"key": ["0000000001", "0000000003"]}), tmp_path / "out.parquet")
    with pytest.raises(PlanChangedError, match="corpus corpus: cap was None and is 5, corpus corpus: exclude had no keys and has 2; "):
        make_planner(CorpusView(corpus, cap=5, exclude=tmp_path / "out.parquet")).load_state_dict(state)
    with pytest.raises(ValueError, match="format 4"):
        make_planner(corpus).load_state_dict({**state, "format": 4})


@with_tables
@given(case=cases(), changed=cases(), steps=st.integers(0, 4))
def test_planning_anew_repeats_no_draw_and_resumes_exactly(case: Case, changed: Case, steps: int) -> None:
    """Whatever plan follows whatever other: its steps go on counting, it draws nothing twice, and from its own states it resumes."""

    def visits(planned: Iterable[Step]) -> list[tuple[str, int]]:
        return [(sample.id, sample.visit) for step in planned for pack in step.packs for sample in pack.samples]

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        planner = case.planner(case.write(one))
        before = [planner.next_step() for _ in range(steps)]
        state = json.loads(json.dumps(planner.state_dict()))
        corpus = changed.write(other)
        anew, again, resumed = (changed.planner(corpus) for _ in range(3))
        anew.replan(state)
        again.replan(state)
        after = [anew.next_step() for _ in range(3)]
        assert [step.index for step in after] == [steps, steps + 1, steps + 2]
        assert len(set(visits(before + after))) == len(visits(before + after))
        assert [contents(again.next_step())] == [contents(after[0])]
        resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
        assert [contents(resumed.next_step()) for _ in range(2)] == [contents(step) for step in after[1:]]


def test_impossible_plans(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, shards=[[Sample(20, 200, ("a",)), Sample(8, 8, ("b",))]], images=False)
    with pytest.raises(ValueError, match=r"plan\.max_tokens 512 is more than plan\.tokens_per_pack 256"):
        small_plan(max_tokens=512)
    with pytest.raises(ValueError, match=r"plan\.min_tokens 65 is more than plan\.max_tokens 64"):
        small_plan(min_tokens=65)
    with pytest.raises(ValueError, match="no corpus is given"):
        make_planner()
    with pytest.raises(ValueError, match=r"plan\.stride is not set"):
        make_planner(corpus, stride=None)
    with pytest.raises(ValueError, match="diffusion_share"):
        Planner([corpus], plan=small_plan(), seed=0, width=64, diffusion_share=0.8, consistency_share=0.3)
    planner = make_planner(corpus)
    assert planner.sample_counts["left_out"] == {"aspect": 1, "too-small": 1}
    with pytest.raises(ValueError, match="leaves out every sample"):
        planner.next_step()
