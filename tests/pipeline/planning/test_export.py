"""Plans for other trainers: JSON lines of packs, and the two files of the official TiM code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus.corpus import Corpus
from pipeline.cost import KIND_NAMES
from pipeline.packing.rank_assignment import assign_to_ranks
from pipeline.planning.config import PlanConfig, Stage
from pipeline.planning.export import export_buckets, export_steps
from pipeline.planning.planner import Planner
from pipeline.streams.corpus_view import CorpusView
from tests.pipeline.conftest import Sample, varied, write_corpus

PLAN = PlanConfig(stride=32, max_tokens=6, tokens_per_pack=12, packs_per_step=3, flip=0.5)


def make_corpus(folder: Path, *, name: str = "corpus", seed: int = 1, images: bool = True) -> Corpus:
    samples = [Sample(2 * each.height, 2 * each.width, each.captions, each.label) for each in varied(40, seed=seed)]
    corpus = write_corpus(folder, shards=[samples[:25], [*samples[25:], Sample(20, 400, ("too long",))]], images=images, name=name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"] = {"images": {"format": "jpg"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return corpus


def make_planner(*sources: Corpus | CorpusView, plan: PlanConfig = PLAN) -> Planner:
    return Planner(sources, plan=plan, seed=3, width=64, diffusion_share=0.5, consistency_share=0.1, caption_dropout=0.2)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_that_training_takes(ranks: int, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    file = tmp_path / "new" / "plan.jsonl"
    counts = export_steps(make_planner(corpus), file=file, steps=4, ranks=ranks)
    packs = lines(file)
    planner = make_planner(corpus)
    expected = []
    for index in range(4):
        step = planner.next_step()
        for rank, share in enumerate(assign_to_ranks(step, ranks=ranks, lockstep=False)):
            expected += [(index, rank, number, step.images, pack) for number, pack in enumerate(share)]
    assert counts == {"steps": 4, "packs": len(packs), "images": sum(len(pack["samples"]) for pack in packs)}
    for found, (step, rank, number, images, pack) in zip(packs, expected, strict=True):
        assert [found[key] for key in ("format", "step", "rank", "pack", "step_images")] == [1, step, rank, number, images]
        assert (found["tokens"], found["cost"]) == (pack.tokens, pack.cost)
        for sample, planned in zip(found["samples"], pack.samples, strict=True):
            assert (sample["key"], sample["id"], sample["tar"]) == (planned.key, f"corpus/{planned.key}", planned.tar)
            assert (sample["height"], sample["width"], sample["resize"]) == (planned.height, planned.width, list(planned.resize))
            assert (sample["kind"], sample["tokens"]) == (KIND_NAMES[planned.kind], planned.tokens)
            assert (sample["caption"], sample["label"], sample["flip"]) == (planned.caption, planned.label, planned.flip)
    kinds = {sample["kind"] for pack in packs for sample in pack["samples"]}
    assert kinds == {"diffusion", "consistency", "transition"}


def test_an_exported_place_holds_the_image(tmp_path: Path) -> None:
    export_steps(make_planner(make_corpus(tmp_path / "corpus")), file=tmp_path / "plan.jsonl", steps=1)
    for pack in lines(tmp_path / "plan.jsonl"):
        for sample in pack["samples"]:
            data = Path(sample["tar"]).read_bytes()[sample["offset"] : sample["offset"] + sample["length"]]
            assert (data[:3], data[-2:]) == (b"\xff\xd8\xff", b"\xff\xd9")


def test_buckets_are_what_the_official_code_reads(tmp_path: Path) -> None:
    """Read as `T2IDatasetMS` and its batch sampler do: rows of one list, whose bucket ends in -HEIGHTxWIDTH."""
    corpora = [make_corpus(tmp_path / name, name=name, seed=seed) for seed, name in enumerate(("one", "two"))]
    counts = export_buckets(make_planner(*corpora), folder=tmp_path / "buckets")
    rows, batches = lines(tmp_path / "buckets" / "data_info.jsonl"), json.loads((tmp_path / "buckets" / "bucket_sampler.json").read_text())
    planned = make_planner(*corpora)
    assert counts == {"images": planned.sample_counts["samples"], "buckets": len({row["bucket"] for row in rows}), "batches": len(batches)}
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    incomplete = []
    for batch in batches:
        [bucket] = {rows[row]["bucket"] for row in batch}
        height, width = map(int, bucket.split("-")[-1].split("x"))
        assert height % 32 == width % 32 == 0
        images = PLAN.tokens_per_pack // (height * width // 1024)
        assert 1 <= len(batch) <= images
        incomplete += [bucket] * (len(batch) < images)
    assert len(incomplete) == len(set(incomplete))
    targets = {f"{s.id}.jpg": s for _ in range(30) for pack in planned.next_step().packs for s in pack.samples}
    for row in rows:
        sample = targets[row["image_file"]]
        assert row["bucket"] == f"native-{sample.height}x{sample.width}"
        assert set(row) == {"image_file", "captions", "bucket"}
    read = [
        caption for corpus in corpora for shard in range(2) for caption in corpus.read(shard, columns=["captions"])["captions"].to_pylist()
    ]
    assert [row["captions"] for row in rows] == [captions for captions in read if captions != ["too long"]]


def test_equal_plans_give_equal_files(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    for folder in ("a", "b"):
        export_buckets(make_planner(corpus), folder=tmp_path / folder)
        export_steps(make_planner(corpus), file=tmp_path / folder / "plan.jsonl", steps=2)
    for name in ("data_info.jsonl", "bucket_sampler.json", "plan.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": 16}, "plan.stride 16: the official code rounds buckets to 32 pixels"),
        ({"schedule": (Stage(step=5, max_tokens=8),)}, "plan.schedule: buckets are the same in all steps"),
        ({"min_tokens": 6, "max_tokens": 6, "max_aspect": 1.0}, "leaves every sample out"),
    ],
)
def test_plans_that_buckets_cannot_hold_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", images=False)
    planner = make_planner(corpus, plan=PLAN.model_copy(update=change))
    with pytest.raises(ValueError, match=reason):
        export_buckets(planner, folder=tmp_path / "buckets")
    assert not list(tmp_path.glob("buckets/*"))


def test_shares_of_corpora_and_unprepared_ones_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus corpus: buckets hold every sample once, leave out weight, repeats and cap"):
        export_buckets(make_planner(CorpusView(corpus, repeats=2)), folder=tmp_path / "buckets")
    with pytest.raises(ValueError, match="names no image format; buckets need what `tim prepare` wrote"):
        export_buckets(make_planner(corpus), folder=tmp_path / "buckets")
    with pytest.raises(ValueError, match="steps: 0"):
        export_steps(make_planner(corpus), file=tmp_path / "plan.jsonl", steps=0)
    assert not (tmp_path / "plan.jsonl").exists()
