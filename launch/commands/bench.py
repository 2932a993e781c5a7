"""`tim bench …`: what this machine and these images make of the packed network, each time beside other ways to run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.options import Debug, Json
from launch.commands.text_tables import describe_bench, describe_fit
from launch.console import session
from pipeline.progress import Progress

if TYPE_CHECKING:
    from launch.benchmarks.network import Data, Grid

bench = typer.Typer(
    help="Measure: speed beside padding and buckets of equal sizes, and the objective beside flow matching.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

Pictures = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[CORPUS|FOLDER]...", help="Whose image sizes to use; one given twice counts twice. Default: made up."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens per image at most, in patches of 16 × 16 pixels.")]
Width = Annotated[int, typer.Option(min=64, help="Width of the network, a multiple of 64.")]
Depth = Annotated[int, typer.Option(min=1, help="Blocks of the network.")]
Batch = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Repeats = Annotated[int, typer.Option(min=1, help="Times that each thing is measured; the fastest counts.")]


@bench.command()
def step(
    pictures: Pictures = None,
    max_tokens: MaxTokens = 1024,
    width: Width = 384,
    depth: Depth = 2,
    batch: Batch = 16,
    batches: Annotated[int, typer.Option(min=1, help="Batches to measure.")] = 1,
    repeats: Repeats = 2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A training step of the full objective.

    Packed, padded to the longest image, and in buckets of exactly equal sizes; what the derivative costs; and the share of this
    device's matrix-product rate that the packed step reaches.

    Example: tim bench step photos --max-tokens 1024
    """

    def measure(grids: list[Grid], report: Progress) -> Data:
        from launch.benchmarks.network import bench_step

        return bench_step(grids, width=width, depth=depth, batch=batch, batches=batches, repeats=repeats, progress=report)

    _run(measure, pictures, max_tokens=max_tokens, as_json=as_json, debug=debug)


