"""Demo of the whole pipeline on the embedded corpus: prepare → plan → train → sample.

Figures can be recognised in an image (`dataprep.synthetic.read_figure`), so the demo scores the model's images against their prompts.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from dataprep.examine.examine import ImageConfig
from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import Figure, figures, read_figure, write_corpus
from launch.config.load import load_config
from launch.config.schema import Config
from launch.console import STOPPED, Console
from launch.distributed import torchrun
from launch.sampling.image_grid import grid
from launch.training.metrics import read_rows
from launch.training.planning import make_planner
from pipeline.planning.summary import plan_summary
from pipeline.storage.atomic import publish, publish_text

RECIPE = "demo"
IMAGES = 3000
PREPARE = PrepareConfig(images=ImageConfig(format="png"))  # JPEG would blur the drawings
STEPS = (1, 2, 4, 8)
# Height and width in pixels. Training images have sides of 16 to 64 pixels and aspect ratios from 1:3 to 3:1; the last size is outside.
SIZES = ((32, 32), (20, 60), (48, 24), (28, 40), (24, 84))
PROMPTS_SCORED = 60
PLANNED_STEPS = 50
NEXT_PROMPT, NEXT_SIZES = "a white cross on red", "64x32,24x48"  # of the command suggested at the end
READ_ON = "Your own images"  # section of README.md


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of images with the requested shape, figure colour, ground colour, both colours, and all three."""

    steps: int
    shape: float
    colour: float
    ground: float
    colours: float
    all: float


def run(out: Path, *, steps: int | None, console: Console) -> None:
    """Run the demo in the folder `out`. Finished steps of an earlier call are skipped.

    Writes the corpus, the run, `grid.png`, `loss.png` and `scores.json`. Raises RuntimeError if the training fails.
    """
    images, corpus, run_dir = out / "pictures", out / "corpus", out / "run"
    console.line(f"1/4 prepare: {IMAGES} images drawn from a seed")
    if not (images / "metadata.jsonl").is_file():
        write_corpus(images, count=IMAGES)
    with console.progress() as report:
        counts = prepare([str(images)], out=corpus, config=PREPARE, workers=torchrun.cores(), progress=report)
    console.line(f"    {counts.kept} of {counts.inputs} kept, rejected: {counts.rejected or 'none'}")

    overrides = [f"corpus={corpus}", f"run_dir={run_dir}", *(shortened(steps) if steps else [])]
    config = load_config(RECIPE, overrides=overrides)
    processes = _processes(config)
    summary = plan_summary(make_planner(config), steps=PLANNED_STEPS, ranks=processes)
    console.line(
        f"2/4 plan: {summary['fill']:.1%} fill, {summary['utilisation']:.1%} balance over {processes} process{'es' * (processes != 1)}, "
        f"{summary['samples_per_step']:.0f} images of mixed sizes per step"
    )

    command = shlex.join(["tim", "launch", RECIPE, "--nproc-per-node", str(processes), *overrides])
    console.line(f"3/4 train: {config.train.steps} steps, like `{command}`")
    train(overrides)

    console.line(f"4/4 sample: {len(SIZES)} sizes in {', '.join(map(str, STEPS))} steps, and {PROMPTS_SCORED} prompts scored")
    rows, scores = _draw_and_score(run_dir / "model")
    width_by_height = [f"{width}x{height}" for height, width in SIZES]
    labels = [f"{size}: {figure.caption}" for size, figure in zip(width_by_height, _prompts(len(SIZES)), strict=True)]
    paths = {"model": run_dir / "model", "grid": out / "grid.png", "loss": out / "loss.png", "scores": out / "scores.json"}
    columns = [f"{n} step{'s' * (n > 1)}" for n in STEPS]
    with publish(paths["grid"]) as stream:
        grid(rows, row_labels=labels, column_labels=columns).save(stream, format="PNG")
    _plot_loss(run_dir / "metrics.jsonl", paths["loss"])
    data = {"scores": [asdict(score) for score in scores], "prompts": PROMPTS_SCORED, "fill": summary["fill"]}
    publish_text(paths["scores"], json.dumps(data, indent=2) + "\n")
    model = str(paths["model"])
    suggestion = own_command(
        "sample", model, "--prompt", NEXT_PROMPT, "--size", NEXT_SIZES, "--steps", "1,8", "--out", str(out / "samples")
    )
    page = own_command("serve", model)
    lines = [
        _table(scores),
        "",
        *(f"{name:6}  {path}" for name, path in paths.items()),
        "",
        f'Next: other prompts and sizes, then a page in the browser, with the commands below; your own corpus: README.md, "{READ_ON}".',
        suggestion,
        page,
    ]
    console.result("\n".join(lines), data={**data, "files": paths, "next": suggestion, "serve": page})


