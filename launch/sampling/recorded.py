"""From a request to the settings that an image's file records, and back for `tim sample --like`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from launch.sampling.editing import OpenedEdit
from launch.sampling.files.settings import LoraSettings, Settings
from launch.sampling.loras import Lora
from launch.sampling.model_source import ModelOptions
from pipeline.digests import file_digest, json_digest
from tim import Generator
from tim.model_kinds import Dtype
from tim.pretrained.hub import HUB
from tim.sampling.requests import ImageRequest, PromptMix, Variation


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What an image's file records of the model that drew it."""

    name: str
    digest: str
    loras: tuple[LoraSettings, ...]
    dtype: str
    device: str

    @classmethod
    def of(cls, generator: Generator, *, path: str | Path, digest: str, loras: Sequence[Lora]) -> ModelFacts:
        """path, digest: of the model; the path as typed."""
        merged = tuple(LoraSettings(name=str(lora.path), scale=lora.scale, digest=_digest(lora.path)) for lora in loras)
        name = str(path) if str(path).startswith(HUB) else str(Path(path))
        return cls(name, digest, merged, generator.dtype, generator.device.type)


@dataclass(frozen=True, slots=True)
class Repeated:
    """An image to repeat. source: its file; must_be_same: whether the model and LoRAs are those that the file names."""

    source: Path
    settings: Settings
    must_be_same: bool

    def differences(self, facts: ModelFacts) -> list[str]:
        """What makes the repeated image another one, a remark each. Raises ValueError if a model or LoRA that must be the same is not."""
        recorded = self.settings
        then, now = ([(lora.digest, lora.scale) for lora in loras] for loras in (recorded.loras, facts.loras))
        other = "model" if recorded.model_digest not in (None, facts.digest) else "LoRA" if recorded.model_digest and then != now else None
        if other is not None and self.must_be_same:
            raise ValueError(
                f"--like {self.source}: the {other} has changed since it was drawn; give MODEL (and --lora) as it was, "
                f"or {facts.name} to draw with what it is now"
            )
        remarks = [] if other is None else [f"--like {self.source}: was drawn with another {other}, so this will be another image"]
        machine = {"device": (recorded.device, facts.device), "dtype": (recorded.dtype, facts.dtype)}
        machine |= {"tim": (recorded.tim_version, version("tim")), "torch": (recorded.torch_version, version("torch"))}
        others = [f"{name} {before}, not {after}" for name, (before, after) in machine.items() if before not in (None, after)]
        if others:
            remarks.append(f"--like {self.source}: was drawn with {', '.join(others)}: its pixels may differ by rounding")
        return remarks


def settings_of(image: ImageRequest, *, model: ModelFacts, edit: OpenedEdit | None) -> Settings:
    """The settings of a completed request."""
    first, second, share = image.prompt if isinstance(image.prompt, PromptMix) else (image.prompt, None, None)
    width, height = image.size
    assert isinstance(image.seed, int)
    return Settings(
        prompt=first,
        second_prompt=second,
        second_share=share,
        width=width,
        height=height,
        steps=image.steps,
        times=None if image.times is None else tuple(image.times),
        guidance=image.guidance,
        interval=image.interval,
        seed=image.seed,
        negative=image.negative,
        stochasticity=image.stochasticity,
        variation=None if image.variation is None else (image.variation.seed, image.variation.share),
        init_image=None if edit is None else edit.image,
        mask=None if edit is None else edit.mask,
        extend=None if edit is None else edit.extend,
        strength=None if edit is None else edit.edit.strength,
        feather=None if edit is None else edit.edit.feather,
        dtype=model.dtype,
        device=model.device,
        model=model.name,
        model_digest=model.digest,
        loras=model.loras,
        tim_version=version("tim"),
        torch_version=version("torch"),
    )


def request_of(settings: Settings, *, source: Path, edit: OpenedEdit | None) -> ImageRequest:
    """The request that a file records. source: the file, for messages; edit: the image and mask it was drawn from, if any.

    Raises ValueError if the seed is not recorded, or if the image or the mask is missing or another one.
    """
    if settings.seed is None:
        raise ValueError(f"--like {source}: records no seed, so it cannot be repeated")
    for option, recorded, given in (
        ("--image", settings.init_image, None if edit is None else edit.image),
        ("--mask", settings.mask, None if edit is None else edit.mask),
    ):
        if recorded != given:
            why = "was drawn without it" if recorded is None else "was drawn from another file" if given else "was drawn from such a file"
            raise ValueError(f"{option}: {source} {why}; {'leave it out' if recorded is None else f'give the one of sha256 {recorded}'}")
    prompt = settings.prompt
    if settings.second_prompt is not None:
        prompt = PromptMix(settings.prompt, settings.second_prompt, settings.second_share or 0.0)
    return ImageRequest(
        prompt=prompt,
        width=settings.width,
        height=settings.height,
        steps=None if settings.times is not None else settings.steps,
        times=settings.times,
        guidance=settings.guidance,
        interval=settings.interval,
        seed=settings.seed,
        negative=settings.negative,
        stochasticity=settings.stochasticity,
        variation=None if settings.variation is None else Variation(*settings.variation),
        edit=None if edit is None else edit.edit,
    )


def model_to_repeat(model: ModelOptions, settings: Settings) -> ModelOptions:
    """The model of the command line, with the LoRAs, precision and CPU of an image to repeat where the command line names none."""
    loras = model.loras or [Lora(Path(lora.name), lora.scale) for lora in settings.loras]
    dtype = model.dtype or next((known for known in get_args(Dtype) if known == settings.dtype), None)
    model = replace(model, loras=loras, dtype=dtype)
    if settings.device == "cpu" and model.device is None:
        return replace(model, device="cpu", device_reason="as the image to repeat")
    return model


def _digest(path: Path) -> str:
    """sha256 of a LoRA file, or of the files of a PEFT folder."""
    if path.is_file():
        return file_digest(path)
    files = {file.name: file_digest(file) for file in sorted(path.iterdir()) if file.is_file()}
    return json_digest(files)
