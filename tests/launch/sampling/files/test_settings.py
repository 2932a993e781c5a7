"""The settings of an image as JSON."""

from __future__ import annotations

import json

import pytest

from launch.sampling.files.settings import LoraSettings, Settings

FULL = Settings(
    prompt="a red fox",
    width=512,
    height=128,
    steps=8,
    guidance=2.5,
    seed=2**64 - 1,
    negative="a dog",
    times=(1.0, 0.6, 0.0),
    interval=(0.1, 0.9),
    stochasticity=0.2,
    dtype="fp16",
    device="cuda",
    model="photos",
    model_digest="ab" * 32,
    loras=(LoraSettings(name="style", scale=0.8, digest="cd" * 32), LoraSettings(name="face")),
    init_image="ef" * 32,
    mask="01" * 32,
    strength=0.7,
    tim_version="0.1.0",
    torch_version="2.12",
)


@pytest.mark.parametrize("settings", [FULL, Settings(prompt=7, width=1, height=1, negative=1000), Settings(prompt="", width=1, height=1)])
def test_settings_survive_json(settings: Settings) -> None:
    text = settings.to_json()
    assert Settings.from_json(text) == settings
    assert Settings.from_json(text.encode()) == settings
    assert text.isascii()
    assert "\n" not in text


def test_unknown_keys_are_ignored_and_missing_ones_are_not_recorded() -> None:
    found = Settings.from_json('{"prompt": "a", "width": 2, "height": 3, "colour": "red", "loras": [{"name": "x", "layers": 3}]}')
    assert found == Settings(prompt="a", width=2, height=3, loras=(LoraSettings(name="x"),))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"width": "512"}, "key 'width'"),
        ({"width": 0}, "key 'width'"),
        ({"height": True}, "key 'height'"),
        ({"height": None}, "key 'height'"),
        ({"prompt": None}, "key 'prompt'"),
        ({"guidance": float("nan")}, "key 'guidance'"),
        ({"guidance": -1}, "key 'guidance'"),
        ({"seed": -1}, "key 'seed'"),
        ({"seed": 2**64}, "key 'seed'"),
        ({"steps": 1.5}, "key 'steps'"),
        ({"times": [1, "x"]}, "key 'times'"),
        ({"interval": [1]}, "key 'interval'"),
        ({"loras": [{"scale": 1}]}, "key 'loras'"),
        ({"format": 2}, "format 2.*update tim"),
        ({"format": "1"}, "format '1'"),
    ],
)
def test_a_bad_value_is_named_in_one_sentence(change: dict[str, object], key: str) -> None:
    values = {"prompt": "a", "width": 2, "height": 3, **change}
    with pytest.raises(ValueError, match=key) as raised:
        Settings.from_json(json.dumps(values))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "x", "[]", "3", "[" * 100_000, '{"prompt"', b"\xff\xfe"])
def test_what_is_no_object_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"the settings are not"):
        Settings.from_json(text)


def test_the_digest_is_of_what_was_asked_for() -> None:
    one = Settings(prompt="a", width=2, height=3, guidance=2, seed=0)
    assert one.digest() == Settings(prompt="a", width=2, height=3, guidance=2.0, seed=0, device="cuda", torch_version="2").digest()
    others = [
        Settings(prompt=prompt, width=2, height=3, guidance=guidance, seed=0, negative=negative, dtype=dtype)
        for prompt, guidance, negative, dtype in [("b", 2, None, None), ("a", 2.5, None, None), ("a", 2, "", None), ("a", 2, None, "bf16")]
    ]
    assert len({one.digest(), *(other.digest() for other in others)}) == 5


def test_a_prompt_that_is_no_text_can_be_stored() -> None:
    """Bytes of a command line that are not UTF-8 become lone surrogates, which JSON readers refuse."""
    assert Settings.from_json(Settings(prompt="caf\udce9", width=1, height=1).to_json()).prompt == "caf?"
