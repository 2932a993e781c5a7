"""`tim bench objective`: one network, the same data and updates, trained by each form of the objective and as plain flow matching.

The grounds of the images are speckled: each of their squares is pale or full, which no caption says. Flow matching in one step draws
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
from dataprep.synthetic import Figure, figures, ground_squares, random_view, read_figure, read_speckles, write_corpus
from launch.console import Console
from launch.demo import PREPARE, shortened, train
from launch.distributed import torchrun

OBJECTIVES = {
    "flow matching": ("objective.diffusion_share=1", "objective.consistency_share=0"),
    "transition, fp32 difference": (),
    "transition, bf16 difference": ("objective.derivative_precision=bf16",),
    "transition, exact derivative": ("objective.derivative=jvp",),
}
SHAPES = ("circle",)  # colours are learned in a hundred updates, shapes in several hundred: the demo shows that
SHIFT = 24  # pixels: times less close to noise than the demo's, for speckles are decided in weaker noise than shapes are
SETTINGS = (  # beside the demo's
    *(f"objective.shift={SHIFT}", f"sampling.shift={SHIFT}"),
    *("plan.schedule=[]", "objective.diffusion_share=0.5", "objective.consistency_share=0.1"),  # no flow matching first
    *("plan.max_tokens=256", "network.params.depth=4", "train.lr=3e-3"),
)
STEPS = (1, 2, 4, 8, 32)
IMAGES = 3000
LARGEST_SIDE = 48  # pixels
SIZES = ((32, 32), (20, 40), (40, 24), (28, 40), (24, 36))  # height and width of what is drawn
STRENGTH = (0.5, 1.5)  # of speckles that count as those of the corpus, whose strength is 1
PATCH = 8  # pixels a side of the patches whose distributions are compared
SCORES = {
    "both": "colours as asked and speckles found",
    "colours": "colours as asked",
    "speckled": "ground as speckled as the corpus's",
    "ground": "energy distance of the ground's squares to those of real images of the same prompts",
    "picture": "the same of patches of the whole image",
}
SHARES = ("both", "colours", "speckled")  # of `SCORES`; the others are distances


def compare_objectives(out: Path, *, steps: int, drawn: int, console: Console) -> dict[str, Any]:
    """Train each of `OBJECTIVES` in the folder `out`, for so many steps, and compare what they draw. A finished run is kept.

    Of each objective and number of sampling steps, over `drawn` prompts without guidance: `colours`, the share of images that show
    figure and ground in the colours asked for; `speckled`, the share with as strong speckles as the corpus has; `both`; and the
    energy distance from a real image of the same prompt, 0 for equal distributions, between the squares of the grounds (`ground`: what
    the prompt leaves open) and between patches of the whole images (`image`: the figure's outline counts most). `real` says the same
    of other real images.

    Raises RuntimeError if a training fails.
    """
    pictures, corpus = out / "pictures", out / "corpus"
    if not (pictures / "metadata.jsonl").is_file():
        write_corpus(pictures, count=IMAGES, max_side=LARGEST_SIDE, speckled=True, shapes=SHAPES)
    with console.progress() as report:
        prepare([str(pictures)], out=corpus, config=PREPARE, workers=torchrun.cores(), progress=report)
    choices = figures(SHAPES)
    asked = [choices[i % len(choices)] for i in range(drawn)]
    sizes = [SIZES[(i + i // len(choices)) % len(SIZES)] for i in range(drawn)]
    real, other = (_real(asked, sizes, seed=seed) for seed in (0, 1))

    found: dict[str, dict[int, dict[str, float]]] = {}
    for number, (name, settings) in enumerate(OBJECTIVES.items(), 1):
        console.line(f"{number}/{len(OBJECTIVES)} {name}")
        run_dir = out / name.replace(",", "").replace(" ", "-")
        train([f"corpus={corpus}", f"run_dir={run_dir}", *shortened(steps), *SETTINGS, *settings])
        found[name] = {count: scores(_draw(run_dir / "model", asked, sizes, steps=count), real=real, asked=asked) for count in STEPS}
    return {"drawn": drawn, "training_steps": steps, "real": scores(other, real=real, asked=asked), "scores": found}


def describe_comparison(data: Mapping[str, Any]) -> str:
    """A table for each score, by objective and number of sampling steps."""
    width = max(map(len, OBJECTIVES))
    lines = []
    for key, title in SCORES.items():
        form = "{:>7.0%}" if key in SHARES else "{:>7.3f}"
        lines += [f"{title} (real images: {form.format(data['real'][key]).strip()})"]
        lines += [f"  {'steps':{width}} " + "".join(f"{count:>7}" for count in STEPS)]
        lines += [f"  {name:{width}} " + "".join(form.format(row[count][key]) for count in STEPS) for name, row in data["scores"].items()]
        lines += [""]
    return "\n".join(lines[:-1])


def energy_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """2·E‖A − B‖ − E‖A − A'‖ − E‖B − B'‖ of two samples (n, d) with the same n places: about 0 if they are of one distribution.

    Székely & Rizzo, "Energy statistics", 2013, eq. 1. All three means are over pairs of different places, which leaves no bias.
    """
    between = _distances(a, b)
    total = 2 * (between.sum() - between.trace()) - _distances(a, a).sum() - _distances(b, b).sum()
    return float(total / (len(a) * (len(a) - 1)))


def _real(asked: Sequence[Figure], sizes: Sequence[tuple[int, int]], *, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [random_view(figure, height=h, width=w, rng=rng, speckled=True) for figure, (h, w) in zip(asked, sizes, strict=True)]


def _draw(model: Path, asked: Sequence[Figure], sizes: Sequence[tuple[int, int]], *, steps: int) -> list[Image.Image]:
    from launch.distributed.device import choose_device
    from tim import Generator

    return Generator.from_pretrained(model, device=choose_device())(
        [figure.caption for figure in asked],
        height=[height for height, _ in sizes],
        width=[width for _, width in sizes],
        steps=steps,
        guidance=1.0,
        seed=list(range(len(asked))),
    )


def scores(images: Sequence[Image.Image], *, real: Sequence[Image.Image], asked: Sequence[Figure]) -> dict[str, float]:
    """The `SCORES` of images drawn for some prompts, beside real ones of the same sizes."""
    read = [read_figure(image) for image in images]
    colours = np.array([(a.colour, a.ground) == (b.colour, b.ground) for a, b in zip(read, asked, strict=True)])
    strength = np.array([read_speckles(image, ground=str(figure.ground)) for image, figure in zip(images, asked, strict=True)])
    speckled = (STRENGTH[0] < strength) & (strength < STRENGTH[1])
    pairs = list(zip(images, real, strict=True))
    ground = [energy_distance(_squares(image), _squares(other)) for image, other in pairs]
    picture = [energy_distance(_patches(image), _patches(other)) for image, other in pairs]
    found = {"both": colours & speckled, "colours": colours, "speckled": speckled, "ground": ground, "picture": picture}
    return {key: float(np.mean(found[key])) for key in SCORES}


def _squares(image: Image.Image) -> NDArray[np.float64]:
    """(n, 3·4·4), values from 0 to 1."""
    squares = ground_squares(image)
    return squares.reshape(len(squares), -1) / 255


def _patches(image: Image.Image) -> NDArray[np.float64]:
    """The whole patches that fit side by side into an image, (n, 3·8·8), values from 0 to 1."""
    rows, columns = image.height // PATCH, image.width // PATCH
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)[: rows * PATCH, : columns * PATCH] / 255
    return pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(rows * columns, -1)


def _distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """‖a_i − b_j‖, (n, n)."""
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
