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
from launch.sampling.model_source import OWN, Replacements, generator_of, open_model
from pipeline.storage.atomic import publish

if TYPE_CHECKING:
    from tim import Generator


@dataclass(frozen=True, slots=True)
class Drawing:
    """One image that was drawn; its PNG carries prompt, steps, guidance and seed as text chunks.

    The prompt is a text, or the number of a class; height and width in pixels; evaluations: forwards of the network that it took.
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
    """How images are drawn. Steps, guidance and interval of None are the model's own; `times` are stepped through instead of `steps`."""

    steps: Sequence[int] | None = None
    guidance: float | None = None
    seed: int = 0
    negative: str | None = None
    times: Sequence[float] | None = None
    interval: tuple[float, float] | None = None
    stochasticity: float = 0.0

    def completed(self, defaults: Mapping[str, Any]) -> DrawSettings:
        """Without a None in steps and guidance; with `times`, the number of steps is theirs."""
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
    replacements: Replacements = OWN,
    console: Console,
) -> tuple[list[Drawing], Path]:
    """Draw every prompt at every size (height, width) in every number of steps. Returns the drawings and the path of the grid.

    `model` is a model folder, a run folder (then its `model/`, or its newest checkpoint exported, is used), an official export, or a file
    of weights of the network in `recipe`; `replacements` are other places of its codec, text encoder and tokenizer. All drawings of one
    prompt and size start from the same noise: a row of the grid shows what more steps add.

    Raises:
        ValueError: `model` is none of these, `out` is a file, a size is below the model's stride, or a prompt is not for this model.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file has this name; name a folder")
    generator = _open_generator(model, recipe=recipe, replacements=replacements, console=console)
    _check_prompts(generator, prompts, negative=settings.negative, console=console)
    settings = settings.completed(generator.spec.sampling)
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
            out.mkdir(parents=True, exist_ok=True)  # not before: a refused argument leaves nothing behind
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


def _open_generator(model: Path, *, recipe: str | None, replacements: Replacements, console: Console) -> Generator:
    network, spec = open_model(model, recipe=recipe, replacements=replacements, say=console.line)

    from launch.distributed.device import choose_device

    device = choose_device()
    console.line(f"device: {device.type} ({'a' if device.type == 'cuda' else 'no'} CUDA device is present)")
    return generator_of(network, spec, device=device)


def _check_prompts(generator: Generator, prompts: Sequence[str | int], *, negative: str | None, console: Console) -> None:
    """Refuse prompts that are not for this model; name those that its text encoder cuts."""
    generator.check(prompts)
    if generator.text is None:
        return
    texts = [prompt for prompt in [*prompts, *([] if negative is None else [negative])] if isinstance(prompt, str)]
    for remark in cut_prompts(texts, tokenizer=generator.text.tokenizer):
        console.line(remark)


def _draw_row(generator: Generator, prompt: str | int, *, height: int, width: int, settings: DrawSettings) -> list[Image.Image]:
    """One prompt at one size, in every number of steps."""
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
    """Write a PNG with text chunks, whole or not at all."""
    chunks = PngInfo()
    for name, value in metadata.items():
        chunks.add_itxt(name, str(value))
    with publish(path) as stream:
        image.save(stream, format="PNG", pnginfo=chunks)


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "empty"
