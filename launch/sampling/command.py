"""From the command line of `tim sample` to its job, in this process or in several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.arguments import (
    check_prompts,
    parse_borders,
    parse_interval,
    parse_scales,
    parse_seeds,
    parse_sizes,
    parse_steps,
    parse_times,
)
from launch.console import Console
from launch.sampling.editing import EditOptions, OpenedEdit, open_edit
from launch.sampling.files.formats import image_format
from launch.sampling.files.image_files import read_settings
from launch.sampling.files.layouts import layout
from launch.sampling.files.settings import Settings
from launch.sampling.job import Drawn, OutputOptions, draw
from launch.sampling.model_source import ModelOptions
from launch.sampling.options import SampleOptions, Wanted, wanted_images
from launch.sampling.processes import deliver, result_of_processes
from launch.sampling.prompts.aspect import checked_size
from launch.sampling.prompts.prompt_files import STANDARD_INPUT
from launch.sampling.prompts.requests import Request
from launch.sampling.prompts.rows import PromptRow
from launch.sampling.recorded import Repeated, model_to_repeat, request_of
from launch.sampling.typed_options import Typed
from tim.model_kinds import MODEL_FORMS

RECORDED = (  # options whose values --like takes from the image, or that it has no use for
    *("texts", "prompt", "prompts", "classes", "size", "aspect", "megapixels", "steps", "guidance", "seed", "count", "zipped", "negative"),
    *("interval", "times", "stochasticity", "extend", "strength", "feather", "interpolate", "variations", "variation_share", "layout"),
)


def run(typed: Typed, *, arguments: Sequence[str], console: Console) -> None:
    """Draw the images and print their paths. arguments: the same command line, for several processes, whose workers print nothing.

    Raises ValueError, in a sentence, for options that do not fit.
    """
    output = _output(typed)
    if "LOCAL_RANK" in os.environ:
        from launch.distributed.torchrun import die_with_launcher  # the supervisor of processes takes long to import

        die_with_launcher()
    elif (processes := typed.processes or _devices(typed)) > 1:
        _in_processes(typed, arguments, processes=processes, console=console)
        return
    done = _draw(typed, output=output, console=console)
    if done is None:
        return
    result = _result(done, folder=output.folder)
    if not deliver(result):
        _print(result, console=console)


def _draw(typed: Typed, *, output: OutputOptions, console: Console) -> Drawn | None:
    if typed.like is not None:
        settings = _settings_to_repeat(typed)
        images = [_repeated(settings, source=typed.like, edit=_edit(typed, recorded=settings))]
        repeated = Repeated(typed.like, settings, must_be_same=typed.model is None and not typed.lora)
        return draw(images, model=_model(typed, recorded=settings), output=output, console=console, repeated=repeated)
    images = wanted_images(_options(typed, _edit(typed)), layout=output.layout, log=console.line)
    return draw(images, model=_model(typed), output=output, console=console)


def _in_processes(typed: Typed, arguments: Sequence[str], *, processes: int, console: Console) -> None:
    """Start several processes with this command, and print their result."""
    if typed.prompts == STANDARD_INPUT:
        raise ValueError(f"--prompts -: {processes} processes cannot share standard input; write the prompts to a file")
    if typed.device is not None:
        raise ValueError(f"--device {typed.device} is for one process; leave it out, or give --processes 1")
    _print(result_of_processes("sample", arguments, processes=processes, console=console), console=console)


def _result(done: Drawn, *, folder: Path) -> dict[str, Any]:
    """The result as values of JSON."""
    images = [{"path": str(folder / sample.file), **sample.settings.as_dict(), **sample.notes} for sample in done.samples]
    grids = [str(grid) for grid in done.grids]
    return {"images": images, "drawn": done.drawn, "grid": grids[0] if grids else None, "grids": grids}


def _print(result: dict[str, Any], *, console: Console) -> None:
    console.result("\n".join([*(image["path"] for image in result["images"]), *result["grids"]]), data=result)


def _output(typed: Typed) -> OutputOptions:
    form = image_format(typed.format, quality=typed.quality, lossless=typed.lossless)
    chosen = None if typed.layout is None else layout(typed.layout)
    return OutputOptions(typed.out, form, not typed.no_metadata, typed.overwrite, chosen)


def _edit(typed: Typed, *, recorded: Settings | None = None) -> OpenedEdit | None:
    """The image to start from. recorded: the settings of the image to repeat, in place of the options."""
    if typed.image is None:
        for name in ("mask", "extend", "strength", "feather"):
            if name in typed.given:
                raise ValueError(f"{typed.option(name)} {getattr(typed, name)}: changes an image; give it with --image FILE")
        return None
    if "feather" in typed.given and typed.mask is None and typed.extend is None:
        raise ValueError(f"--feather {typed.feather}: softens a mask; give it with --mask FILE or --extend L,T,R,B")
    if recorded is not None:
        feather = typed.feather if recorded.feather is None else recorded.feather
        return open_edit(EditOptions(typed.image, typed.mask, recorded.extend, recorded.strength, feather))
    borders = None if typed.extend is None else parse_borders(typed.extend)
    return open_edit(EditOptions(typed.image, typed.mask, borders, typed.strength, typed.feather))


def _options(typed: Typed, edit: OpenedEdit | None) -> SampleOptions:
    repeats = typed.zipped
    times = None if typed.times is None else parse_times(typed.times)
    if typed.steps is not None and times is not None:
        raise ValueError(f"--steps {typed.steps} and --times {typed.times}: give one of them")
    if "variation_share" in typed.given and not typed.variations:
        raise ValueError(f"--variation-share {typed.variation_share:g}: give the number of variations as well, for example --variations 4")
    texts = [*(typed.texts or []), *(typed.prompt or [])]
    return SampleOptions(
        prompts=() if typed.prompts is not None and not texts and not typed.classes else check_prompts(texts, classes=typed.classes or []),
        prompt_file=typed.prompts,
        sizes=_sizes(typed),
        size_name="--size" if typed.aspect is None else f"--aspect {typed.aspect}:",
        steps=None if typed.steps is None else parse_steps(typed.steps, repeats=repeats),
        guidances=None if typed.guidance is None else parse_scales(typed.guidance, repeats=repeats),
        seeds=parse_seeds(typed.seed, repeats=repeats),
        count=typed.count,
        zipped=typed.zipped,
        negative=typed.negative,
        times=times,
        interval=None if typed.interval is None else parse_interval(typed.interval),
        stochasticity=typed.stochasticity,
        between=typed.interpolate,
        variations=typed.variations,
        share=typed.variation_share,
        edit=edit,
    )


def _sizes(typed: Typed) -> list[tuple[int, int]]:
    """(height, width) of --size or --aspect; empty if neither is given."""
    if typed.aspect is not None:
        if typed.size is not None:
            raise ValueError(f"--size {typed.size} and --aspect {typed.aspect}: give one of them")
        return [checked_size(typed.aspect, megapixels=1.0 if typed.megapixels is None else typed.megapixels)]
    if typed.megapixels is not None:
        raise ValueError(f"--megapixels {typed.megapixels:g}: give the aspect ratio as well, for example --aspect 16:9")
    return [] if typed.size is None else parse_sizes(typed.size, repeats=typed.zipped)


def _model(typed: Typed, *, recorded: Settings | None = None) -> ModelOptions:
    """The model of the command line; what it leaves out is that of the image to repeat."""
    model = typed.model or (None if recorded is None else recorded.model)
    if model is None:
        raise ValueError(f"expected MODEL: {MODEL_FORMS} (see `tim sample --help`)")
    options = ModelOptions.typed(model, typed)
    return options if recorded is None else model_to_repeat(options, recorded)


def _settings_to_repeat(typed: Typed) -> Settings:
    """What the file of --like records. Raises ValueError for options that would change the image."""
    assert typed.like is not None
    for name in RECORDED:
        if name in typed.given:
            option = "a prompt" if name in ("texts", "prompt", "prompts", "classes") else typed.option(name)
            raise ValueError(f"--like {typed.like}: repeats the image as it is; leave out {option}")
    return read_settings(typed.like)


def _repeated(settings: Settings, *, source: Path, edit: OpenedEdit | None) -> Wanted:
    row = PromptRow(settings.prompt, str(source))
    image = request_of(settings, source=source, edit=edit)
    request = Request(0, 0, row, settings.height, settings.width, settings.steps, settings.guidance, settings.seed or 0)
    return Wanted(request, image, edit)


def _devices(typed: Typed) -> int:
    """Number of processes by default: one per GPU, for more than one image."""
    import torch

    return 1 if typed.device is not None or typed.like is not None else max(1, torch.cuda.device_count())
