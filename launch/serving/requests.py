"""A request as clients write it: its keys, those of `tim sample`, their types, and how it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.sampling.files.settings import MAX_SEED
from launch.serving.limits import Limits
from tim.sampling.edits import FEATHER

MAX_FEATHER = 256  # pixels
MAX_GUIDANCE = 1000.0
_LONGEST_LIST = 1000  # the product of all lists is limited by `Limits`

T = TypeVar("T")
Prompt = str | Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Pixels = Annotated[int, Field(ge=1)]
Border = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Several = Annotated[list[T], Len(1, _LONGEST_LIST)]


class DrawRequest(BaseModel):
    """The images to draw: the product of prompts, sizes, steps, guidance scales and seeds. Keys mean what options of `tim sample` do."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    prompt: Annotated[Prompt | Several[Prompt], Field(description="Text, or the class of a class model; a list draws each.")]
    negative: Annotated[str | None, Field(description="Text that guidance leads away from. Default: the unconditional input.")] = None
    width: Annotated[Pixels | None, Field(description="Pixels, drawn exactly.")] = None
    height: Annotated[Pixels | None, Field(description="Pixels, drawn exactly.")] = None
    aspect: Annotated[str | None, Field(max_length=40, description='Instead of width and height: the aspect ratio, such as "21:9".')] = None
    megapixels: Annotated[float | None, Field(gt=0, le=16, description="With aspect: the area; 1 is 1024 x 1024 pixels. Default: 1.")] = (
        None
    )
    sizes: Annotated[
        Several[Annotated[list[Pixels], Len(2, 2)]] | None,
        Field(description="Instead of width and height: pairs [width, height], in pixels."),
    ] = None
    steps: Annotated[Steps | Several[Steps] | None, Field(description="Number of sampling steps. Default: the model's.")] = None
    times: Annotated[
        Annotated[list[float], Len(2, _LONGEST_LIST)] | None,
        Field(description="Sampling times instead of steps, decreasing: 1 (noise) to 0 (image) for ot_fm."),
    ] = None
    guidance: Annotated[Guidance | Several[Guidance] | None, Field(description="Guidance scale; 1: no guidance. Default: the model's.")] = (
        None
    )
    interval: Annotated[
        Annotated[list[Share], Len(2, 2)] | None,
        Field(description="Times at which guidance acts, as shares of the noisiest time: [low, high]. Default: the model's."),
    ] = None
    stochasticity: Annotated[float, Field(ge=0, description="Share of noise replaced in all but the first and last step; ot_fm only.")] = (
        0.0
    )
    count: Annotated[int, Field(ge=1, description="Number of images of each kind, with seeds S, S + 1, and so on.")] = 1
    seed: Annotated[
        Seed | Several[Seed] | None,
        Field(description="Random seed S; a list, without count, draws each. null: a new one, which is returned."),
    ] = None
    zip: Annotated[bool, Field(description="The n-th prompt with the n-th size, steps, guidance and seed, in place of the product.")] = (
        False
    )
    interpolate: Annotated[int, Field(ge=0, description="Number of images between each two prompts, whose outputs are mixed.")] = 0
    variations: Annotated[int, Field(ge=0, description="Number of images near that of each seed, in its place.")] = 0
    variation_share: Annotated[
        Share | None, Field(description="With variations: distance, 0 (the same) to 1 (unrelated). Default: 0.2.")
    ] = None
    image: Annotated[str | None, Field(description="Image to start from: a file in base64 (PNG, JPEG, WebP, AVIF). It gives the size.")] = (
        None
    )
    mask: Annotated[str | None, Field(description="With image: a file in base64, of its size; white is drawn anew, black stays.")] = None
    extend: Annotated[
        Annotated[list[Border], Len(4, 4)] | None,
        Field(description="With image: pixels to add at the left, top, right and bottom. Not with mask."),
    ] = None
    strength: Annotated[
        float | None, Field(gt=0, le=1, description="With image: share of noise to start from. Default: 0.6; with mask 1.")
    ] = None
    feather: Annotated[
        int, Field(ge=0, le=MAX_FEATHER, description="Half the width of the soft transition inside the mask, in pixels.")
    ] = FEATHER


class NotJson(ValueError):
    """A body that cannot be parsed."""


def parsed(body: bytes) -> DrawRequest:
    """The request in a body. Raises NotJson, and ValueError in a sentence that names the key."""
    try:
        return DrawRequest.model_validate_json(body)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    first = mistakes[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", ""))
        if "surrogate" in reason or "hex escape" in reason:
            raise ValueError("a text has half of a surrogate pair: send valid Unicode")
        raise NotJson("the body is not JSON" + f": {reason}"[:120] * bool(reason))
    if not first["loc"]:
        raise ValueError("the body is not an object of JSON: send one, with the keys of /docs")
    raise ValueError(sentence_of(mistakes))


def sentence_of(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """What pydantic found wrong with a request, as a sentence that names the key. mistakes: `errors()`, each located in the request.

    Of several the first counts: in a union or a list, where it is located most precisely.
    """
    of_key = [each for each in mistakes if each["loc"][:1] == mistakes[0]["loc"][:1]]
    mistake = max(of_key, key=lambda each: len(each["loc"]))
    key = str(mistake["loc"][0]) if mistake["loc"] else "request"
    given = mistake.get("input")
    shown = f", not {given!r:.60}" if isinstance(given, (str, int, float)) and mistake["type"] not in ("extra_forbidden", "missing") else ""
    message = mistake["msg"][:200]
    return f"{key!r:.80}: {message[:1].lower()}{message[1:]}{shown}".encode("ascii", "replace").decode()


def schema_of_body(limits: Limits) -> dict[str, Any]:
    """The JSON schema of a request, with the limits of a server."""
    schema = DrawRequest.model_json_schema()
    most = {
        "maximum": {
            **dict.fromkeys(("width", "height", "sizes", "extend"), limits.max_side),
            **dict.fromkeys(("count", "interpolate", "variations"), limits.max_count),
            "steps": limits.max_steps,
        },
        "maxLength": {"prompt": limits.max_prompt, "negative": limits.max_prompt},
        "maxItems": {"times": limits.max_steps + 1},
    }
    kinds = {"maximum": "integer", "maxLength": "string", "maxItems": "array"}
    for bound, keys in most.items():
        for key, value in keys.items():
            for each in _parts(schema["properties"][key]):
                if each.get("type") == kinds[bound]:
                    each[bound] = value
    return schema


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema with those of its alternatives and items."""
    yield schema
    for each in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else [])):
        yield from _parts(each)
