"""Captions and prompts beyond text.max_tokens are counted, from tables alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataprep.report.caption_lengths import beyond_usual, measure, sample_captions
from launch.caption_lengths import caption_lengths
from launch.config.load import load_config
from launch.sampling.cut_prompts import cut_prompts
from launch.training.planning import make_planner
from tests.pipeline.conftest import Sample, write_corpus
from tests.tim.models import bert
from tim.disk_cache import DiskCache
from tim.text import encoders
from tim.text.prompt_encoder import PromptEncoder

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 1}
text: {max_tokens: 8}
network:
  params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of eight captions have more than six words."""
    words = ["red " * (3 * number) for number in range(1, 5)]
    shards = [[Sample(20, 20, (caption,)) for caption in words], [Sample(20, 20, ("a", "b")), Sample(20, 20, ("c " * 6, "d " * 7))]]
    write_corpus(tmp_path_factory.mktemp("lengths") / "corpus", shards=shards)
    return tmp_path_factory.getbasetemp() / "lengths0" / "corpus"


def test_a_run_knows_how_many_captions_it_cuts(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "run.yaml", overrides=[f"corpus={corpus}"])
    planner = make_planner(config)
    for tar in corpus.glob("*.tar"):
        tar.rename(tar.with_suffix(".away"))  # no image is read
    found = caption_lengths(config, planner)
    assert found is not None
    assert (found.sampled, found.cut, found.longest) == (8, 3, 14)
    assert str(found) == "3 of 8 sampled captions are longer than text.max_tokens 8 and are cut; the longest has 14 tokens"
    absent = load_config(tmp_path / "run.yaml", overrides=[f"corpus={corpus}", "text.kind=hf", "text.path=nowhere"])
    assert caption_lengths(absent, planner) is None  # planning does without the encoder
    assert len(sample_captions(planner.corpora, most=2)) == 3  # a row of each shard


def test_prompts_that_are_cut_are_named() -> None:
    encoder = PromptEncoder({"kind": "lookup", "max_tokens": 8}, width=16)
    assert cut_prompts(["a fox", "red " * 6], encoder=encoder) == []
    assert cut_prompts(["a fox", "red " * 20], encoder=encoder) == [
        "prompt 'red red red red red red red red red red '… is truncated: its first 8 of 22 tokens are used"
    ]
    assert measure([], tokenizer=encoder.tokenizer).sampled == 0


def test_the_tokenizer_is_not_loaded_for_prompts_whose_cached_features_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path / "cache")
    text = {"kind": "hf", "path": str(bert(tmp_path / "bert")), "max_tokens": 8}
    PromptEncoder(text, cache=cache).encode(["a red image", "red " * 6, "red " * 7])
    loaded = []
    monkeypatch.setattr(encoders, "tokenizer", lambda *_, original=encoders.tokenizer, **given: loaded.append(1) or original(*_, **given))
    assert cut_prompts(["a red image"], encoder=PromptEncoder(text, cache=cache)) == []
    assert not loaded
    assert cut_prompts(["a red image", "red " * 6], encoder=PromptEncoder(text, cache=cache)) == []  # 8 tokens: all, or cut to them
    assert len(loaded) == 1
    (cut,) = cut_prompts(["red " * 7], encoder=PromptEncoder(text, cache=cache))
    assert cut.endswith("is truncated: its first 8 of 9 tokens are used")
    (unknown,) = cut_prompts(["small " * 7], encoder=PromptEncoder(text, cache=cache))
    assert unknown.endswith("its first 8 of 9 tokens are used")


def test_the_usual_length_is_counted_in_tokens_not_characters() -> None:
    assert beyond_usual(["red " * 75, "red " * 76, "a" * 300, "", "東" * 60]) == beyond_usual(["red " * 76]) + beyond_usual(["東" * 60])
    assert beyond_usual(["red " * 76]) == 1
