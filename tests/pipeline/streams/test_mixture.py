from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.corpus.corpus import Corpus
from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION
from pipeline.planned_steps import Step
from pipeline.planning.config import PlanConfig, Stage
from pipeline.planning.planner import Planner
from pipeline.size_rule import target_size
from pipeline.streams.corpus_view import CorpusView
from pipeline.streams.mixture import mixture_shares, next_slots
from tests.pipeline.conftest import Sample, write_corpus

SHARES = (0.5, 0.1)  # of images with r = t and with r = 0
with_tables = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(shares=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any), cuts=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_after_any_number_of_slots_each_has_its_share_to_within_one(shares: list[int], cuts: list[int]) -> None:
    mixed = [0] * len(shares)
    whose: list[int] = []
    for slots in cuts:
        whose += next_slots(shares, mixed=mixed, slots=slots).tolist()
        mixed = [whose.count(i) for i in range(len(shares))]
    had = np.cumsum(np.eye(len(shares), dtype=int)[whose], axis=0)
    due = np.arange(1, len(whose) + 1)[:, None] * np.array(shares)
    assert (np.abs(had * sum(shares) - due) < sum(shares)).all()
    assert whose == next_slots(shares, mixed=[0] * len(shares), slots=len(whose)).tolist()


@dataclass(frozen=True)
class Part:
    """A corpus given by the sizes of its samples in each shard, and how it is used."""

    shards: list[list[tuple[int, int]]]
    weight: float | None
    cap: int | None
    where: str | None
    excluded: list[str]

    def open(self, folder: Path) -> CorpusView:
        """Written only once."""
        if not folder.exists():
            shards = [[Sample(height, width, ("a", "b")) for height, width in shard] for shard in self.shards]
            write_corpus(folder, shards=shards, images=False, name=folder.name)
            pq.write_table(pa.table({"key": pa.array(self.excluded, pa.string())}), folder / "exclude.parquet")
        exclude = folder / "exclude.parquet" if self.excluded else None
        return CorpusView(Corpus.open(folder), weight=self.weight, cap=self.cap, where=self.where, exclude=exclude)

    def kept(self, name: str, *, plan: PlanConfig) -> set[str]:
        rows = [(f"{s:06d}{r:04d}", *size) for s, shard in enumerate(self.shards) for r, size in enumerate(shard)]
        return {
            f"{name}/{key}"
            for key, height, width in rows
            if key not in self.excluded
            and (self.where is None or width >= 20)
            and not target_size(height, width=width, rule=plan.size_rule).left_out
        }


@dataclass(frozen=True)
class Case:
    parts: list[Part]
    plan: PlanConfig

    def planner(self, folder: str) -> Planner:
        sources = [part.open(Path(folder) / f"c{i}") for i, part in enumerate(self.parts)]
        return Planner(
            sources, plan=self.plan, seed=3, width=64, diffusion_share=SHARES[0], consistency_share=SHARES[1], caption_dropout=0.2
        )


@st.composite
def cases(draw: st.DrawFn, *, scheduled: bool) -> Case:
    sizes = st.lists(st.tuples(st.integers(8, 90), st.integers(8, 90)), min_size=1, max_size=12)
    weighted = draw(st.booleans())
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        shards = draw(st.lists(sizes, min_size=1, max_size=4))
        shards[0].append((64, 64))  # one sample at least is kept
        keys = [f"{s:06d}{r:04d}" for s, shard in enumerate(shards) for r in range(len(shard)) if (s, r) != (0, len(shards[0]) - 1)]
        parts.append(
            Part(
                shards=shards,
                weight=draw(st.sampled_from([0.3, 0.7, 2.0])) if weighted else None,
                cap=draw(st.sampled_from([None, None, 1, 5])),
                where=draw(st.sampled_from([None, "width >= 20"])),
                excluded=[key for key in keys if draw(st.integers(0, 9)) == 0],
            )
        )
    stages = []
    for step in sorted(draw(st.sets(st.integers(1, 6), max_size=2))) if scheduled else ():
        weights = {f"c{i}": draw(st.sampled_from([0.0, 1.0, 2.5])) for i in range(len(parts))} | {"c0": 1.0}
        max_tokens, packs = draw(st.sampled_from([None, 4, 30])), draw(st.sampled_from([1, 4]))
        diffusion, consistency = draw(st.sampled_from([(None, None), (1.0, 0.0), (0.25, None), (None, 0.5), (0.0, 1.0)]))
        stages.append(
            Stage(
                step=step,
                max_tokens=max_tokens,
                packs_per_step=packs,
                weights=draw(st.sampled_from([None, weights])),
                diffusion_share=diffusion,
                consistency_share=consistency,
            )
        )
    plan = PlanConfig(
        stride=8,
        max_tokens=16,
        tokens_per_pack=40,
        packs_per_step=draw(st.integers(1, 3)),
        window=draw(st.sampled_from([1, 8])),
        max_aspect=4,
        schedule=tuple(stages),
    )
    assume(all(sum(plan.kind_shares_at(stage.step, first=SHARES)) <= 1 for stage in stages))
    return Case(parts=parts, plan=plan)


