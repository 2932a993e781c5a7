"""Training from features is training from images."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dataprep.features.encode import EncodeConfig
from dataprep.features.encode import encode as encode_corpus
from launch.checkpoints.export import spec_of
from launch.config.load import load_config
from launch.config.schema import Config, ConfigError
from launch.distributed.heartbeat import HEARTBEAT
from launch.distributed.ranks import Ranks
from launch.encode_job import required_settings
from launch.training.build import build
from launch.training.planning import check_ready, make_planner
from launch.training.trainer import Trainer
from pipeline.corpus.corpus import Corpus
from tests.pipeline.conftest import Sample, write_corpus
from tests.pipeline.features.feature_writer import write_features
from tests.tim.models import autoencoder, bert
from tests.tim.test_alignment import radio_weights
from tim import Generator, PackedText, TransitionTransformer, codecs
from tim.model_folder.folder import save_model
from tim.text import encoders

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
    samples = [Sample(20 + 7 * i, 60 - 4 * i, (f"number {i}", f"the {i}th image")[: 1 + i % 2]) for i in range(6)]
    corpus = write_corpus(tmp_path / "corpus", shards=[samples])
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("CORPUS", str(corpus.path)).replace("FEATURES", str(tmp_path / "features")))
    return path


def encode(corpus: Corpus, folder: Path, config: Path, *, dtype: torch.dtype) -> None:
    encoder, codec = encoders.make("lookup", width=16), codecs.make("pixel")
    rule = make_planner(load_config(config, overrides=[f"corpus={corpus.path}"])).plan.size_rule
    metadata = {"kind": "pixel", "factor": codec.factor, "channels": codec.channels}
    write_features(
        folder,
        corpus,
        rules=[rule],
        codec=metadata,
        encode_images=lambda images: codec.encode(images).means,
        text=ENCODER,
        encode_texts=encoder.encode,
        dtype=dtype,
        flipped=True,
    )


def trained(config: Config, alone: Ranks) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """Losses and gradient norms of three steps, and the weights after them."""
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        measures = [trainer.take_step() for _ in range(3)]
        weights = {name: fragment.values.clone() for name, fragment in trainer.parts.engine.fragments().items()}
        return [(*measure.raw, measure.grad_norm) for measure in measures], weights


def test_a_run_from_features_is_the_run_from_images(config: Path, tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """From float32 features to the last bit; from float16 closely."""
    corpus = Corpus.open(tmp_path / "corpus")
    encode(corpus, tmp_path / "features", config, dtype=torch.float32)
    encode(corpus, tmp_path / "half", config, dtype=torch.float16)
    expected, weights = trained(load_config(config, overrides=[f"corpus={corpus.path}"]), alone)
    Path(corpus.shards[0].path).write_bytes(bytes(corpus.shards[0].bytes))  # nobody looks at the images any more,
    monkeypatch.setattr(codecs, "make", None)  # nor runs a codec
    monkeypatch.setattr(encoders, "make", None)  # or a text encoder
    found, same = trained(load_config(config), alone)
    assert found == expected
    assert all(torch.equal(fragment, same[name]) for name, fragment in weights.items())
    halves, _ = trained(load_config(config, overrides=[f"corpus={{path: {corpus.path}, features: {tmp_path / 'half'}}}"]), alone)
    assert halves != expected
    for one, other in zip(halves, expected, strict=True):
        assert one == pytest.approx(other, rel=5e-3)


def test_the_validation_loss_from_features_is_that_from_images(config: Path, tmp_path: Path, alone: Ranks) -> None:
    """With guidance in the training, which the validation leaves out."""
    corpus = Corpus.open(tmp_path / "corpus")
    encode(corpus, tmp_path / "features", config, dtype=torch.float32)

    def validated(*overrides: str) -> dict[str, float]:
        loaded = load_config(config, overrides=[*overrides, "validation.share=0.5"])
        with ExitStack() as cleanup:
            trainer = Trainer(loaded, build(loaded, make_planner(loaded), ranks=alone, cleanup=cleanup), ranks=alone)
            for _ in range(2):
                trainer.take_step()
            columns = trainer.validate(last=True, stopping=bool)
            assert HEARTBEAT.state.section == "validate"
            return columns

    found = validated()
    assert found["validation_images"] > 1
    assert found == validated(f"corpus={corpus.path}")
    with pytest.raises(ConfigError, match=r"validation\.corpus: needs features with captions, latents, as the corpus that is trained on"):
        check_ready(load_config(config, overrides=[f"run_dir={tmp_path / 'run'}", f"validation.corpus={corpus.path}"]))


@pytest.fixture
def real(config: Path, tmp_path: Path) -> list[str]:
    """Values of a config with an autoencoder that draws its latents, a text encoder, and an alignment teacher."""
    save_file(radio_weights(), tmp_path / "radio.safetensors")
    return [
        f"codec={{kind: kl, path: {autoencoder(tmp_path / 'kl', 'kl')}}}",
        *(f"text.{key}={value}" for key, value in (("kind", "hf"), ("path", bert(tmp_path / "bert")), ("max_tokens", 12))),
        f"objective.alignment={{kind: radio, path: {tmp_path / 'radio.safetensors'}}}",
        *("network.params.patch_size=4", "network.params.cap_feat_dim=24", "network.params.z_dim=128", "network.params.encoder_depth=1"),
    ]


def test_real_models_beforehand_are_real_models_in_the_step(
    config: Path, real: list[str], tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `tim encode --for` writes is what the step itself would make: latents that are drawn, captions, the teacher's tokens."""
    corpus = Corpus.open(tmp_path / "corpus")
    online = load_config(config, overrides=[*real, f"corpus={corpus.path}"])
    exact = EncodeConfig.model_validate({**required_settings(online), "dtype": "float32"})
    for name, settings in (("features", exact), ("half", exact.model_copy(update={"dtype": "float16"}))):
        encode_corpus(corpus.path, out=tmp_path / name, config=settings)
    offline = load_config(config, overrides=real)
    check_ready(offline.model_copy(update={"run_dir": tmp_path / "run"}))
    half = load_config(config, overrides=[*real, f"corpus={{path: {corpus.path}, features: {tmp_path / 'half'}}}"])

    def seen(config: Config) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Latents, captions' features and teacher's tokens of every pack of two steps."""
        with ExitStack() as cleanup:
            parts = build(config, make_planner(config), ranks=alone, cleanup=cleanup)
            frozen = parts.frozen
            batches = [batch for step in islice(parts.loader, 2) for batch in step.batches]
            found = []
            for batch in batches:
                text = frozen.condition(batch)
                assert isinstance(text, PackedText)
                teacher = frozen.teacher_tokens(batch)
                assert teacher is not None
                found.append((torch.cat([latent.flatten() for latent in frozen.latents(batch)]), text.features, teacher))
            assert (frozen.codec is None, frozen.encoder is None, frozen.teacher is None) == (bool(config.corpus[0].features),) * 3
            return found

    for pack, same, close in zip(seen(online), seen(offline), seen(half), strict=True):
        for one, other, rounded in zip(pack, same, close, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one, rounded, rtol=2**-10, atol=2**-8)
            assert not torch.equal(other, rounded)
    expected, _ = trained(online, alone)
    found, _ = trained(offline, alone)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)

    network = TransitionTransformer.from_official(online.network.params.model_dump(exclude_none=True), rope=online.network.rope)
    save_model(tmp_path / "model", network.state_dict(), spec_of(offline))
    monkeypatch.chdir(tmp_path)
    generator = Generator.from_pretrained(tmp_path / "model")
    drawn: list[torch.Tensor] = []
    decode = generator.codec.decode
    monkeypatch.setattr(generator.codec, "decode", lambda latents: decode([drawn.append(latent) or latent for latent in latents]))
    [image] = generator("a red image", height=16, width=24, steps=2)
    [pixels] = codecs.make("kl", tmp_path / "kl").decode(drawn)
    assert drawn[0].shape == (6, 8, 12)
    assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())

    (tmp_path / "kl" / "config.json").write_text((tmp_path / "kl" / "config.json").read_text() + " ")
    with pytest.raises(ConfigError, match=r"were encoded with codec\.digest [0-9a-f]{64}, the config has"):
        make_planner(offline)


def test_features_of_other_encoders_are_refused(config: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(tmp_path / "corpus")
    encode(corpus, tmp_path / "features", config, dtype=torch.float32)

    def changed(*overrides: str) -> Config:
        return load_config(config, overrides=[f"run_dir={tmp_path / 'run'}", *overrides])

    check_ready(changed())
    for override, said in (
        ("codec.kind=sd-vae", r"features .* were encoded with codec\.kind pixel, the config has sd-vae"),
        ("network.params.cap_feat_dim=32", r"text\.width 16, the config has 32"),
        ("text.max_tokens=20", r"text\.max_tokens 77, the config has 20"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_ready(changed(override, "network.params.patch_size=1" if "vae" in override else "seed=0"))
    with pytest.raises(ConfigError, match=r"objective\.alignment\.path: missing"):
        check_ready(changed("objective.alignment={kind: dinov2}", "network.params.z_dim=8", "network.params.encoder_depth=1"))
