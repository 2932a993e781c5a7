"""The settings of one sampled image, as its file and `samples.jsonl` record them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.digests import json_digest

FORMAT = 1
MAX_SEED = 2**64 - 1  # torch.Generator.manual_seed takes no larger one
_MACHINE = ("device", "tim_version", "torch_version")  # they change the rounding of an image, not what was asked for

Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Border = Annotated[int, Field(ge=0)]  # pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """A merged LoRA file: its name, its strength, and the sha256 of the file (None: not recorded)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    name: str
    scale: float = 1.0
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one image. None means not recorded, so that the model's default applies.

    prompt and negative: text, or class of a class model. width and height in pixels. `times` replaces `steps`. interval: shares of the
    noisiest time at which guidance acts. seed: None if the image cannot be repeated. device: its kind, such as "cuda". model_digest,
    init_image and mask: sha256. strength: share of the noise range to start at from an initial image; extend: pixels added to it at the
    left, top, right and bottom. second_prompt: mixed in, by its share; variation: seed and share of further noise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    prompt: str | int
    width: Count
    height: Count
    steps: Count | None = None
    guidance: Scale | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    negative: str | int | None = None
    second_prompt: str | int | None = None
    second_share: Share | None = None
    variation: tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], Share] | None = None
    times: tuple[float, ...] | None = None
    interval: tuple[float, float] | None = None
    stochasticity: Scale = 0.0
    dtype: str | None = None
    device: str | None = None
    model: str | None = None
    model_digest: str | None = None
    loras: tuple[LoraSettings, ...] = ()
    init_image: str | None = None
    mask: str | None = None
    extend: tuple[Border, Border, Border, Border] | None = None
    strength: Share | None = None
    feather: Border | None = None
    tim_version: str | None = None
    torch_version: str | None = None

    def to_json(self) -> str:
        """One line of ASCII. Keys without a recorded value are left out."""
        return json.dumps(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The settings as values of JSON, with `format`. Equal settings give equal values."""
        return {"format": FORMAT, **{name: value for name, value in _plain(self).items() if value not in (None, [])}}

    @classmethod
    def from_json(cls, text: str | bytes) -> Settings:
        """Read what `to_json` wrote; unknown keys are ignored.

        Raises:
            ValueError: not an object of JSON, a newer format, or a key that is missing or has a wrong value: one sentence that names it.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the settings are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError("the settings are not a JSON object")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Read what `as_dict` returned. Raises ValueError like `from_json`."""
        written = values.get("format", FORMAT)
        if isinstance(written, bool) or not isinstance(written, int) or not 1 <= written <= FORMAT:
            raise ValueError(f"the settings have format {written!r}, and this version reads up to {FORMAT}: update tim")
        try:
            return _adapter().validate_json(json.dumps(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            shown = "" if first["type"] == "missing" else f", not {first['input']!r:.40}"
            key = "".join(str(part) for part in first["loc"][:1])
            raise ValueError(f"key {key!r} of the settings: {first['msg'][:1].lower()}{first['msg'][1:]}{shown}") from error

    def request(self) -> dict[str, Any]:
        """What was asked for: the settings without device and versions, as values of JSON."""
        return {name: value for name, value in self.as_dict().items() if name not in _MACHINE}

    def digest(self) -> str:
        """sha256 in hexadecimal of `request()`."""
        return json_digest(self.request())


@cache
def _adapter() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)


def _plain(settings: Settings) -> dict[str, Any]:
    """Tuples as lists, and whole numbers in float fields as floats: 2 and 2.0 are the same setting."""
    values = asdict(settings)
    for name in ("prompt", "negative", "second_prompt"):
        values[name] = _text(values[name])
    for name in ("guidance", "stochasticity", "strength", "second_share"):
        values[name] = None if values[name] is None else float(values[name])
    for name in ("times", "interval"):
        values[name] = None if values[name] is None else [float(value) for value in values[name]]
    values["variation"] = None if settings.variation is None else [settings.variation[0], float(settings.variation[1])]
    values["extend"] = None if settings.extend is None else list(settings.extend)
    values["loras"] = [{**lora, "scale": float(lora["scale"])} for lora in values["loras"]]
    return values


def _text(prompt: str | int | None) -> str | int | None:
    """Without lone surrogates, which neither JSON nor a tokenizer accepts."""
    return prompt.encode("utf-8", "replace").decode() if isinstance(prompt, str) else prompt
