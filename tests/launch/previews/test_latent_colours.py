"""A preview of a run on features whose codec is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from dataprep.features.encode import EncodeConfig, encode
from launch.config.load import load_config
from launch.distributed.ranks import Ranks
from launch.encode_job import required_settings
from launch.previews.drawing import Previews
from launch.previews.latent_colours import LatentColours
from tests.pipeline.conftest import Sample, write_corpus
from tests.tim.models import autoencoder


def test_colours_of_latents_stand_in_for_a_missing_codec(tmp_path: Path, alone: Ranks) -> None:
    corpus = write_corpus(tmp_path / "corpus", shards=[[Sample(64, 64, ("a",)), Sample(96, 64, ("b",))]])
    codec = f"codec={{kind: kl, path: {autoencoder(tmp_path / 'kl', 'kl')}}}"
    network = "network.params={patch_size: 2, depth: 1, hidden_size: 8, num_heads: 1, cap_feat_dim: 8}"
    values = [
        f"corpus={{path: {corpus.path}, features: {tmp_path / 'features'}}}",
        codec,
        network,
        "train.steps=1",
        f"run_dir={tmp_path / 'run'}",
    ]
    config = load_config(None, overrides=values)
    assert LatentColours.of(load_config(None, overrides=[f"corpus={corpus.path}", *values[1:]])) is None
    encode(corpus.path, out=tmp_path / "features", config=EncodeConfig.model_validate(required_settings(config)))

    previews = Previews(config, cast(Any, None), cast(Any, None), alone, codec=None, encode=None)
    lines: list[str] = []
    previews.log = lines.append
    section = config.codec.model_dump()
    decoded = previews._load_codec(section).decode([torch.zeros(6, 4, 8)])[0]
    assert not lines
    (tmp_path / "kl" / "diffusion_pytorch_model.safetensors").unlink()
    instead = previews._load_codec(section)
    (image,) = instead.decode([torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))])
    assert image.shape == decoded.shape == (3, 8, 16)
    assert np.array_equal(image[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2), image)
    assert len(image.unique()) > 1
    assert "the preview shows colours of latents, not decoded images" in lines[0]
    with pytest.raises(ValueError, match="without the codec"):
        instead.encode([])
