"""A request as clients write it, and the images that it asks for."""

from __future__ import annotations

import base64
import binascii
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field

from launch.sampling.editing import OpenedEdit, edit_of
from launch.sampling.files.settings import MAX_SEED
from launch.sampling.options import SampleOptions, Wanted, wanted_images
from launch.sampling.prompts.aspect import parse_aspect, size_of_aspect
from launch.serving.limits import Limits
from launch.serving.uploads import Uploads
from pipeline.digests import bytes_digest
from tim import Generator
from tim.sampling.edits import FEATHER

MAX_DRAWN_SEED = 2**32 - 1  # every client's numbers hold it
MAX_FEATHER = 256  # pixels
MAX_GUIDANCE = 1000.0
_LONGEST_LIST = 1000  # the product of all lists is limited by `Limits`

T = TypeVar("T")
Prompt = str | Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
Pixels = Annotated[int, Field(ge=1)]
Border = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Several = Annotated[list[T], Len(1, _LONGEST_LIST)]


class DrawRequest(BaseModel):
    """The images to draw: the product of prompts, sizes, steps, guidance scales and `count` seeds."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: Annotated[Prompt | Several[Prompt], Field(description="Text, or the class of a class model; a list draws each.")]
    negative: Annotated[str | None, Field(description="What guidance leads away from. Default: the unconditional input.")] = None
    width: Annotated[Pixels | None, Field(description="Pixels, drawn exactly.")] = None
    height: Annotated[Pixels | None, Field(description="Pixels, drawn exactly.")] = None
    aspect: Annotated[str | None, Field(max_length=40, description='Instead of width and height: the aspect ratio, such as "21:9".')] = None
    megapixels: Annotated[float | None, Field(gt=0, le=16, description="With aspect: the area; 1 is 1024 x 1024. Default: 1.")] = None
    sizes: Annotated[
        Several[Annotated[list[Pixels], Len(2, 2)]] | None, Field(description="Instead of width and height: pairs [width, height].")
    ] = None
    steps: Annotated[Steps | Several[Steps] | None, Field(description="Number of sampling steps. Default: the model's.")] = None
    guidance: Annotated[Guidance | Several[Guidance] | None, Field(description="Guidance scale; 1: no guidance. Default: the model's.")] = (
        None
    )
    interval: Annotated[
        Annotated[list[Share], Len(2, 2)] | None,
        Field(description="Times at which guidance acts, as shares of the noisiest time. Default: the model's."),
    ] = None
    count: Annotated[int, Field(ge=1, description="Number of images of each kind, with seeds S, S + 1, and so on.")] = 1
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Random seed S. null: drawn, and returned.")] = None
    image: Annotated[str | None, Field(description="Image to start from: a file in base64 (PNG, JPEG, WebP, AVIF).")] = None
    mask: Annotated[str | None, Field(description="With image: a file in base64; white is drawn anew, black stays.")] = None
    extend: Annotated[
        Annotated[list[Border], Len(4, 4)] | None, Field(description="With image: pixels to add at the left, top, right and bottom.")
    ] = None
    strength: Annotated[
        float | None, Field(gt=0, le=1, description="With image: share of noise to start from. Default: 0.6; with mask 1.")
    ] = None
    feather: Annotated[int, Field(ge=0, le=MAX_FEATHER, description="Pixels of the soft transition inside the mask.")] = FEATHER


def images_of(request: DrawRequest, *, generator: Generator, limits: Limits, uploads: Uploads) -> list[Wanted]:
    """The images of a request, complete with the model's defaults and a seed. Raises ValueError: a sentence that names key and limit."""
    prompts = _listed(request.prompt)
    _check_texts([*prompts, *_listed(request.negative)], limits=limits)
    sizes = _sizes(request)
    steps, guidances = _listed(request.steps), _listed(request.guidance)
    _check_counts(request, [len(each) for each in (prompts, sizes, steps, guidances)], limits=limits)
    for count in steps:
        if count > limits.max_steps:
            raise ValueError(f"steps {count}: the limit is {limits.max_steps}")
    for width, height in sizes:
        _check_size(width, height, named="size", limits=limits)
    edit = _edit(request, limits=limits, uploads=uploads)
    if edit is not None:
        _check_size(*edit.edit.image.size, named="image with its borders", limits=limits)
    elif not sizes:
        raise ValueError("width and height: give both, or sizes, or aspect, or an image to start from")
    options = SampleOptions(
        prompts=prompts,
        sizes=[(height, width) for width, height in sizes],
        steps=steps or None,
        guidances=guidances or None,
        seeds=(secrets.randbelow(MAX_DRAWN_SEED - request.count) if request.seed is None else _seed(request),),
        count=request.count,
        negative=request.negative,
        interval=_interval(request),
        edit=edit,
    )
    wanted = wanted_images(options, layout=None, log=lambda _: None)
    return [Wanted(each.request, generator.check(each.image), each.edit) for each in wanted]