def train(overrides: Sequence[str]) -> None:
    """Train the demo's recipe with overrides, with a number of processes that suits this machine. Resumes an existing run.

    Raises RuntimeError if the training fails, and SystemExit if it was stopped.
    """
    config = load_config(RECIPE, overrides=overrides)
    code = torchrun.launch(RECIPE, overrides=overrides, nproc_per_node=_processes(config))
    if code == STOPPED:
        raise SystemExit(code)
    if code:
        raise RuntimeError(f"training ended with exit code {code}: see the lines above")


def own_command(*arguments: str) -> str:
    """Shell command of `tim`, called like this process, because its environment may not be activated."""
    found, script = shutil.which("tim"), Path(sys.argv[0])
    tim = [str(script)] if script.name == "tim" else [sys.executable, "-m", "launch.cli"]
    if found is not None and Path(found).resolve() == script.resolve():
        tim = ["tim"]
    return shlex.join([*tim, *arguments])


def shortened(steps: int) -> list[str]:
    """Overrides for a number of training steps, with warm-up and schedule scaled in proportion."""
    recipe = load_config(RECIPE)
    share = steps / recipe.train.steps
    stages = [stage.model_dump(exclude_none=True) | {"step": max(1, round(share * stage.step))} for stage in recipe.plan.schedule]
    return [f"train.steps={steps}", f"train.warmup={round(share * recipe.train.warmup)}", f"plan.schedule={json.dumps(stages)}"]


def _draw_and_score(model: Path) -> tuple[list[list[Image.Image]], list[Score]]:
    """Sample the images of the grid (one row per size), and score prompts at all sizes for each number of steps."""
    from tim import Generator

    generator = Generator.from_pretrained(model)
    requested = _prompts(PROMPTS_SCORED)
    rows: list[list[Image.Image]] = [[] for _ in SIZES]
    scores = []
    for steps in STEPS:
        drawn = generator(
            [figure.caption for figure in requested],
            height=[SIZES[i % len(SIZES)][0] for i in range(len(requested))],
            width=[SIZES[i % len(SIZES)][1] for i in range(len(requested))],
            steps=steps,
            seed=list(range(len(requested))),
        )
        for row, image in zip(rows, drawn, strict=False):
            row.append(image)
        scores.append(_score(steps, requested, [read_figure(image) for image in drawn]))
    return rows, scores


def _prompts(count: int) -> list[Figure]:
    """Figures spread evenly over the corpus's shapes and colours."""
    choices = figures()
    return [choices[(i * 37) % len(choices)] for i in range(count)]


def _score(steps: int, requested: Sequence[Figure], recognised: Sequence[Figure]) -> Score:
    pairs = list(zip(requested, recognised, strict=True))

    def share(*names: str) -> float:
        return sum(all(getattr(a, name) == getattr(b, name) for name in names) for a, b in pairs) / len(pairs)

    return Score(
        steps=steps,
        shape=share("shape"),
        colour=share("colour"),
        ground=share("ground"),
        colours=share("colour", "ground"),
        all=share("shape", "colour", "ground"),
    )


def _table(scores: Sequence[Score]) -> str:
    lines = ["correct images   shape  colours     both"]
    lines += [
        f"{score.steps:3} step{'s' if score.steps > 1 else ' '}        {score.shape:5.0%}    {score.colours:5.0%}    {score.all:5.0%}"
        for score in scores
    ]
    return "\n".join(lines)


def _plot_loss(metrics: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(metrics)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    kinds = {"loss_diffusion": "r = t", "loss_consistency": "r = 0", "loss_transition": "r < t"}
    for key, label in kinds.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="loss per image (squared error + cosine)", yscale="log")
    axes.legend()
    with publish(target) as stream:
        figure.savefig(stream, dpi=120, format="png")
    pyplot.close(figure)


def _processes(config: Config) -> int:
    """One process on a GPU; on a CPU one per core, at most one per pack of a step."""
    import torch

    return 1 if torch.cuda.is_available() else min(torchrun.cores(), config.plan.packs_per_step)
