"""Comparison of objectives: the same network, data and number of updates, trained with each form of the objective and flow matching.

The backgrounds of the images are speckled: each square is pale or full, independently of the caption. With one step, flow matching gives
the mean over all images of a caption, a plain background between the two; a transition model decides for each square from the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataprep.prepare import prepare
from dataprep.synthetic import Figure, figures, ground_squares, random_view, read_figure, read_speckles, write_corpus
from launch.console import Console
from launch.demo import PREPARE, shortened, train
from launch.distributed import torchrun

OBJECTIVES = {
    "flow matching": ("objective.diffusion_share=1", "objective.consistency_share=0"),
    "transition, fp32 difference": ("objective.derivative_precision=fp32",),
    "transition, fp16 difference": ("objective.derivative_precision=fp16",),
    "transition, bf16 difference": ("objective.derivative_precision=bf16",),
    "transition, exact derivative": ("objective.derivative=jvp", "objective.derivative_precision=fp32"),
}
SHAPES = ("circle",)  # colours are learned in a hundred updates, shapes need several hundred, as in the demo
SHIFT = 24  # pixels: less noisy times than the demo's, because speckles form at lower noise levels than shapes
SETTINGS = (  # in addition to the demo's
    *(f"objective.shift={SHIFT}", f"sampling.shift={SHIFT}"),
    *("plan.schedule=[]", "objective.diffusion_share=0.5", "objective.consistency_share=0.1"),  # no flow matching first
    *("plan.max_tokens=256", "network.params.depth=4", "train.lr=3e-3"),
)
STEPS = (1, 2, 4, 8, 32)
IMAGES = 3000
LARGEST_SIDE = 48  # pixels
SIZES = ((32, 32), (20, 40), (40, 24), (28, 40), (24, 36))  # height and width of sampled images
STRENGTH = (0.5, 1.5)  # accepted range of speckle strength; the corpus has 1
PATCH = 8  # pixels per side of compared patches
SCORES = {
    "both": "correct colours and speckles",
    "colours": "correct colours",
    "speckled": "ground with speckles of the corpus's strength",
    "ground": "energy distance between squares of the ground and those of real images of the same prompts",
    "image": "energy distance between patches of the whole image and those of real images",
}
SHARES = ("both", "colours", "speckled")  # of `SCORES`; the others are distances
BASELINE = "transition, fp32 difference"  # of `OBJECTIVES`: the one whose images the others are compared with, prompt by prompt
Values = dict[str, NDArray[np.float64]]  # by score: one value per image


def compare_objectives(out: Path, *, steps: int, drawn: int, console: Console) -> dict[str, Any]:
    """Train each of `OBJECTIVES` for `steps` steps in the folder `out`, and compare their images. Finished runs are reused.

    Scores for each objective and number of sampling steps, over `drawn` prompts without guidance: `colours`, share of images with figure
    and ground in the requested colours; `speckled`, share with speckles of the corpus's strength; `both`; and the energy distance to a
    real image of the same prompt (0 for equal distributions) between squares of the grounds (`ground`: not determined by the prompt) and
    between patches of the whole images (`image`: dominated by the figure's outline). `real` has the scores of other real images.
    `differences` has, for each other objective, the mean difference of each score from `BASELINE`'s for the same prompt and noise, and half
    its 95 % interval. The interval covers the choice of prompts and noise, not that of the training's seed.

    Raises RuntimeError if training fails.
    """
    images, corpus = out / "pictures", out / "corpus"
    if not (images / "metadata.jsonl").is_file():
        write_corpus(images, count=IMAGES, max_side=LARGEST_SIDE, speckled=True, shapes=SHAPES)
    with console.progress() as report:
        prepare([str(images)], out=corpus, config=PREPARE, workers=torchrun.cores(), progress=report)
    choices = figures(SHAPES)
    requested = [choices[i % len(choices)] for i in range(drawn)]
    sizes = [SIZES[(i + i // len(choices)) % len(SIZES)] for i in range(drawn)]
    real, other = (_real_images(requested, sizes, seed=seed) for seed in (0, 1))

    values: dict[str, dict[int, Values]] = {}
    for number, (name, settings) in enumerate(OBJECTIVES.items(), 1):
        console.line(f"{number}/{len(OBJECTIVES)} {name}")
        run_dir = out / name.replace(",", "").replace(" ", "-")
        train([f"corpus={corpus}", f"run_dir={run_dir}", *shortened(steps), *SETTINGS, *settings])
        sampled = {count: _draw(run_dir / "model", requested, sizes, steps=count) for count in STEPS}
        values[name] = {count: _values(drawings, real=real, requested=requested) for count, drawings in sampled.items()}
    return {
        "drawn": drawn,
        "training_steps": steps,
        "real": scores(other, real=real, requested=requested),
        "scores": {name: {count: _means(row[count]) for count in STEPS} for name, row in values.items()},
        "differences": {
            name: {str(count): differences(row[count], values[BASELINE][count]) for count in STEPS}
            for name, row in values.items()
            if name != BASELINE
        },
    }


def describe_comparison(data: Mapping[str, Any]) -> str:
    """Format one table per score, by objective and number of sampling steps."""
    width = max(map(len, OBJECTIVES))
    lines = []
    for key, title in SCORES.items():
        form = "{:>7.0%}" if key in SHARES else "{:>7.3f}"
        lines += [f"{title} (real images: {form.format(data['real'][key]).strip()})"]
        lines += [f"  {'steps':{width}} " + "".join(f"{count:>7}" for count in STEPS)]
        lines += [f"  {name:{width}} " + "".join(form.format(row[count][key]) for count in STEPS) for name, row in data["scores"].items()]
        lines += [""]
    lines += [f"difference from {BASELINE}, same prompts and noise, with 95 % intervals"]
    for key in SCORES:
        scale, form = (100, "{:+.1f} ± {:.1f} %") if key in SHARES else (1, "{:+.3f} ± {:.3f}")
        lines += ["", f"  {key:{width}}" + "".join(f"{count:>17}" for count in STEPS)]
        for name, row in data["differences"].items():
            cells = [form.format(*(scale * part for part in row[str(count)][key])) for count in STEPS]
            lines += [f"  {name:{width}}" + "".join(f"{cell:>17}" for cell in cells)]
    return "\n".join(lines)


def differences(values: Values, baseline: Values) -> dict[str, tuple[float, float]]:
    """Mean difference of each score between images of the same prompts, and half its 95 % interval."""
    paired = {key: values[key] - baseline[key] for key in values}
    return {key: (float(d.mean()), float(1.96 * d.std(ddof=1) / len(d) ** 0.5)) for key, d in paired.items()}


def energy_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """2·E‖A − B‖ − E‖A − A'‖ − E‖B − B'‖ of two samples (n, d) with n matching positions: about 0 for equal distributions.

    Székely & Rizzo, "Energy statistics", 2013, eq. 1. All three means are over pairs of different positions, which makes them unbiased.
    """
    between = _distances(a, b)
    total = 2 * (between.sum() - between.trace()) - _distances(a, a).sum() - _distances(b, b).sum()
    return float(total / (len(a) * (len(a) - 1)))


def _real_images(requested: Sequence[Figure], sizes: Sequence[tuple[int, int]], *, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [random_view(figure, height=h, width=w, rng=rng, speckled=True) for figure, (h, w) in zip(requested, sizes, strict=True)]


def _draw(model: Path, requested: Sequence[Figure], sizes: Sequence[tuple[int, int]], *, steps: int) -> list[Image.Image]:
    from tim import Generator

    return Generator.from_pretrained(model)(
        [figure.caption for figure in requested],
        height=[height for height, _ in sizes],
        width=[width for _, width in sizes],
        steps=steps,
        guidance=1.0,
        seed=list(range(len(requested))),
    )


def scores(images: Sequence[Image.Image], *, real: Sequence[Image.Image], requested: Sequence[Figure]) -> dict[str, float]:
    """Compute the `SCORES` of images sampled for prompts, relative to real images of the same sizes."""
    return _means(_values(images, real=real, requested=requested))


def _means(values: Values) -> dict[str, float]:
    return {key: float(values[key].mean()) for key in SCORES}


def _values(images: Sequence[Image.Image], *, real: Sequence[Image.Image], requested: Sequence[Figure]) -> Values:
    recognised = [read_figure(image) for image in images]
    colours = np.array([(a.colour, a.ground) == (b.colour, b.ground) for a, b in zip(recognised, requested, strict=True)])
    strength = np.array([read_speckles(image, ground=str(figure.ground)) for image, figure in zip(images, requested, strict=True)])
    speckled = (STRENGTH[0] < strength) & (strength < STRENGTH[1])
    pairs = list(zip(images, real, strict=True))
    ground = [energy_distance(_squares(image), _squares(other)) for image, other in pairs]
    whole = [energy_distance(_patches(image), _patches(other)) for image, other in pairs]
    values = {"both": colours & speckled, "colours": colours, "speckled": speckled, "ground": ground, "image": whole}
    return {key: np.asarray(value, dtype=np.float64) for key, value in values.items()}


def _squares(image: Image.Image) -> NDArray[np.float64]:
    """Squares of the ground, (n, 3·4·4), values from 0 to 1."""
    squares = ground_squares(image)
    return squares.reshape(len(squares), -1) / 255


def _patches(image: Image.Image) -> NDArray[np.float64]:
    """Non-overlapping patches of an image, (n, 3·8·8), values from 0 to 1. Incomplete patches are dropped."""
    rows, columns = image.height // PATCH, image.width // PATCH
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)[: rows * PATCH, : columns * PATCH] / 255
    return pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(rows * columns, -1)


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pairwise distances ‖a_i − b_j‖, (n, n)."""
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
