"""`tim sample`: every image to its own file as soon as it is finished, then the grid. What is there already is not drawn again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from launch.console import Console
from launch.sampling.cut_prompts import cut_prompts
from launch.sampling.files.formats import ImageFormat
from launch.sampling.files.grids import write_grids
from launch.sampling.files.image_files import write_image
from launch.sampling.files.layouts import Layout
from launch.sampling.files.names import check_distinct, check_folder, file_name, plan_images
from launch.sampling.files.samples_file import Sample, append_sample, read_samples
from launch.sampling.files.settings import Settings
from launch.sampling.model_source import ModelOptions, Say, open_generator, say_nothing
from launch.sampling.options import Wanted
from launch.sampling.processes import of_all, team
from launch.sampling.recorded import ModelFacts, Repeated, settings_of
from launch.text_tables import count
from tim import Generator
from tim.sampling.generator import Step
from tim.sampling.packs import share_of
from tim.sampling.requests import ImageRequest

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where and how images are written. layout: of a benchmark, in place of our names."""

    folder: Path
    form: ImageFormat
    metadata: bool = True
    overwrite: bool = False
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """The images of a command, in order, the number of those that were drawn now, and the pages of the grid."""

    samples: list[Sample]
    drawn: int
    grids: list[Path]


@dataclass(frozen=True, slots=True)
class _Planned:
    """An image, complete with the model's defaults, and its file in the folder."""

    file: PurePosixPath
    image: ImageRequest
    settings: Settings


def draw(
    images: Sequence[Wanted], *, model: ModelOptions, output: OutputOptions, console: Console, repeated: Repeated | None = None
) -> Drawn | None:
    """Sample images. Every process that accelerate or torchrun started calls it with the same arguments and draws its share; the main
    process gets the result, the others None. repeated: the image that the only one of them repeats.

    Raises ValueError for a model that cannot be opened, an image that it cannot draw, and files with other settings in the folder;
    OSError if a file cannot be written.
    """
    folder = output.folder
    check_folder(folder)
    with team() as state:
        is_main = state is None or state.is_main_process
        say = console.line if is_main else say_nothing
        generator, facts = _open(model, repeated=repeated, state=state, say=say)
        planned = _plan(images, generator=generator, facts=facts, output=output)
        _say_cut_prompts(generator, [each.image for each in planned], say=say)
        _say_unguided(images, planned, say=say)
        mine = planned if state is None else _share(planned, state)
        todo = _missing(mine, output=output)
        if len(todo) < len(mine):
            say(f"already in {folder}: {len(mine) - len(todo)} of {count(len(mine), 'image')}")
        if is_main and output.layout is not None:
            output.layout.begin(folder, [each.request for each in images])
        _draw(todo, generator=generator, output=output, console=console)
        drawn = sum(of_all(len(todo), state))
        return _finished(images, planned, drawn=drawn, output=output) if is_main else None


def _share(planned: Sequence[_Planned], state: PartialState) -> list[_Planned]:
    """The images of this process."""
    costs = [(each.image.grid_steps, math.prod(each.image.size)) for each in planned]
    return [planned[i] for i in share_of(costs, process=state.process_index, processes=state.num_processes)]


def _open(model: ModelOptions, *, repeated: Repeated | None, state: PartialState | None, say: Say) -> tuple[Generator, ModelFacts]:
    """The generator of this process, and what its images' files record of it."""
    generator, digest = open_generator(model, state=state, log=say)
    facts = ModelFacts.of(generator, path=model.path, digest=digest, loras=model.loras)
    for remark in [] if repeated is None else repeated.differences(facts):
        say(remark)
    return generator, facts


def _plan(images: Sequence[Wanted], *, generator: Generator, facts: ModelFacts, output: OutputOptions) -> list[_Planned]:
    """Every image with its file. Raises ValueError for an image that cannot be drawn, and if two have the same file."""
    complete = [generator.check(each.image) for each in images]
    settings = [settings_of(image, model=facts, edit=each.edit) for image, each in zip(complete, images, strict=True)]
    for image in complete:
        output.form.check_size(*image.size)
    if output.layout is not None:
        files = output.layout.paths([each.request for each in images], form=output.form)
    else:
        suffix = output.form.suffix
        names = (file_name(own, index=each.request.index, suffix=suffix) for own, each in zip(settings, images, strict=True))
        files = [PurePosixPath(name) for name in names]
        check_distinct(files)
    return [_Planned(*each) for each in zip(files, complete, settings, strict=True)]


def _missing(planned: Sequence[_Planned], *, output: OutputOptions) -> list[_Planned]:
    """The images that are not in the folder. Raises ValueError if other images have their names."""
    folder = output.folder
    recorded = {folder / sample.file: sample.settings for sample in read_samples(folder).values()}
    wanted = {folder / each.file: each.settings for each in planned}
    missing = set(plan_images(wanted, overwrite=output.overwrite, recorded=recorded))
    return [each for each in planned if folder / each.file in missing]


def _draw(todo: Sequence[_Planned], *, generator: Generator, output: OutputOptions, console: Console) -> None:
    """Draw images and write each as soon as it is finished."""
    folder, drawn = output.folder, 0
    with console.progress() as report:

        def report_step(step: Step) -> None:
            report("draw", drawn, len(todo), note=f"step {step.step} of {step.steps}, {len(step.images)} at once")

        for result in generator.draw([each.image for each in todo], callback=report_step):
            planned = todo[result.index]
            path = folder / planned.file
            path.parent.mkdir(parents=True, exist_ok=True)  # only here, so that a rejected argument leaves no folder
            write_image(path, result.image, planned.settings, form=output.form, metadata=output.metadata)
            notes = {"evaluations": result.evaluations, "neighbours": result.neighbours}
            append_sample(folder, Sample(planned.file, planned.settings, notes))
            drawn += 1
            report("draw", drawn, len(todo))


def _finished(images: Sequence[Wanted], planned: Sequence[_Planned], *, drawn: int, output: OutputOptions) -> Drawn:
    """What the folder holds at the end, with a grid of the images of this command."""
    recorded = read_samples(output.folder)
    samples = [recorded.get(each.file, Sample(each.file, each.settings, {})) for each in planned]
    if output.layout is not None:
        output.layout.finish(output.folder, [each.request for each in images], [each.file for each in planned])
    return Drawn(samples, drawn, write_grids(output.folder, samples))


def _say_cut_prompts(generator: Generator, images: Sequence[ImageRequest], *, say: Say) -> None:
    """Name the prompts that the text encoder truncates."""
    if generator.text is None:
        return
    texts = {prompt: None for image in images for prompt in image.prompts if isinstance(prompt, str)}
    for remark in cut_prompts(list(texts), encoder=generator.text):
        say(remark)


def _say_unguided(images: Sequence[Wanted], planned: Sequence[_Planned], *, say: Say) -> None:
    """Name the settings of guidance that have no effect, because no image is guided."""
    if all(each.image.guidance == 1.0 for each in planned):
        for name in ("negative", "interval"):
            if any(getattr(each.image, name) is not None for each in images):
                say(f"{name}: no effect with guidance 1, the guidance of all these images; give --guidance above 1")
