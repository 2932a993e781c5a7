"""The `parameters` text of A1111's web UI, which civitai, ComfyUI and most viewers read.

    a red fox
    Negative prompt: a dog
    Steps: 8, Sampler: TiM, CFG scale: 2.5, Seed: 0, Size: 512x512, Model hash: 0123456789, Model: photos, Version: tim 0.1.0

Written and read by the rules of its `modules/infotext_utils.py`: values with a comma, colon or line end are quoted as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from launch.sampling.files.settings import MAX_SEED, Settings

SAMPLER = "TiM"
_PARAMETER = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_REMARK = re.compile(r"hash|^(Version|Hashes)", re.ASCII | re.IGNORECASE)  # names of parameters that change no image
_HASH_DIGITS = 10  # of a digest, as A1111 shows it
_LONGEST_LINE = 1 << 14  # characters of a line of parameters that is parsed
_LONGEST_VALUE = 200  # characters of a value that is written


def to_a1111(settings: Settings, *, longest: int | None = None) -> str:
    """The settings as A1111's text, without NUL characters. longest: characters that are kept of each prompt."""
    lines = [_shortened(_name(settings.prompt), longest)]
    if settings.negative is not None:
        lines.append(f"{_NEGATIVE} {_shortened(_name(settings.negative), longest)}")
    lines.append(", ".join(f"{name}: {_quoted(value[:_LONGEST_VALUE])}" for name, value in _parameters(settings)))
    return "\n".join(lines).replace("\0", "").encode("utf-8", "replace").decode()


def from_a1111(text: str, *, width: int, height: int) -> Settings | None:
    """The settings in A1111's text, as far as it has them; None if its last line is none of parameters. Size: that of the image."""
    *lines, last = text.strip().split("\n")
    found = parameters_of(last)
    if not found:
        return None
    negative_line = next((index for index, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[negative_line:]).strip().removeprefix(_NEGATIVE).strip()
    return Settings(
        prompt="\n".join(lines[:negative_line]).strip(),
        negative=negative or None,
        width=width,
        height=height,
        steps=_whole(found.get("Steps"), low=1, high=1 << 31),
        guidance=_scale(found.get("CFG scale")),
        seed=_whole(found.get("Seed"), low=0, high=MAX_SEED),
        model=found.get("Model") or None,
    )


def parameters_of(text: str) -> dict[str, str]:
    """The parameters in the last line of A1111's text, by name; empty if it is none of parameters."""
    last = text.strip().rpartition("\n")[2]
    found = dict(_PARAMETER.findall(last)) if len(last) <= _LONGEST_LINE else {}
    return {name: _unquoted(value) for name, value in found.items()} if len(found) >= 3 and "Steps" in found else {}


def as_asked(settings: Settings, parameters: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """What A1111 was asked for in place of what it drew, and the parameters that this leaves out, such as "Sampler: Euler a".

    Size is that of the request, unless the image was enlarged afterwards; strength that of image to image. settings: by `from_a1111`.
    """
    is_enlarged = any(name.startswith("Hires") for name in parameters)
    size = _SIZE.fullmatch(parameters.get("Size", ""))
    strength = _scale(parameters.get("Denoising strength"))
    loaded = {"Steps": settings.steps, "CFG scale": settings.guidance, "Seed": settings.seed}
    if size is not None and not is_enlarged:
        settings = replace(settings, width=int(size[1]), height=int(size[2]))
        loaded["Size"] = settings.width
    if strength is not None and 0 < strength <= 1 and not is_enlarged:
        settings = replace(settings, strength=strength)
        loaded["Denoising strength"] = strength
    left_out = {name: value for name, value in parameters.items() if loaded.get(name) is None and not _REMARK.search(name)}
    return settings, [f"{name}: {value}" for name, value in left_out.items() if (name, value) != ("Sampler", SAMPLER)]


def _parameters(settings: Settings) -> Iterator[tuple[str, str]]:
    steps = settings.steps if settings.times is None else len(settings.times) - 1
    if steps is not None:
        yield "Steps", str(steps)
    yield "Sampler", SAMPLER
    if settings.guidance is not None:
        yield "CFG scale", f"{settings.guidance:g}"
    if settings.seed is not None:
        yield "Seed", str(settings.seed)
    yield "Size", f"{settings.width}x{settings.height}"
    if settings.model_digest is not None:
        yield "Model hash", settings.model_digest[:_HASH_DIGITS]
    if settings.model is not None:
        yield "Model", settings.model
    if settings.strength is not None:
        yield "Denoising strength", f"{settings.strength:g}"
    if settings.interval is not None:
        yield "Guidance interval", ",".join(f"{end:g}" for end in settings.interval)
    if settings.times is not None:
        yield "Times", ",".join(f"{time:g}" for time in settings.times)
    if settings.stochasticity:
        yield "Stochasticity", f"{settings.stochasticity:g}"
    if settings.loras:
        yield "LoRAs", ", ".join(f"{lora.name}: {lora.scale:g}" for lora in settings.loras)
    hashes = [f"{lora.name}: {lora.digest[:_HASH_DIGITS]}" for lora in settings.loras if lora.digest]
    if hashes:
        yield "Lora hashes", ", ".join(hashes)
    if settings.tim_version is not None:
        yield "Version", f"tim {settings.tim_version}"


def _name(prompt: str | int) -> str:
    return prompt if isinstance(prompt, str) else f"class {prompt}"


def _shortened(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except (ValueError, RecursionError):
            return value
    return value


def _whole(value: str | None, *, low: int, high: int) -> int | None:
    if value is None or not re.fullmatch(r"\d{1,20}", value.strip(), re.ASCII) or not low <= int(value) <= high:
        return None
    return int(value)


def _scale(value: str | None) -> float | None:
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
