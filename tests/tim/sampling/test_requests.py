"""Exact sizes, mixed requests, callbacks, seeds, and every argument that cannot be drawn."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import TINY, TINY_CLASSES, tiny_network
from tim import Generator, ModelSpec, codecs
from tim.sampling.edits import Edit
from tim.sampling.generator import Step
from tim.sampling.packs import sampling_packs, share_of, tokens_within
from tim.sampling.requests import ImageRequest, PromptMix, Variation


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_network(), SPEC, device="cpu")


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_any_size_is_drawn_exactly_and_is_the_middle_of_the_next_multiples(generator: Generator) -> None:
    rng = random.Random(0)
    sizes = [(1, 1), (1, 7), (2, 2), (9, 8), *((rng.randint(1, 20), rng.randint(1, 20)) for _ in range(20))]
    drawn = generator("a", width=[w for w, _ in sizes], height=[h for _, h in sizes], steps=2, seed=list(range(len(sizes))))
    assert [image.size for image in drawn] == sizes
    for seed, ((width, height), image) in enumerate(zip(sizes, drawn, strict=True)):
        whole = generator("a", width=-(-width // 2) * 2, height=-(-height // 2) * 2, steps=2, seed=seed)[0]
        left, top = (whole.width - width) // 2, (whole.height - height) // 2
        assert np.abs(levels(whole.crop((left, top, left + width, top + height))) - levels(image)).max() <= 1


def mixed(count: int, seed: int) -> list[ImageRequest]:
    rng = random.Random(seed)
    return [
        ImageRequest(
            rng.choice(["a red circle", "", "two words", PromptMix("a cat", "a dog", rng.random())]),
            width=rng.randint(1, 24),
            height=rng.randint(1, 24),
            steps=rng.randint(1, 5),
            guidance=rng.choice([1.0, 2.5, 0.0]),
            interval=rng.choice([None, (0.3, 0.8)]),
            negative=rng.choice([None, "a dog"]),
            seed=rng.randrange(2**40),
            stochasticity=rng.choice([0.0, 0.5]),
            variation=rng.choice([None, Variation(3, 0.4)]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.soak)])
def test_an_image_does_not_depend_on_its_neighbours(count: int) -> None:
    generator = Generator(tiny_network(), SPEC, device="cpu", tokens_per_pack=2000)
    alone = Generator(tiny_network(), SPEC, device="cpu", tokens_per_pack=1)
    requests = mixed(count, seed=1)
    by_index = {drawn.index: drawn for drawn in generator.draw(requests)}
    assert sorted(by_index) == list(range(count))
    assert max(drawn.neighbours for drawn in by_index.values()) > 1
    for drawn in alone.draw(requests):
        assert drawn.neighbours == 0
        together = by_index[drawn.index]
        assert np.abs(levels(drawn.image) - levels(together.image)).max() <= 1, requests[drawn.index]
        assert drawn.evaluations == together.evaluations


def test_packs_hold_images_of_similar_steps_up_to_the_limit() -> None:
    costs = [(1, 10), (8, 10), (8, 30), (1, 40), (8, 10), (4, 100)]
    assert sampling_packs(costs, limit=50) == [[2, 1, 4], [5], [3, 0]]


def test_processes_get_as_much_to_do() -> None:
    costs = [(steps, tokens) for _ in range(10) for tokens in (16, 64) for steps in (1, 8)]  # as a product of settings lists them
    for processes in (1, 2, 3, 7):
        shares = [share_of(costs, process=process, processes=processes) for process in range(processes)]
        assert sorted(i for share in shares for i in share) == list(range(len(costs)))
        work = [sum(costs[i][0] * costs[i][1] for i in share) for share in shares]
        assert max(work) - min(work) <= 8 * 64
    assert [share_of(costs[:1], process=process, processes=2) for process in range(2)] == [[0], []]


def test_images_come_one_after_another_and_memory_limits_a_forward(generator: Generator) -> None:
    lengths: list[int] = []
    small = Generator(tiny_network(), SPEC, device="cpu", memory_gb=1e-9 * 32 * 4 * 40 * 20)
    assert small.tokens_per_pack == tokens_within(1e-9 * 32 * 4 * 40 * 20, params=small.network.params, dtype="fp32") < 40
    small.network.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0].tokens)))
    drawn = small.draw([ImageRequest("a", width=10, height=10, steps=1, guidance=2.0)] * 5)
    assert not lengths, "nothing is drawn before it is asked for"
    next(drawn)
    assert lengths == [25, 25], "the halves of guidance go one after the other"
    assert len(list(drawn)) == 4
    whole = generator("a", width=10, height=10, steps=1, guidance=2.0)[0]
    assert np.array_equal(levels(whole), levels(small("a", width=10, height=10, steps=1, guidance=2.0)[0]))


def test_callbacks_tell_every_step_and_the_last_estimate_is_the_image(generator: Generator) -> None:
    seen: list[Step] = []
    latents: list[list[torch.Tensor]] = []

    def watch(step: Step) -> None:
        seen.append(step)
        latents.append(step.latents())

    images = generator(["a", "b"], width=[4, 6], height=4, steps=[3, 1], callback=watch)
    assert [(step.images, step.step, step.steps) for step in seen] == [((0, 1), 1, 3), ((0, 1), 2, 3), ((0, 1), 3, 3)]
    assert [[tuple(latent.shape) for latent in each] for each in latents] == [[(3, 4, 4), (3, 4, 6)]] * 3
    for image, latent in zip(images, latents[-1], strict=True):
        assert np.abs(levels(image) - generator.codec.decode([latent.float()])[0].permute(1, 2, 0).numpy()).max() <= 1

    class Enough(Exception):
        pass

    def stop(step: Step) -> None:
        raise Enough

    with pytest.raises(Enough):
        generator("a", width=4, height=4, callback=stop)


def test_seeds_and_variations(generator: Generator) -> None:
    def draw(**settings: Any) -> bytes:
        return generator("a", width=8, height=8, steps=1, **settings)[0].tobytes()

    assert draw(seed=5) == draw(seed=torch.Generator().manual_seed(5))
    stream = torch.Generator().manual_seed(5)
    assert draw(seed=stream) != draw(seed=stream), "a stream goes on"
    assert draw(seed=5, variation=Variation(6, 0.0)) == draw(seed=5)
    assert (
        np.abs(np.frombuffer(draw(seed=5, variation=Variation(6, 1.0)), np.uint8).astype(int) - np.frombuffer(draw(seed=6), np.uint8)).max()
        <= 1
    )
    assert len({draw(seed=5, variation=Variation(6, share)) for share in (0.0, 0.2, 0.5, 1.0)}) == 4


def test_a_mix_of_prompts_goes_from_one_to_the_other(generator: Generator) -> None:
    def draw(prompt: Any) -> tuple[bytes, int]:
        image = generator(prompt, width=8, height=8, steps=2, guidance=2.0)[0]
        return image.tobytes(), image.info["evaluations"]

    assert draw(PromptMix("a", "b", 0.0)) == draw("a")
    assert draw(PromptMix("a", "b", 1.0)) == draw("b")
    between = draw(PromptMix("a", "b", 0.5))
    assert between[1] == 6
    assert between == draw(PromptMix("b", "a", 0.5))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"width": 0}, "width 0: must be from 1 to 16384 pixels"),
    ({"width": -3}, "width -3: must be from 1 to 16384 pixels"),
    ({"width": 20_000}, "width 20000: must be from 1 to 16384 pixels"),
    ({"width": 8192, "height": 4096}, r"size 8192x4096: has 33,554,432 pixels, the limit is 4096x4096"),
    ({"width": 8.0}, "width 8.0: must be a whole number"),
    ({"width": None}, "an image without width and height: give both, or an image to edit"),
    ({"steps": 0}, "steps 0: must be from 1 to 10000"),
    ({"steps": True}, "steps True: must be a whole number"),
    ({"guidance": float("nan")}, "guidance nan: must be a finite number"),
    ({"guidance": "2"}, "guidance '2': must be a finite number"),
    ({"seed": -1}, "seed -1: must be from 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed 18446744073709551616: must be from 0 to"),
    ({"seed": 1.5}, "seed 1.5: must be a whole number"),
    ({"interval": (0.8, 0.2)}, "its start is after its end"),
    ({"interval": (0.2, float("nan"))}, "guidance interval nan: must be a finite number"),
    ({"interval": (0.2,)}, "give two numbers, its start and its end"),
    ({"stochasticity": -1}, "stochasticity -1: must be at least 0"),
    ({"times": [1.0, 0.5, 0.5]}, "each smaller than the one before"),
    ({"times": [1.0, float("nan")]}, "each smaller than the one before"),
    ({"times": [2.0, 0.0]}, "this transport's times run from 1 to 0"),
    ({"times": [1.0, 0.0], "steps": 2}, "give one of them"),
    ({"variation": Variation(1, 2.0)}, "variation share 2: must be from 0 to 1"),
    ({"variation": Variation(-1, 0.5)}, "variation seed -1"),
    ({"prompt": PromptMix("a", "b", 1.5)}, "share of the second prompt 1.5: must be from 0 to 1"),
    ({"prompt": 3}, "prompt 3: this model takes text, not class ids"),
    ({"negative": 3}, "prompt 3: this model takes text, not class ids"),
    ({"prompt": "a\ud800"}, "half a surrogate pair, which is no character; remove it"),
    ({"negative": "\udcff"}, "half a surrogate pair"),
    ({"prompt": b"a"}, "prompt b'a': this model takes text, not class ids"),
    ({"times": [1, None]}, "give decreasing numbers, from noise to image"),
    ({"times": "abc"}, "give decreasing numbers, from noise to image"),
    ({"times": 0.5}, "give decreasing numbers, from noise to image"),
    ({"interval": 0.5}, "guidance interval 0.5: give two numbers"),
    ({"variation": (1, 0.5)}, "give a tim.sampling.requests.Variation"),
    ({"edit": Image.new("RGB", (8, 8))}, "give a tim.sampling.edits.Edit"),
    ({"edit": Edit(Image.new("RGB", (8, 8)), strength="x")}, "strength x: must be above 0"),  # pyright: ignore[reportArgumentType]
    ({"edit": Edit(Image.new("RGB", (8, 8)), np.zeros((8, 8)))}, "mask: is ndarray; give an image"),  # pyright: ignore[reportArgumentType]
    ({"seed": np.arange(2).reshape(1, 2)}, "must be a whole number"),
    ({"seed": [1, 2], "width": [8, 8, 8]}, "the lists have different lengths: 3 of width, 2 of seed"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_cannot_be_drawn_is_one_sentence(generator: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        generator(**{"prompt": "a", "width": 8, "height": 8, **arguments})
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy_are_numbers(generator: Generator) -> None:
    plain = generator(["a", "b"], width=9, height=8, steps=1, guidance=2.0, seed=[3, 4])
    typed = generator(
        np.array(["a", "b"]),  # pyright: ignore[reportArgumentType]
        width=np.int64(9),  # pyright: ignore[reportArgumentType]
        height=np.uint8(8),  # pyright: ignore[reportArgumentType]
        steps=np.array([1, 1]),  # pyright: ignore[reportArgumentType]
        guidance=np.float32(2),  # pyright: ignore[reportArgumentType]
        seed=np.arange(3, 5),  # pyright: ignore[reportArgumentType]
    )
    assert [image.tobytes() for image in typed] == [image.tobytes() for image in plain]
    request = generator.check(ImageRequest("a", width=8, height=8, seed=np.int64(2)))  # pyright: ignore[reportArgumentType]
    assert type(request.seed) is int, "so that it can be recorded as JSON"


def test_parts_that_do_not_fit_are_one_sentence() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"device": "tpu"}, "device tpu: not a device of this machine; give cpu"),
        ({"device": "cuda:99"}, "device cuda:99: not a device of this machine"),
        ({"dtype": "fp64"}, "dtype fp64: choose one of"),
        ({"dtype": torch.float16}, "dtype torch.float16: choose one of"),
        ({"memory_gb": "x"}, "memory_gb x: must be above 0"),
        ({"codec": codecs.make("pixel", channels=4)}, "codec pixel: has 4 channels, the network 3: give the codec it was trained with"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            Generator(tiny_network(), SPEC, **arguments)
    five = {**TINY, "in_channels": 5}
    spec = replace(SPEC, network=five, codec={"kind": "pixel", "channels": 5})
    with pytest.raises(ValueError, match=r"draws 5 channels, more than image files have: sample its latents with tim\.sample"):
        Generator(tiny_network(five), spec, device="cpu")("a", width=8, height=8)


def test_values_and_arrays_of_numpy_are_those_of_python(generator: Generator) -> None:
    given: dict[str, Any] = {"width": [8, 6], "steps": [1, 2], "guidance": [1.0, 2.0], "seed": [3, 4], "negative": ["c", ""]}
    arrays: dict[str, Any] = {name: np.array(values) for name, values in given.items()}
    arrays |= {"prompt": np.array(["a", "b"]), "height": np.int64(8)}
    drawn = generator(**arrays)
    for image, expected in zip(drawn, generator(["a", "b"], height=8, **given), strict=True):
        assert np.array_equal(levels(image), levels(expected))
    numbers: dict[str, Any] = {"width": np.int64(8), "height": np.int16(6), "steps": np.uint8(1), "guidance": np.float32(2.0)}
    assert generator.check(ImageRequest("a", **numbers)) == generator.check(ImageRequest("a", width=8, height=6, steps=1, guidance=2.0))


def test_defaults_of_a_device_go_with_it() -> None:
    generator = Generator(tiny_network(), SPEC, device="cpu")
    on_cpu = generator.tokens_per_pack
    assert generator.text is not None
    generator("a", width=8, height=8, steps=1)
    generator.to("meta")
    assert generator.tokens_per_pack != on_cpu
    assert (generator.text.device.type, generator.text.is_loaded) == ("meta", False), "the table of the other device is dropped"
    limited = Generator(tiny_network(), SPEC, device="cpu", tokens_per_pack=7)
    assert limited.to("cpu", dtype="bf16").to("cpu").dtype == "bf16"
    assert limited.to("meta").tokens_per_pack == 7


def test_a_model_that_cannot_be_guided_or_found_says_so(tmp_path: Path) -> None:
    spec = ModelSpec(**{name: getattr(SPEC, name) for name in ("rope", "transport", "codec", "sampling")}, network=TINY_CLASSES, text=None)
    network = tiny_network({**TINY_CLASSES, "class_dropout_prob": 0.0})
    if network.null_class is None:
        with pytest.raises(ValueError, match="guidance 2: this model was trained without a null class"):
            Generator(network, spec, device="cpu")(1, width=8, height=8, guidance=2.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ValueError, match="this run has no model/ yet: export a checkpoint with `tim export"):
        Generator.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="memory_gb nan: must be above 0"):
        Generator(tiny_network(), SPEC, memory_gb=float("nan"))


@pytest.mark.parametrize("stochasticity", [0.0, 0.3])
def test_a_shared_stream_gives_each_image_its_own_noise_in_any_pack(generator: Generator, stochasticity: float) -> None:
    stream = torch.Generator().manual_seed(3)
    sizes = ((8, 4, 3), (4, 8, 1), (12, 4, 3), (4, 4, 2))  # packs go by number of steps, not in this order
    requests = [
        ImageRequest("a", width=width, height=height, steps=steps, seed=stream, stochasticity=stochasticity)
        for width, height, steps in sizes
    ]
    together = {drawn.index: drawn for drawn in generator.draw(requests)}
    stream.manual_seed(3)
    for index, request in enumerate(requests):
        (alone,) = generator.draw([request])
        (again,) = generator.draw([together[index].request])
        for other in (alone, again):
            levels = np.asarray(other.image).astype(int) - np.asarray(together[index].image)
            assert np.abs(levels).max() <= 1
