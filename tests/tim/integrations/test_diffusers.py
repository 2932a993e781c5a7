"""The diffusers pipeline: images of `tim.Generator`, through diffusers' scheduler, arguments and outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim import Generator, PackedText, sample
from tim.integrations.diffusers import TransitionPipeline

SIZE: dict[str, Any] = {"height": 8, "width": 12}


@pytest.fixture
def pipeline() -> TransitionPipeline:
    spec = replace(SPEC, sampling={**SPEC.sampling, "shift": 6})
    pipeline = TransitionPipeline(Generator(tiny_network(), spec, device="cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("steps", [1, 4, 17])
def test_steps_of_the_scheduler_equal_ours(pipeline: TransitionPipeline, steps: int) -> None:
    generator = pipeline.generator
    noise = [torch.randn(3, 8, 12, generator=seeded(i)) for i in range(2)]
    features = PackedText.from_features(generator.text.encode(["a", "b"]))  # pyright: ignore[reportOptionalMemberAccess]
    null = PackedText.from_features(generator.text.encode(["", ""]))  # pyright: ignore[reportOptionalMemberAccess]
    request = pipeline._requests("a", None, 1, **SIZE, steps=steps)[0]
    ours = sample(
        generator.network,
        noise,
        features,
        transport=generator.transport,
        times=generator.times_of(request),
        guidance=2.0,
        null_condition=null,
    )
    theirs = pipeline(["a", "b"], **SIZE, num_inference_steps=steps, guidance_scale=2.0, latents=torch.stack(noise), output_type="latent")
    images: Tensor = theirs.images
    torch.testing.assert_close(images, torch.stack(ours.latents), rtol=1e-5, atol=1e-5)


def test_arguments_and_outputs_are_those_of_diffusers(pipeline: TransitionPipeline) -> None:
    settings: dict[str, Any] = {**SIZE, "num_inference_steps": 2, "guidance_scale": 2.0}
    seen: list[tuple[int, float, list[str]]] = []

    def watch(pipe: TransitionPipeline, step: int, timestep: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is pipeline
        seen.append((step, timestep, sorted(tensors)))
        return {}

    names = ["latents", "model_output"]
    drawn = pipeline("a", **settings, generator=seeded(3), callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names).images
    assert [image.size for image in drawn] == [(12, 8)]
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] == 1000
    assert seen[0][2] == names
    ours = pipeline.generator("a", height=8, width=12, steps=2, guidance=2.0, seed=3)[0]
    assert np.abs(np.asarray(drawn[0], dtype=int) - np.asarray(ours, dtype=int)).max() <= 1
    values = pipeline("a", **settings, generator=seeded(3), output_type="np", return_dict=False)[0]
    assert values.shape == (1, 8, 12, 3)
    assert np.abs(values[0] * 255 - np.asarray(drawn[0])).max() < 1e-3
    assert pipeline("a", **settings, generator=seeded(3), output_type="pt").images.shape == (1, 3, 8, 12)
    several = pipeline(["a", "b"], **settings, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], negative_prompt="c").images
    assert len(several) == 4
    assert len({image.tobytes() for image in several}) == 4


def test_a_callback_can_change_the_latents_and_stop(pipeline: TransitionPipeline) -> None:
    steps: list[int] = []

    def zero(pipe: TransitionPipeline, step: int, timestep: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        pipe.interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline("a", **SIZE, num_inference_steps=5, callback_on_step_end=zero, output_type="latent").images
    assert steps == [0, 1]
    assert not latents.any()


def test_a_saved_pipeline_draws_the_same(pipeline: TransitionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    again = TransitionPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {**SIZE, "num_inference_steps": 2}
    one, other = (pipe("a", **settings, generator=seeded(0)).images[0].tobytes() for pipe in (pipeline, again))
    assert one == other
    assert Generator.from_pretrained(tmp_path / "model", device="cpu")("a", height=8, width=12)[0].size == (12, 8)
    half = TransitionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert half.generator.dtype == "bf16"
    assert half.to(torch.float32).generator.dtype == "fp32"
    assert half.to("cpu").device.type == "cpu"


def test_a_pipeline_is_saved_whole_or_not_at_all(pipeline: TransitionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(pipeline.scheduler), "save_pretrained", full)
    for name in ("model", "new"):
        with pytest.raises(OSError, match="no space left"):
            pipeline.save_pretrained(tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_mistakes_are_one_sentence(pipeline: TransitionPipeline, tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("output_type 'jpg': choose pil, np, pt or latent", {"output_type": "jpg"}),
        (
            "callback_on_step_end_tensor_inputs noise: this pipeline has latents, model_output",
            {"callback_on_step_end_tensor_inputs": ["noise"]},
        ),
        ("2 generators for 1 images", {"generator": [seeded(0), seeded(1)]}),
        (r"latents of shape \(1, 3, 4, 4\): expected \(1, 3, 8, 12\)", {"latents": torch.zeros(1, 3, 4, 4)}),
        ("num_images_per_prompt 0: must be a whole number", {"num_images_per_prompt": 0}),
        ("2 negative prompts for 1 prompts", {"negative_prompt": ["a", "b"]}),
        ("width 0: must be from 1", {"width": 0}),
        ("steps 0: must be from 1", {"num_inference_steps": 0}),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            pipeline(**{"prompt": "a", **SIZE, **arguments})
    with pytest.raises(ValueError, match="transport trigflow: diffusers' scheduler takes steps of ot_fm only"):
        TransitionPipeline(Generator(tiny_network(), replace(SPEC, transport={"kind": "trigflow"}), device="cpu"))
    with pytest.raises(ValueError, match=r"variant: TransitionPipeline\.from_pretrained takes torch_dtype and scheduler"):
        TransitionPipeline.from_pretrained(tmp_path, variant="fp16")
