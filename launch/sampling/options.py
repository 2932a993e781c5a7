"""What `tim sample` is asked for, and the images that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from launch.sampling.editing import OpenedEdit
from launch.sampling.files.layouts import Layout, distinct_rows
from launch.sampling.prompts.prompt_files import read_prompts
from launch.sampling.prompts.requests import Request, expand
from launch.sampling.prompts.rows import MAX_COUNT, PromptRow, argument_rows
from tim.sampling.requests import ImageRequest, PromptMix, Variation


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """Options that decide which images are drawn; None: the model's default.

    prompt_file: `-` for standard input; sizes: (height, width) in pixels; size_name: what gave them, for messages; between: number of
    images between two consecutive prompts; variations: number of images near each seed, `share` away from it; edit: the image to start
    from.
    """

    prompts: Sequence[str | int] = ()
    prompt_file: str | None = None
    sizes: Sequence[tuple[int, int]] = ()
    size_name: str = "--size"
    steps: Sequence[int] | None = None
    guidances: Sequence[float] | None = None
    seeds: Sequence[int] = (0,)
    count: int | None = None
    zipped: bool = False
    negative: str | None = None
    times: Sequence[float] | None = None
    interval: tuple[float, float] | None = None
    stochasticity: float = 0.0
    between: int = 0
    variations: int = 0
    share: float = 0.2
    edit: OpenedEdit | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to draw. request: its place among the prompts; image: what the generator is asked for; edit: what it starts from."""

    request: Request
    image: ImageRequest
    edit: OpenedEdit | None = None


def wanted_images(options: SampleOptions, *, layout: Layout | None, log: Callable[[str], None]) -> list[Wanted]:
    """The images of a command, in order. log: receives remarks about the prompt file. Raises ValueError for options that do not fit."""
    sizes = options.sizes
    if options.edit is not None and not sizes:
        image = options.edit.edit.image
        sizes = [(image.height, image.width)]
    for option, given in (("--interpolate", options.between), ("--variations", options.variations)):
        if given > MAX_COUNT:
            raise ValueError(f"{option} {given}: at most {MAX_COUNT:,}")
    count = options.count if options.count is not None else 1 if layout is None else layout.count
    requests = expand(
        _rows(options, layout=layout, log=log),
        sizes=sizes,
        steps=(None,) if options.steps is None else options.steps,
        guidances=(None,) if options.guidances is None else options.guidances,
        seeds=options.seeds,
        count=count,
        zipped=options.zipped,
    )
    if options.edit is not None:
        _check_edited(requests, options)
    return [Wanted(each, _image(each, variation, options), options.edit) for each, variation in _varied(requests, options)]


def _check_edited(requests: Sequence[Request], options: SampleOptions) -> None:
    """Raise ValueError, which names where the size comes from, if a request has another size than the image to edit."""
    assert options.edit is not None
    own = options.edit.edit.image.size
    for each in requests:
        if (each.width, each.height) != own:
            named = options.size_name if each.row.size is None else f"{each.row.place}: size"
            was = f"the image to edit has {own[0]}x{own[1]}"
            raise ValueError(f"{named} {each.width}x{each.height}: {was}; leave the size out, or resize the image")


def _rows(options: SampleOptions, *, layout: Layout | None, log: Callable[[str], None]) -> list[PromptRow]:
    if options.prompt_file is None:
        rows = argument_rows(options.prompts)
    elif options.prompts:
        raise ValueError(f"--prompts {options.prompt_file}: cannot be combined with other prompts; add them to the file")
    else:
        rows = list(read_prompts(options.prompt_file, known=() if layout is None else layout.columns, log=log))
    if layout is not None:
        rows = distinct_rows(rows)
    return _between(rows, options.between) if options.between else rows


def _between(rows: Sequence[PromptRow], count: int) -> list[PromptRow]:
    """The prompts with `count` more between each two. Raises ValueError for fewer than two."""
    if len(rows) < 2:
        raise ValueError(f"--interpolate {count}: give two prompts or more, to draw the images between them")
    found: list[PromptRow] = []
    for first, second in pairwise(rows):
        steps = [replace(first, second=second.prompt, share=k / (count + 1)) for k in range(1, count + 1)]
        found += [first, *steps]
    return [*found, rows[-1]]


def _varied(requests: Sequence[Request], options: SampleOptions) -> Iterator[tuple[Request, Variation | None]]:
    """Each request, or `variations` of it."""
    for request in requests:
        if not options.variations:
            yield request, None
        for k in range(options.variations):
            yield replace(request, repeat=request.repeat * options.variations + k), Variation(k, options.share)


def _image(request: Request, variation: Variation | None, options: SampleOptions) -> ImageRequest:
    row = request.row
    times = options.times if row.steps is None else None
    return ImageRequest(
        prompt=row.prompt if row.second is None else PromptMix(row.prompt, row.second, row.share),
        width=request.width,
        height=request.height,
        steps=None if times is not None else request.steps,
        times=times,
        guidance=request.guidance,
        interval=options.interval,
        seed=request.seed,
        negative=request.negative if request.negative is not None else options.negative,
        stochasticity=options.stochasticity,
        variation=variation,
        edit=None if options.edit is None else options.edit.edit,
    )
