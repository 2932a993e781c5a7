"""Codec, text encoder, model folder and the high-level API together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tim.tiny import TINY, TINY_CLASSES
from tim import Generator, ModelSpec, TransitionTransformer, codecs
from tim.model_folder.folder import load_model, save_model
from tim.text import encoders

SPEC = ModelSpec(
    network=TINY,
    rope="rowcol",
    transport={"kind": "ot_fm"},
    codec={"kind": "pixel"},
    text={"kind": "lookup", "max_tokens": 16},
    sampling={"steps": 4, "guidance": 1.0, "interval": [0.0, 1.0], "shift": None},
)


@pytest.fixture
def folder(tiny: TransitionTransformer, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny.state_dict(), SPEC)
    return tmp_path / "model"


def test_pixels_survive_the_codec() -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16)
    codec = codecs.make("pixel")
    latent = codec.encode([image]).means[0]
    assert (float(latent.min()), float(latent.max())) == (-1.0, 1.0)
    assert torch.equal(codec.decode([latent])[0], image)
    assert codec.decode([torch.full((3, 1, 1), 7.0)])[0].tolist() == [[[255]]] * 3


def test_lookup_features_are_fixed_and_tell_captions_apart() -> None:
    encoder, again = encoders.make("lookup", width=16), encoders.make("lookup", width=16)
    a, b, empty, swapped = encoder.encode(["a red circle on blue", "a red circle", "", "a blue circle on red"])
    assert [len(f) for f in (a, b, empty)] == [7, 5, 2]
    assert torch.equal(a, again.encode(["a red circle on blue"])[0])
    assert not torch.allclose(a.sum(0), swapped.sum(0)) or not torch.equal(a, swapped)
    long = encoders.make("lookup", width=16, max_tokens=5).encode(["one two three four five six"])[0]
    assert len(long) == 5


def test_model_folder_round_trip(folder: Path, tiny: TransitionTransformer) -> None:
    network, spec = load_model(folder)
    assert spec == SPEC
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), tiny.state_dict().values(), strict=True))
    assert not folder.with_name("model.tmp").exists()


def test_an_image_depends_on_its_own_arguments_alone(folder: Path) -> None:
    generator = Generator.from_pretrained(folder)
    settings = [("a red circle on blue", 8, 8, 1, 3), ("", 4, 12, 4, 4), ("a cat", 12, 4, 2, 5)]
    prompts, heights, widths, steps, seeds = (list(column) for column in zip(*settings, strict=True))
    generator.tokens_per_pack = 40
    together = generator(prompts, height=heights, width=widths, steps=steps, seed=seeds, guidance=[1.0, 2.0, 1.0])
    assert [image.size for image in together] == [(8, 8), (12, 4), (4, 12)]
    generator.tokens_per_pack = 10_000
    alone = generator("", height=4, width=12, steps=4, seed=4, guidance=2.0)[0]
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(together[1], dtype=int)).max() <= 1
    assert together[1].info["evaluations"] == 8
    by_times = generator("", height=4, width=12, times=[1, 0.75, 0.5, 0.25, 0], seed=4, guidance=2.0)[0]
    assert np.array_equal(np.asarray(by_times), np.asarray(alone))
    other_seed = generator("", height=4, width=12, steps=4, seed=5, guidance=2.0)[0]
    assert np.asarray(other_seed).tobytes() != np.asarray(alone).tobytes()


def test_classes_are_drawn_by_number(tiny_classes: TransitionTransformer, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_classes.state_dict(), replace(SPEC, network=TINY_CLASSES, text=None))
    generator = Generator.from_pretrained(tmp_path / "model")

    def pixels(prompt: int, **arguments: float) -> np.ndarray:
        return np.asarray(generator(prompt, height=8, width=4, guidance=2.0, **arguments)[0], dtype=int)  # pyright: ignore[reportArgumentType]

    together = [np.asarray(image, dtype=int) for image in generator([0, 2, 3], height=8, width=4, guidance=2.0)]
    for number, image in zip((0, 2, 3), together, strict=True):
        assert np.abs(image - pixels(number)).max() <= 1
    assert np.array_equal(pixels(0), pixels(0, negative=3))  # guidance leads away from no class, by default
    assert not np.array_equal(pixels(0), pixels(0, negative=1))
    assert not np.array_equal(pixels(0), pixels(1))
    for prompt, message in {
        "red": "'red': this model takes class ids from 0 to 2",
        4: "class 4: must be from 0 to 2, or 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            generator(prompt, height=8, width=4)


def test_every_setting_of_the_sampler_is_at_hand(folder: Path) -> None:
    generator = Generator.from_pretrained(folder)

    def draw(**settings: Any) -> tuple[bytes, int]:
        image = generator("a red circle", height=8, width=8, seed=4, **{"steps": 4, "guidance": 50.0, **settings})[0]
        return image.tobytes(), image.info["evaluations"]

    plain, partly = draw(), draw(interval=(0.0, 0.5))
    assert (plain[1], partly[1]) == (8, 6)
    assert draw(stochasticity=0.5) == draw(stochasticity=0.5)
    assert len({picture for picture, _ in (plain, partly, draw(negative="a cat"), draw(stochasticity=0.5), draw(guidance=1.0))}) == 5


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    generator = Generator.from_pretrained(folder)
    with pytest.raises(ValueError, match="prompt 3: this model takes text, not class ids"):
        generator(3, height=8, width=8)
    with pytest.raises(ValueError, match=r"3 steps and times \[1, 0\]: give one of them"):
        generator("x", height=8, width=8, steps=3, times=[1, 0])
    with pytest.raises(ValueError, match="different lengths"):
        generator(["x", "y"], height=[8, 8, 8], width=8)
    with pytest.raises(ValueError, match="not a model folder"):
        load_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ValueError, match="format 9, but this version of tim reads format 1"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "network": {**TINY, "depth": 3}}))
    with pytest.raises(ValueError, match="missing keys: blocks"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(folder)