def contents(step: Step) -> list[Any]:
    return [[(sample, pack.tokens, pack.cost) for sample in pack.samples] for pack in step.packs]


@with_tables
@given(case=cases(scheduled=False))
def test_every_kept_sample_once_per_visit_and_each_source_has_its_quota(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        planner = case.planner(folder)
        kept = [part.kept(f"c{i}", plan=case.plan) for i, part in enumerate(case.parts)]
        used = [len(each) if part.cap is None else min(len(each), part.cap) for each, part in zip(kept, case.parts, strict=True)]
        accounts = planner.sample_counts["corpora"]
        assert [each["samples"] for each in accounts] == used
        assert all(each["rows"] == each["samples"] + sum(each["left_out"].values()) for each in accounts)
        assert [each["left_out"].get("exclude", 0) for each in accounts] == [len(part.excluded) for part in case.parts]
        weights = [part.weight or count for part, count in zip(case.parts, used, strict=True)] if len(used) > 1 else [1]

        seen: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
        state = planner.state_dict()["groups"][0]
        for _ in range(8):
            for sample in (sample for pack in planner.next_step().packs for sample in pack.samples):
                seen[sample.corpus, sample.visit][sample.id] += 1
            state = planner.state_dict()["groups"][0]
            mixed = np.array([source["mixed"] for source in state["sources"]])
            assert (np.abs(mixed - mixed.sum() * np.array(weights) / sum(weights)) < 1 + 1e-9).all()
            planned = Counter(corpus for (corpus, _), counted in seen.items() for _ in range(counted.total()))
            planned.update(planner.shards[shard].corpus for shard, *_ in state["carried"])
            assert [planned[i] for i in range(len(used))] == mixed.tolist()
        waiting = {visit for _, _, visit, _ in state["carried"]}
        for (corpus, visit), counted in seen.items():
            assert counted.total() == len(counted) <= used[corpus]
            assert counted.keys() <= kept[corpus]
            if visit < state["sources"][corpus]["epoch"] and visit not in waiting:
                assert len(counted) == used[corpus]


@with_tables
@given(case=cases(scheduled=True), steps=st.integers(0, 7))
def test_resume_at_any_step_of_a_schedule_equals_the_unbroken_plan(case: Case, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        unbroken = case.planner(folder)
        for _ in range(steps):
            unbroken.next_step()
        saved = json.dumps(unbroken.state_dict())
        assert len(saved) < 100_000
        resumed = case.planner(folder)
        resumed.next_step()
        resumed.load_state_dict(json.loads(saved))
        for index in range(steps, steps + 4):
            assert json.dumps(resumed.state_dict()) == json.dumps(unbroken.state_dict())
            step = unbroken.next_step()
            assert contents(resumed.next_step()) == contents(step)
            now = case.plan.at(index)
            assert len(step.packs) == now.packs_per_step
            diffusion, consistency = case.plan.kind_shares_at(index, first=SHARES)
            kinds = Counter(sample.kind for pack in step.packs for sample in pack.samples)
            assert kinds[DIFFUSION] == int(diffusion * step.images + 0.5)
            assert kinds[CONSISTENCY] == min(int(consistency * step.images + 0.5), step.images - kinds[DIFFUSION])
            for sample in (sample for pack in step.packs for sample in pack.samples):
                height, width = case.parts[sample.corpus].shards[sample.shard][sample.row]
                target = target_size(height, width=width, rule=now.size_rule)
                assert (sample.height, sample.width, sample.tokens, target.left_out) == (target.height, target.width, target.tokens, "")


def make_corpus(folder: Path, *, count: int, **settings: Any) -> CorpusView:
    shards = [[Sample(32, 32, ("a",), label=i % 4) for i in range(start, min(start + 20, count))] for start in range(0, count, 20)]
    return CorpusView(write_corpus(folder, shards=shards, images=False, name=folder.name), **settings)


def make_planner(*sources: CorpusView, **changes: Any) -> Planner:
    plan = PlanConfig(**{"stride": 16, "max_tokens": 4, "tokens_per_pack": 40, "packs_per_step": 2, **changes})
    return Planner(sources, plan=plan, seed=0, width=64, diffusion_share=SHARES[0], consistency_share=SHARES[1])


def images_of(planner: Planner, *, steps: int) -> Counter[str]:
    return Counter(id.split("/")[0] for _ in range(steps) for id in planner.next_step().ids)


def test_without_weights_every_sample_is_seen_equally_often_and_repeats_multiply(tmp_path: Path) -> None:
    sources = [make_corpus(tmp_path / "a", count=40), make_corpus(tmp_path / "b", count=10, repeats=3)]
    assert images_of(make_planner(*sources), steps=7) == {"a": 80, "b": 60}
    where = CorpusView(sources[0].corpus, where="label == 1")  # 10 of the 40: shares go by what is used
    assert images_of(make_planner(where, CorpusView(sources[1].corpus)), steps=4) == {"a": 40, "b": 40}


def test_weights_are_kept_step_by_step(tmp_path: Path) -> None:
    sources = [make_corpus(tmp_path / name, count=30, weight=weight) for name, weight in (("a", 0.7), ("b", 0.2), ("c", 0.1), ("d", 0))]
    planner = make_planner(*sources)
    for _ in range(5):
        assert images_of(planner, steps=1) == {"a": 14, "b": 4, "c": 2}


def test_a_cap_takes_other_samples_in_every_epoch(tmp_path: Path) -> None:
    planner = make_planner(make_corpus(tmp_path / "a", count=60, cap=20))
    epochs = [set(planner.next_step().ids) for _ in range(6)]
    assert {len(epoch) for epoch in epochs} == {20}
    assert len(set.union(*epochs)) > 40
    assert planner.sample_counts["left_out"] == {"cap": 40}
    assert planner.sample_counts["samples"] == 20


def test_a_schedule_changes_sizes_weights_and_packs_at_its_steps(tmp_path: Path) -> None:
    stages = [{"step": 2, "packs_per_step": 4}, {"step": 3, "max_tokens": 1, "weights": {"a": 1, "b": 3}}]
    sources = [make_corpus(tmp_path / name, count=30, weight=1.0) for name in ("a", "b")]
    planner = make_planner(*sources, schedule=stages)
    assert [images_of(planner, steps=1) for _ in range(3)] == [{"a": 10, "b": 10}, {"a": 10, "b": 10}, {"a": 20, "b": 20}]
    step = planner.next_step()
    assert {sample.tokens for pack in step.packs for sample in pack.samples} == {1}
    assert images_of(planner, steps=1) == {"a": 40, "b": 120}  # the step before still had what the old weights had left over


def test_a_schedule_changes_the_kinds_at_its_steps(tmp_path: Path) -> None:
    stages = [{"step": 1, "diffusion_share": 1, "consistency_share": 0}, {"step": 2, "diffusion_share": 0.25}]
    source = make_corpus(tmp_path / "a", count=30)
    planner = make_planner(source, schedule=stages)
    kinds = [Counter(sample.kind for pack in planner.next_step().packs for sample in pack.samples) for _ in range(3)]
    assert kinds == [{DIFFUSION: 10, CONSISTENCY: 2, TRANSITION: 8}, {DIFFUSION: 20}, {DIFFUSION: 5, TRANSITION: 15}]
    assert [(stage["diffusion_share"], stage["consistency_share"]) for stage in planner.stages] == [SHARES, (1, 0), (0.25, 0)]
    with pytest.raises(ValueError, match=r"plan\.schedule: from step 5 on diffusion_share 0\.95 and consistency_share 0\.1 must be"):
        make_planner(source, schedule=[{"step": 5, "diffusion_share": 0.95}])
    without = PlanConfig.model_validate({"schedule": [{"step": 5, "max_tokens": 2}]}).model_dump(mode="json")
    assert without["schedule"] == [{"step": 5, "max_tokens": 2, "packs_per_step": None, "weights": None}]  # as before there were shares


def test_a_plan_depends_on_what_it_selects(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a", count=30).corpus
    keys = pa.table({"key": corpus.read(0, columns=("key",)).column("key").slice(0, 2)})
    pq.write_table(keys, tmp_path / "keys.parquet")
    pq.write_table(keys.slice(1), tmp_path / "fewer.parquet")
    sources = [
        CorpusView(corpus),
        CorpusView(corpus, cap=20),
        CorpusView(corpus, where="width > 3"),
        CorpusView(corpus, exclude=tmp_path / "keys.parquet"),
        CorpusView(corpus, exclude=tmp_path / "fewer.parquet"),
    ]
    planners = [make_planner(source) for source in sources]
    assert len({planner.plan_hash for planner in planners}) == len(planners)
    assert [planner.sample_counts["samples"] for planner in planners] == [30, 20, 30, 28, 29]
    with pytest.raises(ValueError, match="corpus a: cap was 20 and is None; "):
        planners[0].load_state_dict(planners[1].state_dict())


def test_impossible_mixtures(tmp_path: Path) -> None:
    a, b = (make_corpus(tmp_path / name, count=5).corpus for name in ("a", "b"))
    with pytest.raises(ValueError, match="corpus b has no weight, others have one"):
        make_planner(CorpusView(a, weight=1.0), CorpusView(b))
    with pytest.raises(ValueError, match="all corpora have weight 0"):
        make_planner(CorpusView(a, weight=0.0), CorpusView(b, weight=0.0))
    with pytest.raises(ValueError, match="weights are given to a, c, but the corpora are a, b"):
        make_planner(CorpusView(a), CorpusView(b), schedule=[{"step": 4, "weights": {"a": 1, "c": 1}}])
    with pytest.raises(ValueError, match="leaves out every sample of corpus b"):
        make_planner(CorpusView(a), CorpusView(b, where="width > 100"))
    with pytest.raises(ValueError, match="leaves out every sample of corpus b"):
        make_planner(CorpusView(b, where="width > 100")).next_step()
    with pytest.raises(ValueError, match="corpus a: weight and repeats"):
        CorpusView(a, weight=1.0, repeats=2.0)
    with pytest.raises(ValueError, match="corpus a: where 'heigth > 3': there is no column heigth; did you mean height"):
        CorpusView(a, where="heigth > 3")
    with pytest.raises(ValueError, match=r"corpus a: exclude .*none\.parquet: there is no such file"):
        CorpusView(a, exclude=tmp_path / "none.parquet")
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match=r"ids\.parquet has no column 'key'; there are: id"):
        CorpusView(a, exclude=tmp_path / "ids.parquet")
    (tmp_path / "text.parquet").write_text("key")
    with pytest.raises(ValueError, match=r"text\.parquet is not a parquet file of keys"):
        CorpusView(a, exclude=tmp_path / "text.parquet")


def test_impossible_schedules() -> None:
    def plan(*stages: dict[str, Any]) -> PlanConfig:
        return PlanConfig.model_validate({"max_tokens": 64, "min_tokens": 4, "tokens_per_pack": 256, "schedule": stages})

    with pytest.raises(ValueError, match=r"plan\.schedule\.0\.max_tokens 512 is more than plan\.tokens_per_pack 256"):
        plan({"step": 5, "max_tokens": 512})
    with pytest.raises(ValueError, match=r"plan\.min_tokens 4 is more than plan\.schedule\.1\.max_tokens 2"):
        plan({"step": 5, "max_tokens": 64}, {"step": 6, "max_tokens": 2})
    with pytest.raises(ValueError, match="step 5 comes after step 5"):
        plan({"step": 5, "max_tokens": 64}, {"step": 5, "packs_per_step": 2})
    with pytest.raises(ValueError, match="step 5 changes nothing"):
        plan({"step": 5})
    with pytest.raises(ValueError, match="weights are all 0"):
        plan({"step": 5, "weights": {"a": 0}})


def test_shares_are_whole_numbers(tmp_path: Path) -> None:
    sources = [make_corpus(tmp_path / name, count=1, weight=weight) for name, weight in (("a", 0.1), ("b", 0.25))]
    assert mixture_shares(sources, scheduled=None, samples=list) == (2, 5)
    assert mixture_shares(sources, scheduled={"a": 6.0, "b": 3.0}, samples=list) == (2, 1)
