"""Latents and text features take the place of images and captions, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.corpus.corpus import Corpus
from pipeline.features.manifest import Features
from pipeline.features.tensors import latent_name
from pipeline.loading.loader import LoadedStep, Loader
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.randomness import generator
from pipeline.size_rule import SizeRule
from tests.pipeline.conftest import varied, write_corpus
from tests.pipeline.features.feature_writer import write_features

RULE = SizeRule(stride=8, max_tokens=36)
PLAN = PlanConfig(stride=8, max_tokens=36, tokens_per_pack=144, packs_per_step=4)


def texts(captions: Any) -> list[torch.Tensor]:
    """One number a word, after a first one."""
    return [torch.tensor([[float(sum(word.encode()))] for word in ["^", *caption.split()]]) for caption in captions]


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    samples = varied(10, seed=1)
    return write_corpus(tmp_path / "corpus", shards=[samples[:6], samples[6:]])


@pytest.fixture
def encode(small: Corpus, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        settings = {"rules": [RULE], "codec": {}, "encode_images": lambda images: [image / 127.5 - 1 for image in images]}
        return write_features(tmp_path / "features", small, **{**settings, "text": {}, "encode_texts": texts, **changes})

    return write


def planner(corpus: Corpus, *, features: Path | None, **changes: Any) -> Planner:
    opened = Corpus.open(corpus.path, features=features)
    plan = PlanConfig.model_validate({**PLAN.model_dump(), **changes})
    return Planner([opened], plan=plan, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1, caption_dropout=0.2)


def steps(corpus: Corpus, *, features: Path | None, count: int = 4, workers: int = 0, **changes: Any) -> list[LoadedStep]:
    loader = Loader(planner(corpus, features=features, **changes), seed=5, channels=3, factor=1, workers=workers)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_steps_from_pixels_and_from_features(small: Corpus, encode: Callable[..., Path], workers: int) -> None:
    folder = encode(flipped=True, zstd=workers == 1)
    pixels, features = (steps(small, features=f, workers=w, flip=0.3) for f, w in ((None, 0), (folder, workers)))
    for one, other in zip(pixels, features, strict=True):
        assert (one.ids, one.state["plan_hash"], one.state) == (other.ids, other.state["plan_hash"], other.state)
        for batch, same in zip(one.batches, other.batches, strict=True):
            assert same.latents is not None
            assert same.texts is not None
            assert (batch.ids, same.images, batch.latents, batch.texts) == (same.ids, [], None, None)
            assert all(torch.equal(image / 127.5 - 1, latent) for image, latent in zip(batch.images, same.latents, strict=True))
            assert all(map(torch.equal, texts(batch.captions), same.texts))
            assert all(map(torch.equal, batch.noise, same.noise))
            for name in ("labels", "kinds", "uniforms", "weights"):
                assert torch.equal(getattr(batch, name), getattr(same, name)), name


def test_what_features_lack_is_read_from_the_corpus(small: Corpus, encode: Callable[..., Path], tmp_path: Path) -> None:
    """Latents without captions, captions without latents, each with what the other half of both has."""
    both = steps(small, features=encode())
    (tmp_path / "features").rename(tmp_path / "both")
    latents = steps(small, features=encode(text=None))
    (tmp_path / "features").rename(tmp_path / "latents")
    texts = steps(small, features=encode(codec=None), max_tokens=30)  # whatever the sizes
    pixels, small_pixels = steps(small, features=None), steps(small, features=None, max_tokens=30)
    for step, both_step, pixel_step in zip(latents, both, pixels, strict=True):
        for batch, same, pixel in zip(step.batches, both_step.batches, pixel_step.batches, strict=True):
            assert (batch.texts, batch.captions, batch.images) == (None, pixel.captions, [])
            assert all(map(torch.equal, batch.latents or [], same.latents or []))
    for step, pixel_step in zip(texts, small_pixels, strict=True):
        for batch, pixel in zip(step.batches, pixel_step.batches, strict=True):
            assert (batch.latents, batch.captions) == (None, [""] * len(batch.ids))
            assert all(map(torch.equal, batch.images, pixel.images))
            assert batch.texts is not None
            assert all(map(torch.equal, globals()["texts"](pixel.captions), batch.texts))
    unlike = [Corpus.open(small.path, features=tmp_path / "latents"), Corpus.open(small.path, name="other", features=tmp_path / "both")]
    with pytest.raises(ValueError, match="those of corpus corpus have latents and those of corpus other have latents, captions"):
        Planner(unlike, plan=PLAN, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1)


def test_two_sizes_are_one_latent_only_if_they_show_the_same(small: Corpus, encode: Callable[..., Path]) -> None:
    """Two limits may give an image the same sides, but cut out of it scaled otherwise."""
    rules = [SizeRule(stride=8, max_tokens=tokens) for tokens in (24, 25, 26, 28, 30, 36)]
    folder = encode(rules=rules)
    for rule in rules:
        found = steps(small, features=folder, max_tokens=rule.max_tokens)
        expected = steps(small, features=None, max_tokens=rule.max_tokens)
        for step, pixel_step in zip(found, expected, strict=True):
            for batch, pixel in zip(step.batches, pixel_step.batches, strict=True):
                assert all(torch.equal(image / 127.5 - 1, each) for image, each in zip(pixel.images, batch.latents or [], strict=True))


def test_half_precision_is_half_precise(small: Corpus, encode: Callable[..., Path]) -> None:
    exact, half = steps(small, features=None), steps(small, features=encode(dtype=torch.float16))
    latents = [latent for step in half for batch in step.batches for latent in batch.latents or []]
    images = [image / 127.5 - 1 for step in exact for batch in step.batches for image in batch.images]
    errors = torch.cat([(image - latent).abs().flatten() for image, latent in zip(images, latents, strict=True)])
    assert 0 < errors.max() <= 2**-12  # half a step of float16 below 1


def test_what_a_codec_samples_is_drawn_for_each_visit(small: Corpus, encode: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.features import tensors

    plain, load = steps(small, features=encode()), tensors.load

    def with_deviation(data: bytes) -> dict[str, torch.Tensor]:
        tensors = load(data)
        latents = {name: tensor for name, tensor in tensors.items() if name.startswith("latent.")}
        return {**tensors, **{name.replace("latent.", "latent_std."): torch.full_like(tensor, 0.5) for name, tensor in latents.items()}}

    monkeypatch.setattr(tensors, "load", with_deviation)
    sampled = steps(small, features=small.path.parent / "features")
    draws = [
        (other - one) * 2
        for before, after in zip(plain, sampled, strict=True)
        for batch, same in zip(before.batches, after.batches, strict=True)
        for one, other in zip(batch.latents or [], same.latents or [], strict=True)
    ]
    assert abs(torch.cat([draw.flatten() for draw in draws]).std() - 1) < 0.02
    assert len({float(draw.flatten()[0]) for draw in draws}) == len(draws)
    assert latent_name((9, 17, 8, 16), deviation=True, flipped=True) == "latent_std.8x16.of.9x17.flipped"
    assert generator(5, "codec", 0, "corpus/x").standard_normal() != generator(5, "noise", 0, "corpus/x").standard_normal()


def test_features_that_are_damaged_leave_a_place_empty(small: Corpus, encode: Callable[..., Path]) -> None:
    folder = encode()
    row = pq.read_table(folder / "000000.parquet").to_pylist()[2]
    with open(folder / "000000.tar", "r+b") as tar:
        tar.seek(row["offset"])
        tar.write(b"\xff" * 64)
    loader = Loader(planner(small, features=folder), seed=5, channels=3, factor=1, workers=0, max_bad_fraction=1)
    weights = {id: float(batch.weights[i]) for step in islice(loader, 3) for batch in step.batches for i, id in enumerate(batch.ids)}
    assert [id for id, weight in weights.items() if not weight] == [f"corpus/{row['key']}"]


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_a_plan_needs_and_does_not_find_is_named(small: Corpus, encode: Callable[..., Path]) -> None:
    folder = encode()
    manifest = json.loads((folder / "manifest.json").read_text())

    def refused(said: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            planner(small, features=folder, **changes).next_step()
        assert "\n" not in str(caught.value)

    refused(r"encoded at other sizes \(stride 8, max_tokens 36, .*\) than the plan's \(stride 8, max_tokens 30,", max_tokens=30)
    refused("min_tokens 1.*max_aspect 9.0", max_aspect=9.0)
    refused("no mirrored latents", flip=0.5)
    rewrite(folder, shards=[manifest["shards"][0], {**manifest["shards"][1], "of": "0" * 64}])
    refused("shard 1 was encoded from another version of corpus corpus")
    rewrite(folder, shards=manifest["shards"][:1])
    refused("have 1 shards, corpus corpus has 2")
    rewrite(folder, shards=[{**manifest["shards"][0], "name": "../a.tar"}])
    refused("is outside the folder")
    rewrite(folder, shards=manifest["shards"], format=2)
    refused("format 2")
    rewrite(folder, format=1, kind="index")
    refused("has kind 'index'")
    (folder / "manifest.json").write_text("{")
    refused("damaged")
    (folder / "manifest.json").unlink()
    refused("there is no manifest.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    Features.open(folder)

    path = folder / "000001.parquet"
    table = pq.read_table(path)
    for column, value, said in (
        ("key", "0000010009", "has no sample 0000010003"),
        ("heights", [8], r"sample 0000010003 has no latent of \d+x\d+ pixels, cut out of \d+x\d+"),
        ("captions", 0, "sample 0000010003 lacks caption 0"),
    ):
        rows = table.to_pylist()
        rows[3][column] = value
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
        refused(said)
        with pytest.raises(ValueError, match=said):
            _ = planner(small, features=folder).sample_counts
    path.write_bytes(b"PAR1")
    refused("000001.parquet cannot be read")


def test_all_corpora_have_features_or_none(small: Corpus, encode: Callable[..., Path]) -> None:
    corpora = [Corpus.open(small.path, features=encode()), Corpus.open(small.path, name="other")]
    with pytest.raises(ValueError, match="corpus other has no features and another has"):
        Planner(corpora, plan=PLAN, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1)
