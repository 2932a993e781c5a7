"""Files of a run's previews.

RUN/previews/step-000500.png           its text chunks have what it shows (`preview_settings`), as JSON
RUN/previews/step-000500.unfinished    the same while it is drawn; remains if the run ended meanwhile
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.config.model_sections import PreviewConfig
from launch.config.schema import Config
from pipeline.storage.atomic import publish, publish_text

FOLDER = "previews"
_SHOWN = {"prompts", "sizes", "steps", "seed", "guidance"}
_OF_WEIGHTS = ("corpus", "seed", "plan", "text", "network", "objective", "train")  # sections that the weights of later steps depend on


def preview_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}.png"


def unfinished_path(run_dir: Path, step: int) -> Path:
    return preview_path(run_dir, step).with_suffix(".unfinished")


def preview_files(run_dir: Path) -> dict[int, Path]:
    """The previews of a run by step, in order."""
    found = {path.stem.removeprefix("step-"): path for path in (run_dir / FOLDER).glob("step-*.png")}
    return {int(step): found[step] for step in sorted(found, key=lambda step: (len(step), step)) if step.isdigit()}


def preview_settings(section: PreviewConfig, *, step: int) -> dict[str, Any]:
    """What a preview shows: all that its images depend on besides the run. Plain JSON."""
    return {"step": step, **section.model_dump(mode="json", include=_SHOWN)}


def write_preview(path: Path, image: Image.Image, *, settings: Mapping[str, Any]) -> None:
    """Write a grid with its settings as text chunks, atomically. Raises OSError, and ValueError for a prompt that is not Unicode."""
    chunks = PngInfo()
    for name, value in settings.items():
        chunks.add_itxt(name, _json(value))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks)
    path.parent.mkdir(exist_ok=True)
    with publish(path) as stream:
        stream.write(content.getvalue())


def has_preview(path: Path, *, settings: Mapping[str, Any]) -> bool:
    """Whether a file is a readable preview with these settings."""
    try:
        with Image.open(path) as image:
            return all(image.info.get(name) == _json(value) for name, value in settings.items())
    except (OSError, ValueError):
        return False


def begin_preview(path: Path, *, settings: Mapping[str, Any]) -> None:
    """Write the file that says that a preview is being drawn. Raises OSError, and ValueError for a prompt that is not Unicode."""
    path.parent.mkdir(exist_ok=True)
    publish_text(path, _json(settings) + "\n")


def has_begun(path: Path, *, settings: Mapping[str, Any]) -> bool:
    """Whether a preview with these settings was being drawn when the run ended."""
    try:
        return path.read_text(encoding="utf-8") == _json(settings) + "\n"
    except (OSError, ValueError):
        return False


def forget_stale(run_dir: Path, config: Config, *, step: int, changes: Sequence[str], replan: bool) -> None:
    """Remove previews of an earlier process after `step`, where the run goes on, if training may go another way from there.

    changes: as `launch.checkpoints.run_folder.changes_on_resume` returns them. Raises OSError.
    """
    keys = {change.partition(":")[0] for change in changes}
    if config.train.schedule == "constant":
        keys.discard("train.steps")
    if not replan and not any(key.partition(".")[0] in _OF_WEIGHTS for key in keys):
        return
    for path in (run_dir / FOLDER).glob("step-*"):
        number = path.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            path.unlink(missing_ok=True)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