@bench.command()
def attention(
    pictures: Pictures = None,
    max_tokens: MaxTokens = 1024,
    width: Width = 384,
    batch: Batch = 16,
    repeats: Repeats = 3,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the planner's cost model to this device instead: prints plan.gamma and plan.cost_factors.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Attention alone: every backend that this device has.

    Example: tim bench attention photos --max-tokens 4096
    """

    def measure(grids: list[Grid], report: Progress) -> Data:
        if fit:
            from launch.benchmarks.cost_fit import fit_costs

            return fit_costs(grids, max_tokens=max_tokens, width=width, batch=batch, repeats=repeats, progress=report)
        from launch.benchmarks.network import bench_attention

        return bench_attention(grids, width=width, batch=batch, repeats=repeats, progress=report)

    describe = describe_fit if fit else describe_bench
    _run(measure, pictures, max_tokens=max_tokens, as_json=as_json, debug=debug, describe=describe)


@bench.command()
def sample(
    pictures: Pictures = None,
    max_tokens: MaxTokens = 1024,
    width: Width = 384,
    depth: Depth = 2,
    batch: Batch = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 2,
    repeats: Repeats = 2,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Guided sampling of images of mixed sizes.

    Example: tim bench sample photos --steps 4
    """

    def measure(grids: list[Grid], report: Progress) -> Data:
        from launch.benchmarks.network import bench_sample

        return bench_sample(grids, width=width, depth=depth, batch=batch, steps=steps, repeats=repeats, progress=report)

    _run(measure, pictures, max_tokens=max_tokens, as_json=as_json, debug=debug)


@bench.command()
def index(
    samples: Annotated[int, typer.Option(min=1, help="Samples in each tar.")] = 20_000,
    rows: Annotated[int, typer.Option(min=1, help="Samples of the corpus that is opened and planned.")] = 1_000_000_000,
    repeats: Repeats = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Indexing foreign tars.

    Samples a second on one core; time to the first step, and memory, of a plan over very many rows.

    Example: tim bench index --rows 100000000
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.index import bench_index

        return bench_index(samples=samples, rows=rows, repeats=repeats, progress=report)

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def data(
    pictures: Annotated[Path, typer.Argument(metavar="FOLDER", help="Whose JPEGs to read.")],
    out: Annotated[Path, typer.Option(help="Folder for their shards and for the other loaders' environment; kept for the next time.")],
    max_side: Annotated[int, typer.Option(min=32, help="Images are scaled down to so many pixels squared.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is measured.")] = 10.0,
    repeats: Repeats = 2,
    install: Annotated[
        bool, typer.Option("--install", help="Install webdataset, mosaicml-streaming, litdata and megatron-energon there, to compare with.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Images from shards to arrays of their target sizes.

    The loader beside others on the same shards, and beside processes that do nothing but decode; and reading alone.

    Example: tim bench data photos --out bench --install
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.data import bench_data

        return bench_data(
            pictures,
            work=out,
            max_side=max_side,
            workers=workers,
            seconds=seconds,
            repeats=repeats,
            install=install,
            progress=report,
        )

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def prepare(
    pictures: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of images; below them nothing is looked for.")],
    out: Annotated[Path, typer.Option(help="Folder for their copies and for the other tools' environments; kept for the next time.")],
    copies: Annotated[int, typer.Option(min=1, help="How often each image is there.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each tool.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is measured; the fastest counts.")] = 1,
    install: Annotated[bool, typer.Option("--install", help="Install img2dataset and Data-Juicer there, to compare with.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Raw images to a clean corpus.

    `tim prepare` beside img2dataset, datasets.map and Data-Juicer on the same files, and beside processes that do nothing but decode.

    Example: tim bench prepare photos hires --out bench --install
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.prepare import bench_prepare

        return bench_prepare(pictures, work=out, copies=copies, workers=workers, repeats=repeats, install=install, progress=report)

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def plan(
    pictures: Pictures = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to keep busy; must divide 128.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 128 packs to plan of every mix of sizes.")] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the corpus that a plan is resumed over.")] = 1_000_000_000,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How busy the planner keeps many ranks.

    Simulated, for several mixes of image sizes up to 16,384 tokens, beside next fit, best fit decreasing and padded buckets; and how
    fast it plans and resumes. Images that are given are one of the mixes.

    Example: tim bench plan photos --ranks 64
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.plan import bench_plan

        return bench_plan(pictures or [], ranks=ranks, steps=steps, rows=rows, progress=report)

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def objective(
    out: Annotated[Path, typer.Option(help="Folder for the corpus and the runs; a finished run is kept.")] = Path("objective"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 600,
    pictures: Annotated[int, typer.Option(min=10, help="Images that are drawn of each, in each number of steps.")] = 200,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What the transition objective is worth: the same network, data and updates, trained by each of its forms and as plain flow matching.

    Example: tim bench objective --out objective
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.benchmarks.objective import compare_objectives, describe_comparison

        data = compare_objectives(out, steps=steps, drawn=pictures, console=console)
        console.result(describe_comparison(data), data=data)


def _run(
    measure: Callable[[list[Grid], Progress], Data],
    pictures: list[Path] | None,
    *,
    max_tokens: int,
    as_json: bool,
    debug: bool,
    describe: Callable[[Data], str] = describe_bench,
) -> None:
    """Measure on the grids of some images, and print what came out."""

    def on_grids(report: Progress) -> Data:
        from launch.benchmarks.network import grids_of  # torch is slow to import, and `--help` does not need it

        return measure(grids_of(pictures or [], max_tokens=max_tokens), report)

    _report(on_grids, as_json=as_json, debug=debug, describe=describe)


def _report(measure: Callable[[Progress], Data], *, as_json: bool, debug: bool, describe: Callable[[Data], str] = describe_bench) -> None:
    """Measure, and print what came out."""
    with session(as_json=as_json, debug=debug) as console:
        with console.progress() as report:
            data = measure(report)
        console.result(describe(data), data=data)
