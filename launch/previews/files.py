"""Files of a run's previews.

RUN/previews/step-000500.png
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.config.model_sections import PreviewConfig
from pipeline.storage.atomic import publish

FOLDER = "previews"


def preview_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}.png"


def preview_files(run_dir: Path) -> dict[int, Path]:
    """The previews of a run by step, in order."""
    found = {path.stem.removeprefix("step-"): path for path in (run_dir / FOLDER).glob("step-*.png")}
    return {int(step): found[step] for step in sorted(found, key=lambda step: (len(step), step)) if step.isdigit()}


def write_preview(path: Path, image: Image.Image, *, step: int, section: PreviewConfig) -> None:
    """Write a grid with its step, prompts, seed and guidance as text chunks, atomically. Raises OSError."""
    chunks = PngInfo()
    for name, value in (("step", step), ("prompts", list(section.prompts)), ("seed", section.seed), ("guidance", section.guidance)):
        chunks.add_itxt(name, json.dumps(value, ensure_ascii=False))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks)
    path.parent.mkdir(exist_ok=True)
    with publish(path) as stream:
        stream.write(content.getvalue())
