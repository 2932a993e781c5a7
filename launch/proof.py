"""`tim bench objective`: one network, the same data and updates, trained by each form of the objective and as plain flow matching.

The grounds of the pictures are speckled: each of their squares is pale or full, which no caption says. Flow matching in one step draws
the mean over all that a caption allows, a plain ground between the two; a transition model decides, square by square, from the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataprep.prepare import prepare
from dataprep.synthetic import Figure, figures, random_view, read_figure, read_speckles, write_corpus
from launch import cluster
from launch.console import Console
from launch.demo import PREPARE, shortened, train

OBJECTIVES = {
    "transition, fp32 difference": (),
    "transition, bf16 difference": ("objective.derivative_precision=bf16",),
    "transition, exact derivative": ("objective.derivative=jvp",),
    "flow matching": ("objective.diffusion_share=1", "objective.consistency_share=0"),
}
STEPS = (1, 2, 4, 8, 32)
PICTURES = 3000
LARGEST_SIDE = 48  # pixels
SIZES = ((32, 32), (20, 40), (48, 24), (28, 40), (24, 48))  # height and width of what is drawn
STRENGTH = (0.6, 1.4)  # of speckles that count as those of the corpus, whose strength is 1
THUMBNAIL = 16  # pixels a side, in which the distance between pictures is taken


def prove(out: Path, *, steps: int | None, drawn: int, console: Console) -> dict[str, Any]:
    """Train each of `OBJECTIVES` in the folder `out`, for so many steps, and compare what they draw. A finished run is kept.

    Of each objective and number of sampling steps, over `drawn` prompts without guidance: `found`, the share of pictures that show the
    figure as asked on a speckled ground; `distance`, the energy distance of the drawn from real pictures of the same prompts and sizes.

    Raises RuntimeError if a training fails.
    """
    pictures, corpus = out / "pictures", out / "corpus"
    if not (pictures / "metadata.jsonl").is_file():
        write_corpus(pictures, count=PICTURES, max_side=LARGEST_SIDE, speckled=True)
    with console.progress() as report:
        prepare([str(pictures)], out=corpus, config=PREPARE, workers=cluster.cores(), progress=report)
    asked = [figures()[(i * 37) % len(figures())] for i in range(drawn)]
    sizes = [SIZES[i % len(SIZES)] for i in range(drawn)]
    rng = np.random.default_rng(0)
    real = [random_view(figure, height=h, width=w, rng=rng, speckled=True) for figure, (h, w) in zip(asked, sizes, strict=True)]

    found: dict[str, dict[int, float]] = {}
    distance: dict[str, dict[int, float]] = {}
    for number, (name, settings) in enumerate(OBJECTIVES.items(), 1):
        console.line(f"{number}/{len(OBJECTIVES)} {name}")
        run_dir = out / name.replace(",", "").replace(" ", "-")
        train([f"corpus={corpus}", f"run_dir={run_dir}", *settings, *shortened(steps)])
        images = {count: _draw(run_dir / "model", asked, sizes, steps=count) for count in STEPS}
        found[name] = {count: _found(some, asked) for count, some in images.items()}
        distance[name] = {count: energy_distance(_thumbnails(some), _thumbnails(real)) for count, some in images.items()}
    return {"drawn": drawn, "found": found, "found_in_real": _found(real, asked), "distance": distance}


def describe_proof(data: Mapping[str, Any]) -> str:
    """Two tables: found as asked, and distance, by objective and number of sampling steps."""
    width = max(map(len, OBJECTIVES))
    head = " ".join(f"{count:>7}" for count in STEPS)
    lines = [f"{'':{width}}  found as asked in … steps (of real pictures: {data['found_in_real']:.0%})", f"{'':{width}}  {head}"]
    lines += [f"{name:{width}}  {' '.join(f'{row[count]:7.0%}' for count in STEPS)}" for name, row in data["found"].items()]
    lines += ["", f"{'':{width}}  energy distance to real pictures in … steps", f"{'':{width}}  {head}"]
    lines += [f"{name:{width}}  {' '.join(f'{row[count]:7.3f}' for count in STEPS)}" for name, row in data["distance"].items()]
    return "\n".join(lines)


def energy_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """2·E‖A − B‖ − E‖A − A'‖ − E‖B − B'‖ of two samples (n, d) whose rows belong to the same n prompts: about 0 for equal distributions.

    Székely & Rizzo, "Energy statistics", 2013, eq. 1. All three means are over pairs of different prompts, which leaves no bias.
    """
    pairs = len(a) * (len(a) - 1)
    between = _distances(a, b)
    return float((2 * (between.sum() - between.trace()) - _distances(a, a).sum() - _distances(b, b).sum()) / pairs)


def _draw(model: Path, asked: Sequence[Figure], sizes: Sequence[tuple[int, int]], *, steps: int) -> list[Image.Image]:
    from launch.device import choose_device
    from tim import Generator

    return Generator.from_pretrained(model, device=choose_device())(
        [figure.caption for figure in asked],
        height=[height for height, _ in sizes],
        width=[width for _, width in sizes],
        steps=steps,
        guidance=1.0,
        seed=list(range(len(asked))),
    )


def _found(images: Sequence[Image.Image], asked: Sequence[Figure]) -> float:
    """Share of pictures that show the figure as asked, on a ground as speckled as the corpus's."""
    return float(
        np.mean(
            [
                read_figure(image) == figure and STRENGTH[0] < read_speckles(image, ground=str(figure.ground)) < STRENGTH[1]
                for image, figure in zip(images, asked, strict=True)
            ]
        )
    )


def _thumbnails(images: Sequence[Image.Image]) -> NDArray[np.float64]:
    """(n, 3·16·16), values from 0 to 1."""
    small = [image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in small])


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖a_i − b_j‖, (n, n)."""
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
