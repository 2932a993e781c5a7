"""`tim preview`: a time-lapse over the previews of a run, and over its checkpoints where it has none."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont

from launch.checkpoints import checkpoint
from launch.checkpoints.export import export, run_config
from launch.config.model_sections import PreviewConfig
from launch.config.resolve import resolve
from launch.config.schema import Config, ConfigError
from launch.config.yaml_file import ConfigConflict
from launch.console import Console
from launch.previews.cells import cells_of, preview_grid
from launch.previews.files import FOLDER, preview_files, preview_path, preview_settings, write_preview
from launch.sampling.image_grid import GAP
from pipeline.storage.atomic import publish

FORMATS = {".webp": "WEBP", ".gif": "GIF"}
LARGEST = 4096  # pixels per side of a frame; larger ones are scaled down
FRAME_MILLISECONDS, LAST_MILLISECONDS = 400, 2000
_BAR = 28  # height in pixels of the line with the step


@dataclass(frozen=True, slots=True)
class TimeLapse:
    """A written time-lapse. steps: those of its frames; drawn: those of them that were drawn from checkpoints."""

    path: Path
    steps: tuple[int, ...]
    drawn: tuple[int, ...]


def time_lapse(run: Path, *, out: Path | None, changes: dict[str, object], console: Console) -> TimeLapse:
    """Write the time-lapse of a run to `out` (.webp or .gif), by default RUN/previews/time-lapse.webp.

    changes: keys of the section `preview` to replace; with any, all frames are drawn from the checkpoints that there are, and the
    previews of the run are left alone.

    Raises:
        ValueError: not a run folder, there is nothing to show, or an unknown format.
    """
    out = out or run / FOLDER / "time-lapse.webp"
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out}: give a file that ends with .webp or .gif")
    config = _with_changes(run_config(run), changes)
    frames = {} if changes else {step: _open(path) for step, path in preview_files(run).items()}
    steps = [checkpoint.step_of(folder) for folder in checkpoint.step_folders(run)]
    missing = [step for step in steps if step not in frames]
    drawn = []
    if missing and config.preview.prompts:
        drawn = _draw(run, config, missing, frames=frames, keep=not changes, console=console)
    if not frames:
        why = "it has neither previews nor checkpoints" if not missing else "it has no previews: give --prompt (or --class) and --size"
        raise ValueError(f"{run}: {why}")
    ordered = sorted(frames)
    _write(out, [_labelled(frames[step], step=step) for step in ordered])
    return TimeLapse(out, tuple(ordered), tuple(drawn))


def _with_changes(config: Config, changes: dict[str, object]) -> Config:
    """The configuration with a changed section `preview`. Raises ConfigError for values that the model cannot draw."""
    given = {**config.preview.model_dump(), **changes}
    try:
        return resolve(config.model_copy(update={"preview": PreviewConfig.model_validate(given)}))
    except ConfigConflict as conflict:
        raise ConfigError(f"{conflict.key}: {conflict}") from None


def _draw(run: Path, config: Config, steps: Sequence[int], *, frames: dict[int, Image.Image], keep: bool, console: Console) -> list[int]:
    """Draw the frames of `steps` from the averaged weights of their checkpoints. `keep`: as previews of the run. Returns the steps."""
    from launch.sampling.model_source import make_generator
    from tim.model_folder.folder import load_model
    from tim.sampling.sources import choose_device

    cells, section = cells_of(config.preview), config.preview
    device, generator = choose_device(), None
    with console.progress() as report:
        report("draw", 0, len(steps) * len(cells))
        for number, step in enumerate(steps):
            with TemporaryDirectory(dir=run, prefix="preview-") as folder:
                network, spec = load_model(export(run, out=Path(folder) / "model", step=step).folder)
            if generator is None:
                generator = make_generator(network, spec, device=device, dtype=config.train.precision)
            generator.network, generator.spec = network.to(device).eval(), spec
            images = {}
            for index, cell in enumerate(cells):
                settings = {"steps": cell.steps, "guidance": section.guidance, "seed": section.seed}
                images[index] = generator(cell.prompt, height=cell.height, width=cell.width, **settings)[0]
                report("draw", number * len(cells) + index + 1, len(steps) * len(cells))
            frames[step] = preview_grid(cells, images)
            if keep:
                write_preview(preview_path(run, step), frames[step], settings=preview_settings(section, step=step))
    return list(steps)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error}): remove it") from None


def _labelled(frame: Image.Image, *, step: int) -> Image.Image:
    """The frame below a line with its step."""
    labelled = Image.new("RGB", (frame.width, frame.height + _BAR), "white")
    labelled.paste(frame, (0, _BAR))
    ImageDraw.Draw(labelled).text((GAP, _BAR // 2), f"step {step:,}", fill="black", font=ImageFont.load_default(size=16), anchor="lm")
    return labelled


def _write(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames of any sizes as one animation that repeats, the last one longer."""
    width, height = (max(sides) for sides in zip(*(frame.size for frame in frames), strict=True))
    same = []
    for frame in frames:
        page = Image.new("RGB", (width, height), "white")
        page.paste(frame, (0, 0))
        page.thumbnail((LARGEST, LARGEST))
        same.append(page)
    durations = [FRAME_MILLISECONDS] * (len(same) - 1) + [LAST_MILLISECONDS]
    content = io.BytesIO()
    settings = {"quality": 90} if path.suffix.lower() == ".webp" else {"optimize": False}
    same[0].save(
        content, format=FORMATS[path.suffix.lower()], save_all=True, append_images=same[1:], duration=durations, loop=0, **settings
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with publish(path) as stream:
        stream.write(content.getvalue())
