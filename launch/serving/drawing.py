"""The images that a request asks for, within the limits of the server."""

from __future__ import annotations

import base64
import binascii
import math
import re
import secrets
from collections.abc import Sequence
from typing import TypeVar

from launch.sampling.editing import OpenedEdit, edit_of
from launch.sampling.files.settings import MAX_SEED
from launch.sampling.options import SampleOptions, Wanted, wanted_images
from launch.sampling.prompts.aspect import checked_size
from launch.serving.limits import Limits
from launch.serving.requests import DrawRequest
from launch.serving.uploads import Uploads
from pipeline.digests import bytes_digest
from tim import Generator

MAX_DRAWN_SEED = 2**32 - 1  # every client's numbers hold it
_SHARE = 0.2  # of variations, as in `tim sample`
_OPTION = re.compile(r"--([a-z]+)(?:-([a-z]+))?")  # the command's name of a key, in messages

T = TypeVar("T")


def images_of(request: DrawRequest, *, generator: Generator, limits: Limits, uploads: Uploads) -> list[Wanted]:
    """The images of a request, complete with the model's defaults and a seed. Raises ValueError: a sentence that names key and limit."""
    prompts = _listed(request.prompt)
    _check_texts([*prompts, *_listed(request.negative)], limits=limits)
    sizes = _sizes(request)
    steps, guidances = _listed(request.steps), _listed(request.guidance)
    _check_counts(request, [len(each) for each in (sizes, steps, guidances, _listed(request.seed))], limits=limits)
    _check_steps(request, limits=limits)
    key = "sizes" if request.sizes is not None else "width and height" if request.aspect is None else f"aspect {request.aspect}: size"
    for width, height in sizes:
        check_size(width, height, named=key, limits=limits)
    edit = _edit(request, limits=limits, uploads=uploads)
    if edit is not None:
        check_size(*edit.edit.image.size, named="image with its borders", limits=limits)
    elif not sizes:
        raise ValueError("width and height: give both, or sizes, or aspect, or an image to start from")
    options = SampleOptions(
        prompts=prompts,
        sizes=[(height, width) for width, height in sizes],
        size_name=key,
        steps=steps or None,
        guidances=guidances or None,
        seeds=_seeds(request),
        count=request.count,
        zipped=request.zip,
        negative=request.negative,
        times=request.times,
        interval=_interval(request),
        stochasticity=request.stochasticity,
        between=request.interpolate,
        variations=request.variations,
        share=_SHARE if request.variation_share is None else request.variation_share,
        edit=edit,
    )
    try:
        wanted = wanted_images(options, layout=None, log=lambda _: None)
    except ValueError as error:
        raise ValueError(_OPTION.sub(lambda found: "_".join(filter(None, found.groups())), str(error))) from error
    return [Wanted(each.request, generator.check(each.image), each.edit) for each in wanted]


def check_size(width: int, height: int, *, named: str, limits: Limits) -> None:
    """Raises ValueError for a size above the limits. named: in the message."""
    if max(width, height) > limits.max_side:
        raise ValueError(f"{named} {width}x{height}: the limit is {limits.max_side} pixels a side")
    if width * height > limits.max_pixels:
        raise ValueError(f"{named} {width}x{height}: has {width * height:,} pixels, the limit is {limits.max_pixels:,}")


def _listed(value: T | list[T] | None) -> list[T]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_texts(prompts: Sequence[str | int], *, limits: Limits) -> None:
    for prompt in prompts:
        if isinstance(prompt, str) and len(prompt) > limits.max_prompt:
            raise ValueError(f"prompt of {len(prompt):,} characters: the limit is {limits.max_prompt:,}")
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError("prompt: has half of a surrogate pair; send valid Unicode")


def _check_counts(request: DrawRequest, lengths: Sequence[int], *, limits: Limits) -> None:
    """lengths: of the lists besides the prompts."""
    prompts = len(_listed(request.prompt))
    prompts += (prompts - 1) * request.interpolate
    images = max(prompts, *lengths) if request.zip else prompts * math.prod(max(1, length) for length in lengths)
    images *= request.count * max(1, request.variations)
    if images > limits.max_count:
        raise ValueError(f"count: the request asks for {images:,} images, the limit is {limits.max_count}")


