"""Requests: what to draw, one object per image, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from tim.sampling.edits import Edit

Prompt: TypeAlias = str | int  # a text, or a class id for a class model
MAX_PIXELS = 4096 * 4096
MAX_SIDE = 4 * 4096  # of an image much longer than wide
MAX_STEPS = 10_000
MAX_SEED = 2**64 - 1


class PromptMix(NamedTuple):
    """A place between two prompts: the network's outputs for both, mixed. share: of the second, from 0 to 1."""

    first: Prompt
    second: Prompt
    share: float


class Variation(NamedTuple):
    """Noise near that of the image's seed. share: 0 is the image's own noise, 1 that of `seed`."""

    seed: int
    share: float


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image to draw.

    width, height: pixels, from 1 up to 4096 × 4096 in area; None: those of the image to edit.
    steps, guidance, interval: None for the model's defaults; times: a decreasing grid instead of steps, from noise to image.
    seed: of the initial noise, or a `torch.Generator`. The request of a drawn image has a copy of it, in the state that the image started
        from: with that copy it is drawn again, and `get_state()` is what to store.
    negative: what guidance leads away from; None: the empty caption, or no class.
    stochasticity: share of the noise that is replaced in every step but the first and the last (OT-FM only).
    edit: an image to start from, with a mask or without.
    """

    prompt: Prompt | PromptMix
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    times: Sequence[float] | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None
    seed: int | torch.Generator = 0
    negative: Prompt | None = None
    stochasticity: float = 0.0
    variation: Variation | None = None
    edit: Edit | None = None

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Its prompts, with the negative one."""
        positive = (self.prompt.first, self.prompt.second) if isinstance(self.prompt, PromptMix) else (self.prompt,)
        return positive if self.negative is None else (*positive, self.negative)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a completed request."""
        assert self.width is not None
        assert self.height is not None
        return self.width, self.height

    @property
    def grid_steps(self) -> int:
        """Number of steps of a completed request."""
        if self.times is not None:
            return len(self.times) - 1
        assert self.steps is not None
        return self.steps


def completed(request: ImageRequest, *, defaults: Mapping[str, Any], null_prompt: Prompt | None) -> ImageRequest:
    """The request with the model's defaults filled in. defaults: the sampling section of the model.

    Raises ValueError, in a sentence, for an argument out of its range.
    """
    request = replace(request, **{field.name: _plain(getattr(request, field.name)) for field in fields(request)})
    if request.steps is not None and request.times is not None:
        raise ValueError(f"{request.steps} steps and times {request.times}: give one of them")
    steps = request.steps
    if steps is None and request.times is None:
        steps = int(defaults["steps"])
    width, height = request.width, request.height
    if request.edit is not None:
        if not isinstance(request.edit, Edit):
            raise ValueError(f"edit {request.edit!r}: give a tim.sampling.edits.Edit")
        width, height = request.edit.checked_size(width, height)
    filled = replace(
        request,
        width=width,
        height=height,
        steps=steps,
        guidance=float(defaults["guidance"]) if request.guidance is None else request.guidance,
        interval=tuple(defaults["interval"]) if request.interval is None else request.interval,
        negative=null_prompt if request.negative is None else request.negative,
    )
    _check(filled)
    return filled


def requests_of(**arguments: Any) -> list[ImageRequest]:
    """One request per image: a list gives a value to each image, other arguments hold for all. Raises ValueError for unequal lengths."""
    whole = {"times", "interval"}  # sequences that are one value
    lists = {name: value for name, value in arguments.items() if name not in whole and _is_list(value)}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ValueError(f"the lists have different lengths: {given}; give one value for all images, or one for each")
    known = {field.name for field in fields(ImageRequest)}
    assert set(arguments) <= known
    count = next(iter(lengths.values()), 1)
    return [ImageRequest(**{**arguments, **{name: values[i] for name, values in lists.items()}}) for i in range(count)]


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, PromptMix, Variation))


def _plain(value: Any) -> Any:
    """A number or text of NumPy as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _check(request: ImageRequest) -> None:
    check_size(request.width, request.height)
    if request.steps is not None:
        _check_whole(request.steps, named="steps", low=1, high=MAX_STEPS)
    _check_number(request.guidance, named="guidance", low=0)
    _check_number(request.stochasticity, named="stochasticity", low=0)
    if not isinstance(request.seed, torch.Generator):
        _check_whole(request.seed, named="seed", low=0, high=MAX_SEED)
    if request.variation is not None:
        if not isinstance(request.variation, Variation):
            raise ValueError(f"variation {request.variation!r}: give a tim.sampling.requests.Variation(seed, share)")
        _check_whole(request.variation.seed, named="variation seed", low=0, high=MAX_SEED)
        _check_number(request.variation.share, named="variation share", low=0, high=1)
    if isinstance(request.prompt, PromptMix):
        _check_number(request.prompt.share, named="share of the second prompt", low=0, high=1)
    interval = request.interval
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise ValueError(f"guidance interval {interval}: give two numbers, its start and its end")
    for bound in interval:
        _check_number(bound, named="guidance interval")
    if interval[0] > interval[1]:
        raise ValueError(f"guidance interval {tuple(interval)}: its start is after its end")


def check_prompt(prompt: Prompt, *, classes: int | None) -> None:
    """Raise ValueError for a prompt of the wrong type. classes: number of classes of the model, None if it takes text."""
    if classes is not None and (not isinstance(prompt, int) or isinstance(prompt, bool)):
        raise ValueError(f"prompt {prompt!r}: this model takes class ids from 0 to {classes - 1}")
    if classes is None and not isinstance(prompt, str):
        raise ValueError(f"prompt {prompt!r}: this model takes text, not class ids")
    if isinstance(prompt, str) and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"prompt {prompt[:40]!r}: has half a surrogate pair, which is no character; remove it")


def check_size(width: int | None, height: int | None) -> None:
    """Raise ValueError for a size that is missing, below one pixel, or above the limit."""
    if width is None or height is None:
        raise ValueError("an image without width and height: give both, or an image to edit")
    for named, side in (("width", width), ("height", height)):
        _check_whole(side, named=named, low=1, high=MAX_SIDE, unit=" pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"size {width}x{height}: has {width * height:,} pixels, the limit is 4096x4096 ({MAX_PIXELS:,})")


def _check_whole(value: Any, *, named: str, low: int, high: int, unit: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{named} {value!r}: must be a whole number")
    if not low <= value <= high:
        raise ValueError(f"{named} {value}: must be from {low} to {high}{unit}")


def _check_number(value: Any, *, named: str, low: float = -math.inf, high: float = math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{named} {value!r}: must be a finite number")
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{named} {value:g}: must be {limits}")