def sentence_of(mistake: Mapping[str, Any]) -> str:
    """A mistake that pydantic found, as a sentence that names the key. mistake: one of `ValidationError.errors()`, located in its body."""
    key = str(mistake["loc"][1]) if len(mistake["loc"]) > 1 else "request"  # after "body", "query" or "path"
    given = mistake.get("input")
    shown = f", not {given!r:.60}" if isinstance(given, (str, int, float)) and mistake["type"] not in ("extra_forbidden", "missing") else ""
    message = mistake["msg"][:200]
    return f"{key!r:.80}: {message[:1].lower()}{message[1:]}{shown}".encode("ascii", "replace").decode()


def _listed(value: T | list[T] | None) -> list[T]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_texts(prompts: Sequence[str | int], *, limits: Limits) -> None:
    for prompt in prompts:
        if isinstance(prompt, str) and len(prompt) > limits.max_prompt:
            raise ValueError(f"prompt of {len(prompt):,} characters: the limit is {limits.max_prompt:,}")
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError("prompt: has half of a surrogate pair; send valid Unicode")


def _check_counts(request: DrawRequest, lengths: Sequence[int], *, limits: Limits) -> None:
    images = request.count * math.prod(max(1, length) for length in lengths)
    if images > limits.max_count:
        raise ValueError(f"count: the request asks for {images:,} images, the limit is {limits.max_count}")


def _check_size(width: int, height: int, *, named: str, limits: Limits) -> None:
    if max(width, height) > limits.max_side:
        raise ValueError(f"{named} {width}x{height}: the limit is {limits.max_side} pixels a side")
    if width * height > limits.max_pixels:
        raise ValueError(f"{named} {width}x{height}: has {width * height:,} pixels, the limit is {limits.max_pixels:,}")


def _sizes(request: DrawRequest) -> list[tuple[int, int]]:
    """(width, height) in pixels; empty if none is given."""
    is_sized = request.width is not None or request.height is not None
    given = [name for name, there in (("width and height", is_sized), ("aspect", request.aspect), ("sizes", request.sizes)) if there]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    if request.megapixels is not None and request.aspect is None:
        raise ValueError(f"megapixels {request.megapixels:g}: give the aspect ratio as well, for example 16:9")
    if request.aspect is not None:
        aspect = parse_aspect(request.aspect, option="aspect")
        height, width = size_of_aspect(aspect, megapixels=request.megapixels or 1.0, option="megapixels")
        return [(width, height)]
    if request.sizes is not None:
        return [(width, height) for width, height in request.sizes]
    if not is_sized:
        return []
    if request.width is None or request.height is None:
        raise ValueError("width and height: give both")
    return [(request.width, request.height)]


def _seed(request: DrawRequest) -> int:
    assert request.seed is not None
    if request.seed + request.count - 1 > MAX_SEED:
        raise ValueError(f"seed {request.seed}: with a count of {request.count} it exceeds the largest seed, {MAX_SEED}")
    return request.seed


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
