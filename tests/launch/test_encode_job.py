"""`tim encode` as people type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config.load import load_config
from launch.encode_job import settings
from launch.training.planning import check_ready, make_planner
from pipeline.corpus.corpus import Corpus
from tests.launch.test_cli import Tim, refused, tim
from tests.pipeline.conftest import varied, write_corpus

__all__ = ["tim"]

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2, flip: 0.5, max_aspect: 4, schedule: [{step: 5, max_tokens: 36}]}
text: {max_tokens: 20}
network:
  params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2}
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus", shards=[varied(5, seed=1), varied(4, seed=2)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def test_what_a_run_needs_is_what_it_finds(corpus: Corpus, run: Path, tim: Tim, tmp_path: Path) -> None:
    out = tmp_path / "features"
    done = tim("encode", corpus.folder, "--for", run, "--out", out, "--processes", 1, "--json")
    assert done.code == 0, done.err
    assert done.data == {
        "features": str(out),
        "shards": 2,
        "samples": 9,
        "captions": 16,
        "bytes": done.data["bytes"],
        "rejected": {},
        "cut": 0,
    }
    assert done.data["bytes"] == sum(file.stat().st_size for file in out.glob("*.tar"))
    assert "9 samples, " in done.err.splitlines()[0]
    assert "encode 9/9" in done.err
    config = load_config(run, overrides=[f"corpus={{path: {corpus.folder}, features: {out}}}", f"run_dir={tmp_path / 'run'}"])
    check_ready(config)
    planner = make_planner(config)
    assert [len(planner.next_step().ids) > 0 for _ in range(8)] == [True] * 8  # both stages
    again = tim("encode", corpus.folder, "--for", run, "--out", out, "--processes", 1)
    assert again.code == 0
    assert again.out.strip() == f"{out}: 9 samples with 16 captions in 2 shards, {done.data['bytes'] / 1e6:.1f} MB"
    refused(tim("encode", corpus.folder, "--for", run, "--out", out, "--processes", 1, "flip=false"), "another flipped")


def test_settings_are_laid_over_those_of_the_run(run: Path) -> None:
    found = settings(str(run), overrides=["text.max_tokens=9", "dtype=bfloat16", "max_pixels=4096"])
    assert found.model_dump(exclude_defaults=True) == {
        "codec": {"kind": "pixel"},
        "text": {"kind": "lookup", "width": 16, "max_tokens": 9},
        "patch_size": 8,
        "max_tokens": (16, 36),
        "max_pixels": 4096,
        "max_aspect": 4.0,
        "flip": True,
        "dtype": "bfloat16",
    }
    assert settings(str(run), overrides=["text=null"]).text is None


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "nothing to encode: give a codec, a text encoder or both"),
        (["--codec", "jpeg"], r"codec\.kind: .*'pixel', 'sd-vae', 'sd3-vae', 'flux-vae', 'flux2-vae', 'kl', 'dc-ae' or 'tiny'"),
        (["--codec", "sd-vae"], "codec sd-vae needs its weights: give its path"),
        (["--codec", "kl=nowhere"], "nowhere: no such folder; give one with config"),
        (["--codec", "pixel", "--text", "hf=nowhere"], "nowhere: no such folder"),
        (["--codec", "pixel", "--text", "lookup"], "text encoder lookup: give the width of its features"),
        (["--text", "lookup", "text.width=8", "teacher={kind: radio, path: x}"], "give the codec, too"),
        (["--codec", "pixel", "max_tokens=[]"], "max_tokens: give at least one size"),
        (["--codec", "pixel", "sizes=3"], "sizes"),
        (["--codec", "pixel", "another"], "give one corpus"),
    ],
)
def test_mistakes_are_named(typed: list[str], said: str, corpus: Corpus, tim: Tim, tmp_path: Path) -> None:
    refused(tim("encode", corpus.folder, *typed, "--out", tmp_path / "features", "--processes", 1), said)
    assert not (tmp_path / "features").exists()


def test_no_corpus_no_features(tim: Tim, tmp_path: Path) -> None:
    refused(tim("encode", tmp_path / "nothing", "--codec", "pixel", "--out", tmp_path / "features"), "is not a corpus")


def test_processes_are_started_as_they_were_asked_for(
    corpus: Corpus, run: Path, tim: Tim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is typed reaches them, no more of them are started than there are shards, and their failure is this command's."""
    asked: dict[str, Any] = {}

    def start(command: list[str], *, processes: int) -> int:
        asked.update(command=command, processes=processes)
        return 3

    monkeypatch.setattr("launch.encode_job.run_in_processes", start)
    done = tim("encode", corpus.folder, "--for", run, "--codec", "pixel", "--out", tmp_path / "f", "--processes", 8, "zstd=true", "--json")
    assert asked["processes"] == 2
    assert asked["command"] == ["encode", corpus.folder, "codec.kind=pixel", "zstd=true", "--out", str(tmp_path / "f"), "--for", str(run)]
    assert (done.code, json.loads(done.out)["exit"]) == (3, 3)
