"""Training from features is training from pictures."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from launch.config import Config, ConfigError, load_config
from launch.engine import Ranks
from launch.planning import check_ready, make_planner
from launch.trainer import Trainer
from pipeline.index import Corpus
from tests.pipeline.conftest import Sample, write_corpus
from tests.pipeline.feature_writer import write_features
from tim import codecs, text

CONFIG = """\
corpus: {path: CORPUS, features: FEATURES}
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2, flip: 0.5}
network:
  params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
objective:
  guidance: {interval: [0, 1], after: 1, refresh: 1}
text: {caption_dropout: 0.3}
train: {steps: 3, lr: 1e-2, ema: 0.5}
loader: {workers: 0}
log: {every: 1}
"""
ENCODER = {"kind": "lookup", "width": 16, "max_tokens": 77, "precision": "fp32"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    samples = [Sample(20 + 7 * i, 60 - 4 * i, (f"number {i}", f"the {i}th picture")[: 1 + i % 2]) for i in range(6)]
    corpus = write_corpus(tmp_path / "corpus", shards=[samples])
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("CORPUS", str(corpus.path)).replace("FEATURES", str(tmp_path / "features")))
    return path


def encode(corpus: Corpus, folder: Path, config: Path, *, dtype: torch.dtype) -> None:
    encoder, codec = text.make("lookup", width=16), codecs.make("pixel")
    rule = make_planner(load_config(config, overrides=[f"corpus={corpus.path}"])).plan.size_rule
    facts = {"kind": "pixel", "factor": codec.factor, "channels": codec.channels}
    write_features(
        folder,
        corpus,
        rules=[rule],
        codec=facts,
        encode_images=lambda images: codec.latents(images).means,
        text=ENCODER,
        encode_texts=encoder.encode,
        dtype=dtype,
        flipped=True,
    )


def trained(config: Config, alone: Ranks) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """Losses and gradient norms of three steps, and the weights after them."""
    with ExitStack() as cleanup:
        trainer = Trainer(config, make_planner(config), ranks=alone, cleanup=cleanup)
        measures = [trainer.take_step(stop=False)[0] for _ in range(3)]
        weights = {name: fragment.values.clone() for name, fragment in trainer.engine.fragments().items()}
        return [(*measure.raw, measure.grad_norm) for measure in measures], weights


def test_a_run_from_features_is_the_run_from_pictures(config: Path, tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """From float32 features to the last bit; from float16 closely."""
    corpus = Corpus.open(tmp_path / "corpus")
    encode(corpus, tmp_path / "features", config, dtype=torch.float32)
    encode(corpus, tmp_path / "half", config, dtype=torch.float16)
    expected, weights = trained(load_config(config, overrides=[f"corpus={corpus.path}"]), alone)
    Path(corpus.shards[0].path).write_bytes(bytes(corpus.shards[0].bytes))  # nobody looks at the pictures any more,
    monkeypatch.setattr(codecs, "make", None)  # nor runs a codec
    monkeypatch.setattr(text, "make", None)  # or a text encoder
    found, same = trained(load_config(config), alone)
    assert found == expected
    assert all(torch.equal(fragment, same[name]) for name, fragment in weights.items())
    halves, _ = trained(load_config(config, overrides=[f"corpus={{path: {corpus.path}, features: {tmp_path / 'half'}}}"]), alone)
    assert halves != expected
    for one, other in zip(halves, expected, strict=True):
        assert one == pytest.approx(other, rel=5e-3)


def test_features_of_other_encoders_are_refused(config: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(tmp_path / "corpus")
    encode(corpus, tmp_path / "features", config, dtype=torch.float32)

    def changed(*overrides: str) -> Config:
        return load_config(config, overrides=[f"run_dir={tmp_path / 'run'}", *overrides])

    check_ready(changed())
    for override, said in (
        ("codec.kind=sd-vae", r"features .* are of codec\.kind pixel, the config says sd-vae"),
        ("network.params.cap_feat_dim=32", r"text\.width 16, the config says 32"),
        ("text.max_tokens=20", r"text\.max_tokens 77, the config says 20"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_ready(changed(override, "network.params.patch_size=1" if "vae" in override else "seed=0"))
    with pytest.raises(ConfigError, match=r"objective\.alignment\.path: missing"):
        check_ready(changed("objective.alignment={kind: dinov2}", "network.params.z_dim=8", "network.params.encoder_depth=1"))
