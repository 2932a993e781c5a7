"""`tim sample`: prompts × sizes × step counts → one PNG per image, and `grid.png`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.arguments import round_sizes
from launch.caption_lengths import cut_prompts
from launch.console import Console
from launch.sampling.image_grid import grid
from launch.sampling.loras import Lora
from launch.sampling.model_source import NO_REPLACEMENTS, Replacements, make_generator, open_model
from pipeline.storage.atomic import publish
from tim.model_kinds import Dtype

if TYPE_CHECKING:
    from tim import Generator


@dataclass(frozen=True, slots=True)
class Drawing:
    """A sampled image. Its PNG has prompt, steps, guidance and seed as text chunks.

    prompt: text or class number; height and width in pixels; evaluations: number of network evaluations.
    """

    path: Path
    prompt: str | int
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    evaluations: int


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """Sampling settings. None means the model's default, in dtype that of the device; `times` replaces `steps`."""

    steps: Sequence[int] | None = None
    guidance: float | None = None
    seed: int = 0
    negative: str | None = None
    times: Sequence[float] | None = None
    interval: tuple[float, float] | None = None
    stochasticity: float = 0.0
    dtype: Dtype | None = None

    def with_defaults(self, defaults: Mapping[str, Any]) -> DrawSettings:
        """Fill in steps and guidance. With `times`, the number of steps follows from them."""
        steps = [len(self.times) - 1] if self.times is not None else self.steps or [int(defaults["steps"])]
        return replace(self, steps=steps, guidance=float(defaults["guidance"]) if self.guidance is None else self.guidance)


def draw(
    model: Path,
    *,
    prompts: Sequence[str | int],
    sizes: Sequence[tuple[int, int]],
    settings: DrawSettings,
    out: Path,
    recipe: str | None = None,
    replacements: Replacements = NO_REPLACEMENTS,
    loras: Sequence[Lora] = (),
    console: Console,
) -> tuple[list[Drawing], Path]:
    """Sample every prompt at every size (height, width) with every number of steps. Returns the images and the path of the grid.

    `model` is a model folder, a run folder (uses its `model/`, or exports its newest checkpoint), an official export, or a weight file for
    the network in `recipe`. `replacements` are other paths of its codec, text encoder and tokenizer, `loras` are merged into its weights.
    All images of one prompt and size start from the same noise, so a row of the grid shows the effect of more steps.

    Raises:
        ValueError: `model` is none of these, `out` is a file, a size is below the model's stride, or the model does not accept a prompt.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    generator = _open_generator(model, recipe=recipe, replacements=replacements, loras=loras, dtype=settings.dtype, console=console)
    _check_prompts(generator, prompts, negative=settings.negative, console=console)
    settings = settings.with_defaults(generator.spec.sampling)
    rounded, remarks = round_sizes(sizes, stride=generator.stride)
    for remark in remarks:
        console.line(remark)

    steps = settings.steps or ()
    drawings: list[Drawing] = []
    rows: list[list[Image.Image]] = []
    labels: list[str] = []
    total = len(prompts) * len(rounded) * len(steps)
    with console.progress() as report:
        report("draw", 0, total)
        for (number, prompt), (height, width) in product(enumerate(prompts), rounded):
            row = _draw_row(generator, prompt, height=height, width=width, settings=settings)
            out.mkdir(parents=True, exist_ok=True)  # only here, so that a rejected argument leaves no folder
            for image, count in zip(row, steps, strict=True):
                path = out / f"{number:02d}-{_slug(_name(prompt))}-{width}x{height}-steps{count}-seed{settings.seed}.png"
                drawings.append(_write_drawing(path, image, prompt=prompt, steps=count, settings=settings))
            rows.append(row)
            labels.append(f"{_name(prompt)}\n{width} x {height}")
            report("draw", len(drawings), total)
    columns = [f"{count} step{'s' * (count > 1)}" for count in steps]
    metadata = {"seed": settings.seed, "guidance": settings.guidance}
    _write_png(out / "grid.png", grid(rows, row_labels=labels, column_labels=columns), metadata=metadata)
    return drawings, out / "grid.png"


def _open_generator(
    model: Path, *, recipe: str | None, replacements: Replacements, loras: Sequence[Lora], dtype: Dtype | None, console: Console
) -> Generator:
    network, spec = open_model(model, recipe=recipe, replacements=replacements, loras=loras, log=console.line)

    from launch.distributed.device import choose_device

    device = choose_device()
    console.line(f"device: {device.type} ({'a' if device.type == 'cuda' else 'no'} CUDA device is available)")
    generator = make_generator(network, spec, device=device, dtype=dtype)
    console.line(f"precision: {generator.dtype} ({'the default of this device' if dtype is None else '--dtype'})")
    return generator


def _check_prompts(generator: Generator, prompts: Sequence[str | int], *, negative: str | None, console: Console) -> None:
    """Reject prompts that the model does not accept; warn about those that its text encoder truncates."""
    generator.check_prompts(prompts)
    if generator.text is None:
        return
    texts = [prompt for prompt in [*prompts, *([] if negative is None else [negative])] if isinstance(prompt, str)]
    for remark in cut_prompts(texts, tokenizer=generator.text.tokenizer):
        console.line(remark)


def _draw_row(generator: Generator, prompt: str | int, *, height: int, width: int, settings: DrawSettings) -> list[Image.Image]:
    """Sample one prompt at one size with every number of steps."""
    steps = list(settings.steps or ())
    return generator(
        [prompt] * len(steps),
        height=height,
        width=width,
        steps=None if settings.times is not None else steps,
        guidance=settings.guidance,
        seed=settings.seed,
        negative=settings.negative,
        times=settings.times,
        interval=settings.interval,
        stochasticity=settings.stochasticity,
    )


def _write_drawing(path: Path, image: Image.Image, *, prompt: str | int, steps: int, settings: DrawSettings) -> Drawing:
    assert settings.guidance is not None
    _write_png(path, image, metadata={"prompt": _name(prompt), "steps": steps, "guidance": settings.guidance, "seed": settings.seed})
    return Drawing(
        path=path,
        prompt=prompt,
        height=image.height,
        width=image.width,
        steps=steps,
        guidance=settings.guidance,
        seed=settings.seed,
        evaluations=image.info["evaluations"],
    )


def _name(prompt: str | int) -> str:
    return prompt if isinstance(prompt, str) else f"class {prompt}"


def _write_png(path: Path, image: Image.Image, *, metadata: dict[str, object]) -> None:
    """Write a PNG with text chunks, atomically."""
    chunks = PngInfo()
    for name, value in metadata.items():
        chunks.add_itxt(name, str(value))
    with publish(path) as stream:
        image.save(stream, format="PNG", pnginfo=chunks)


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "empty"
