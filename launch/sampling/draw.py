"""`tim sample`: prompts × sizes × step counts → one PNG per image, and `grid.png`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.arguments import round_sizes
from launch.caption_lengths import cut_prompts
from launch.console import Console
from launch.sampling.image_grid import grid
from launch.sampling.model_source import OWN, Replacements, generator_of, open_model
from pipeline.storage.atomic import publish


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


def draw(
    model: Path,
    *,
    prompts: Sequence[str | int],
    sizes: Sequence[tuple[int, int]],
    steps: Sequence[int] | None,
    guidance: float | None,
    seed: int,
    out: Path,
    negative: str | None = None,
    times: Sequence[float] | None = None,
    interval: tuple[float, float] | None = None,
    stochasticity: float = 0.0,
    recipe: str | None = None,
    replacements: Replacements = OWN,
    console: Console,
) -> tuple[list[Drawing], Path]:
    """Draw every prompt at every size (height, width) in every number of steps; returns the drawings and the grid's path.

    `model` is a model folder, a run folder (then its `model/`, or its newest checkpoint exported, is used), an official export, or a file
    of weights of the network in `recipe`; `replacements` are other places of its codec, text encoder and tokenizer. Steps, guidance and
    interval of None are the model's own defaults; `times` are stepped through instead of `steps`. All drawings of one prompt and size
    start from the same noise: a row of the grid shows what more steps add.

    Raises:
        ValueError: `model` is neither, `out` is a file, a size is below the model's stride, or a prompt is not for this model.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file has this name; name a folder")
    network, spec = open_model(model, recipe=recipe, replacements=replacements, say=console.line)

    from launch.distributed.device import choose_device

    device = choose_device()
    console.line(f"device: {device.type} ({'a' if device.type == 'cuda' else 'no'} CUDA device is present)")
    generator = generator_of(network, spec, device=device)
    generator.check(prompts)
    if generator.text is not None:
        asked = [prompt for prompt in [*prompts, *([] if negative is None else [negative])] if isinstance(prompt, str)]
        for remark in cut_prompts(asked, tokenizer=generator.text.tokenizer):
            console.line(remark)
    defaults = generator.spec.sampling
    steps = [len(times) - 1] if times is not None else steps or [int(defaults["steps"])]
    scale = float(defaults["guidance"]) if guidance is None else guidance
    rounded, remarks = round_sizes(sizes, stride=generator.stride)
    for remark in remarks:
        console.line(remark)

    drawings: list[Drawing] = []
    rows: list[list[Image.Image]] = []
    labels: list[str] = []
    total = len(prompts) * len(rounded) * len(steps)
    with console.progress() as report:
        report("draw", 0, total)
        for number, prompt in enumerate(prompts):
            name = prompt if isinstance(prompt, str) else f"class {prompt}"
            for height, width in rounded:
                row = generator(
                    [prompt] * len(steps),
                    height=height,
                    width=width,
                    steps=None if times is not None else list(steps),
                    guidance=scale,
                    seed=seed,
                    negative=negative,
                    times=times,
                    interval=interval,
                    stochasticity=stochasticity,
                )
                out.mkdir(parents=True, exist_ok=True)  # not before: a refused argument leaves nothing behind
                for image, count in zip(row, steps, strict=True):
                    path = out / f"{number:02d}-{_slug(name)}-{width}x{height}-steps{count}-seed{seed}.png"
                    drawing = Drawing(
                        path=path,
                        prompt=prompt,
                        height=height,
                        width=width,
                        steps=count,
                        guidance=scale,
                        seed=seed,
                        evaluations=image.info["evaluations"],
                    )
                    _write_png(path, image, metadata={"prompt": name, "steps": count, "guidance": scale, "seed": seed})
                    drawings.append(drawing)
                rows.append(row)
                labels.append(f"{name}\n{width} x {height}")
                report("draw", len(drawings), total)
    columns = [f"{count} step{'s' * (count > 1)}" for count in steps]
    _write_png(out / "grid.png", grid(rows, row_labels=labels, column_labels=columns), metadata={"seed": seed, "guidance": scale})
    return drawings, out / "grid.png"


def _write_png(path: Path, image: Image.Image, *, metadata: dict[str, object]) -> None:
    """Write a PNG with text chunks, whole or not at all."""
    chunks = PngInfo()
    for name, value in metadata.items():
        chunks.add_itxt(name, str(value))
    with publish(path) as stream:
        image.save(stream, format="PNG", pnginfo=chunks)


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "empty"