def _check_steps(request: DrawRequest, *, limits: Limits) -> None:
    if request.steps is not None and request.times is not None:
        raise ValueError("steps and times: give one of them")
    for count in _listed(request.steps):
        if count > limits.max_steps:
            raise ValueError(f"steps {count}: the limit is {limits.max_steps}")
    if request.times is not None and len(request.times) - 1 > limits.max_steps:
        raise ValueError(f"times: has {len(request.times) - 1} steps, the limit is {limits.max_steps}")
    if request.variation_share is not None and not request.variations:
        raise ValueError(f"variation_share {request.variation_share:g}: give the number of variations as well")


def _sizes(request: DrawRequest) -> list[tuple[int, int]]:
    """(width, height) in pixels; empty if none is given."""
    is_sized = request.width is not None or request.height is not None
    given = [name for name, there in (("width and height", is_sized), ("aspect", request.aspect), ("sizes", request.sizes)) if there]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    if request.megapixels is not None and request.aspect is None:
        raise ValueError(f"megapixels {request.megapixels:g}: give the aspect ratio as well, for example 16:9")
    if request.aspect is not None:
        height, width = checked_size(request.aspect, megapixels=request.megapixels or 1.0, names=("aspect", "megapixels"))
        return [(width, height)]
    if request.sizes is not None:
        return [(width, height) for width, height in request.sizes]
    if not is_sized:
        return []
    if request.width is None or request.height is None:
        raise ValueError("width and height: give both")
    return [(request.width, request.height)]


def _seeds(request: DrawRequest) -> list[int]:
    if request.seed is None:
        return [secrets.randbelow(MAX_DRAWN_SEED - request.count)]
    seeds = _listed(request.seed)
    if len(seeds) == 1 and seeds[0] + request.count - 1 > MAX_SEED:
        raise ValueError(f"seed {seeds[0]}: with a count of {request.count} it exceeds the largest seed, {MAX_SEED}")
    return seeds


def _interval(request: DrawRequest) -> tuple[float, float] | None:
    if request.interval is None:
        return None
    low, high = request.interval
    if low > high:
        raise ValueError(f"interval {low:g} to {high:g}: give the smaller number first")
    return low, high


def _edit(request: DrawRequest, *, limits: Limits, uploads: Uploads) -> OpenedEdit | None:
    if request.image is None:
        for named, value in (("mask", request.mask), ("extend", request.extend), ("strength", request.strength)):
            if value is not None:
                raise ValueError(f"{named}: changes an image; give image as well")
        return None
    extend = None
    if request.extend is not None:
        left, top, right, bottom = extend = (request.extend[0], request.extend[1], request.extend[2], request.extend[3])
        if max(left + right, top + bottom) > limits.max_side:
            raise ValueError(f"extend {left},{top},{right},{bottom}: the limit is {limits.max_side} pixels a side")
    data = _decoded(request.image, named="image", limits=limits)
    mask_data = None if request.mask is None else _decoded(request.mask, named="mask", limits=limits)
    image = uploads.image(data, named="image")
    mask = None if mask_data is None else uploads.mask(mask_data, named="mask")
    edit = edit_of(image, mask, extend=extend, strength=request.strength, feather=request.feather)
    return OpenedEdit(edit, bytes_digest(data), None if mask_data is None else bytes_digest(mask_data), extend)


def _decoded(text: str, *, named: str, limits: Limits) -> bytes:
    """The bytes of a file in base64, also of a data URL."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    if len(body) > limits.max_upload * 4 // 3 + 4:
        raise ValueError(f"{named}: the limit of a file is {limits.max_upload_mb} MB")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{named}: is not base64; give the bytes of an image file in base64") from None
    if not data:
        raise ValueError(f"{named}: is empty; give the bytes of an image file in base64")
    return data
