"""`tim bench …`: benchmarks on this machine, each compared with alternatives."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import check_prompts, parse_sizes, parse_steps
from launch.command_options import Debug, Json
from launch.console import session
from launch.text_tables import describe_bench, describe_fit
from pipeline.progress import Progress

if TYPE_CHECKING:
    from launch.benchmarks.network import Data, Grid

bench = typer.Typer(
    help="Benchmarks on this machine, each beside alternatives.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

ImagePaths = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[CORPUS|FOLDER]...", help="Use the image sizes of these; one given twice counts twice. Default: synthetic sizes."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens per image, in patches of 16 × 16 pixels.")]
Width = Annotated[int, typer.Option(min=64, help="Width of the network, a multiple of 64.")]
Depth = Annotated[int, typer.Option(min=1, help="Number of blocks of the network.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Prompt for the model; may be repeated.")]
Classes = Annotated[
    list[int] | None, typer.Option("--class", min=0, metavar="ID", help="Class to sample, for a class model; may be repeated.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Number of measurements of each variant; the fastest counts.")]


@bench.command()
def step(
    images: ImagePaths = None,
    max_tokens: MaxTokens = 1024,
    width: Width = 384,
    depth: Depth = 2,
    batch: Batch = 16,
    batches: Annotated[int, typer.Option(min=1, help="Number of batches to measure.")] = 1,
    repeats: Repeats = 2,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Instead compare torch.compile of whole blocks, and of norms and MLPs, with none.")
    ] = False,
    muon: Annotated[bool, typer.Option("--muon", help="Instead compare Muon with DeepSpeed's, in 10 steps per repeat.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark a training step of the full objective.

    Packed, padded to the longest image, and in buckets of exactly equal sizes. Also measures the cost of the derivative, the packed
    step's share of this device's matrix-product rate, and what averages, guards, logging, heartbeat and background saves add to a
    training step on a quarter of the batch.

    Example: tim bench step photos --max-tokens 1024
    """

    def measure(grids: list[Grid], report: Progress) -> Data:
        if compiled:
            from launch.benchmarks.compiled import bench_compiled

            return bench_compiled(grids, width=width, depth=depth, batch=batch, batches=batches, repeats=repeats, progress=report)
        if muon:
            from launch.benchmarks.muon import compare_muon

            return compare_muon(grids, width=width, depth=depth, batch=batch, steps=10 * repeats, progress=report)
        from launch.benchmarks.network import bench_step

        found = bench_step(grids, width=width, depth=depth, batch=batch, batches=batches, repeats=repeats, progress=report)
        if find_spec("deepspeed") is not None:
            from launch.benchmarks.step_overheads import bench_overheads

            some = grids[: max(1, batch // 4)]
            settings = {"width": width, "depth": depth, "precision": found["precision"], "turns": 5 * repeats}
            found["training_step"] = bench_overheads(some, **settings, progress=report)
        return found

    _run(measure, images, max_tokens=max_tokens, as_json=as_json, debug=debug)


@bench.command()
def attention(
    images: ImagePaths = None,
    max_tokens: MaxTokens = 1024,
    width: Width = 384,
    batch: Batch = 16,
    repeats: Repeats = 3,
    fit: Annotated[
        bool, typer.Option("--fit", help="Instead fit the planner's cost model to this device, and print plan.gamma and plan.cost_factors.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark all attention backends that this device supports.

    Example: tim bench attention photos --max-tokens 4096
    """

    def measure(grids: list[Grid], report: Progress) -> Data:
        if fit:
            from launch.benchmarks.cost_fit import fit_costs

            return fit_costs(grids, max_tokens=max_tokens, width=width, batch=batch, repeats=repeats, progress=report)
        from launch.benchmarks.network import bench_attention

        return bench_attention(grids, width=width, batch=batch, repeats=repeats, progress=report)

    describe = describe_fit if fit else describe_bench
    _run(measure, images, max_tokens=max_tokens, as_json=as_json, debug=debug, describe=describe)


@bench.command()
def sample(
    images: ImagePaths = None,
    max_tokens: MaxTokens = 1024,
    width: Width = 384,
    depth: Depth = 2,
    batch: Batch = 8,
    steps: Annotated[int, typer.Option(min=1, help="Number of sampling steps.")] = 2,
    repeats: Repeats = 2,
    lists: Annotated[
        bool, typer.Option("--lists", help="Instead compare 64 prompts in one call with one by one, by the demo's network.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Instead measure the peak memory of images of 4096 x 4096 pixels, 1 and 8 of them.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark guided sampling of images of mixed sizes.

    Example: tim bench sample photos --steps 4
    """

    def measure(grids: list[Grid], report: Progress) -> Data:
        from launch.benchmarks import sampling

        if lists:
            return sampling.bench_lists(images=64, steps=steps, repeats=repeats, progress=report)
        if memory:
            return sampling.bench_memory(counts=(1, 8), steps=steps, progress=report)
        from launch.benchmarks.network import bench_sample

        return bench_sample(grids, width=width, depth=depth, batch=batch, steps=steps, repeats=repeats, progress=report)

    _run(measure, images, max_tokens=max_tokens, as_json=as_json, debug=debug)


@bench.command()
def index(
    samples: Annotated[int, typer.Option(min=1, help="Samples per tar.")] = 20_000,
    rows: Annotated[int, typer.Option(min=1, help="Number of samples in the corpus that is opened and planned.")] = 1_000_000_000,
    repeats: Repeats = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark indexing of tars written by other tools.

    Samples per second on one core; time to the first step and memory of a plan over very many rows.

    Example: tim bench index --rows 100000000
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.data.tar_index import bench_index

        return bench_index(samples=samples, rows=rows, repeats=repeats, progress=report)

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def data(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of JPEGs to read.")],
    out: Annotated[Path, typer.Option(help="Folder for shards and the other loaders' environment; reused by later calls.")],
    max_side: Annotated[int, typer.Option(min=32, help="Images are scaled down to at most this many pixels squared.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Number of decoding processes.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, help="Duration of each measurement.")] = 10.0,
    repeats: Repeats = 2,
    install: Annotated[
        bool, typer.Option("--install", help="Install webdataset, mosaicml-streaming, litdata and megatron-energon there for comparison.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark loading: shards to image arrays.

    Images are scaled to their target sizes. Compares the loader with others on the same shards, and with processes that only decode. Also
    measures reading alone.

    Example: tim bench data photos --out bench --install
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.data.loader import bench_data

        return bench_data(
            images,
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
    images: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of images; subfolders are not searched.")],
    out: Annotated[Path, typer.Option(help="Folder for image copies and the other tools' environments; reused by later calls.")],
    copies: Annotated[int, typer.Option(min=1, help="Number of copies of each image.")] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes of each tool.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Number of measurements of each tool; the fastest counts.")] = 1,
    install: Annotated[bool, typer.Option("--install", help="Install img2dataset and Data-Juicer there for comparison.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark preparation: from raw images to a clean corpus.

    Compares `tim prepare` with img2dataset, datasets.map and Data-Juicer on the same files, and with processes that only decode.

    Example: tim bench prepare photos hires --out bench --install
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.data.prepare import bench_prepare

        return bench_prepare(images, work=out, copies=copies, workers=workers, repeats=repeats, install=install, progress=report)

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def plan(
    images: ImagePaths = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks; must divide 128.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps, of 128 packs each, to plan for every mix of sizes.")] = 20,
    rows: Annotated[int, typer.Option(min=1, help="Number of corpus rows for the resume benchmark.")] = 1_000_000_000,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark the planner: utilisation and speed.

    A simulation of many ranks for several mixes of image sizes up to 16,384 tokens, compared with next fit, best fit decreasing and padded
    buckets. Also measures planning and resuming. Given images are an additional mix.

    Example: tim bench plan photos --ranks 64
    """

    def measure(report: Progress) -> Data:
        from launch.benchmarks.data.plan import bench_plan

        return bench_plan(images or [], ranks=ranks, steps=steps, rows=rows, progress=report)

    _report(measure, as_json=as_json, debug=debug)


@bench.command()
def objective(
    out: Annotated[Path, typer.Option(help="Folder for the corpus and the runs; finished runs are reused.")] = Path("objective"),
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps of each objective.")] = 600,
    drawn: Annotated[int, typer.Option("--images", min=10, help="Number of images per objective and number of sampling steps.")] = 200,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the objective with flow matching.

    Forms of the transition objective: same network, data and number of updates.

    Example: tim bench objective --out objective
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.benchmarks.objective import compare_objectives, describe_comparison

        data = compare_objectives(out, steps=steps, drawn=drawn, console=console)
        console.result(describe_comparison(data), data=data)


@bench.command()
def derivative(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Also measure this trained network, a model folder or run_dir, on images that it draws.",
        ),
    ] = None,
    prompt: Prompts = None,
    classes: Classes = None,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Blocks of the random network; may be repeated. Default: 1, 3, 9.")] = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Half the interval of the difference, besides the defaults; may be repeated. Default: 0.005, 0.02, 0.05."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=400, help="Number of images.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=4, help="Maximum number of tokens per image.")] = 36,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark the accuracy of the derivative.

    Relative error of the objective's finite difference against the exact derivative in float64, over precision, epsilon, time and depth, at
    random weights and at trained ones.

    Example: tim bench derivative --model demo/run --prompt "a white cross on red"
    """
    with session(as_json=as_json, debug=debug) as console:
        if model is None and (prompt or classes):
            raise ValueError(f"{'--prompt' if prompt else '--class'}: requires --model MODEL")
        prompts = [] if model is None else check_prompts(prompt or [], classes=classes or [])
        if wrong := [value for value in epsilon or [] if not 0 < value < 0.5]:
            raise ValueError(f"--epsilon {wrong[0]}: must be between 0 and 0.5")
        from launch.benchmarks.derivative import bench_derivative, describe_derivative

        with console.progress() as report:
            data = bench_derivative(
                model=model,
                prompts=prompts,
                depths=depth or [1, 3, 9],
                epsilons=epsilon or [0.005, 0.02, 0.05],
                images=images,
                max_tokens=max_tokens,
                log=console.line,
                progress=report,
            )
        console.result(describe_derivative(data), data=data)


@bench.command()
def precision(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder or the run_dir of a training run.")],
    size: Annotated[str, typer.Option(metavar="WxH[,WxH]...", help="Widths and heights in pixels.")],
    prompt: Prompts = None,
    classes: Classes = None,
    steps: Annotated[str, typer.Option(metavar="N[,N]...", help="Numbers of sampling steps.")] = "1,8",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Benchmark the precision of sampling.

    Difference of images in fp16 and bf16 from those in fp32, in 8-bit levels (0 to 255).

    Example: tim bench precision demo/run --prompt "a white cross on red" --size 32x32,60x20
    """
    with session(as_json=as_json, debug=debug) as console:
        sizes, prompts = parse_sizes(size), check_prompts(prompt or [], classes=classes or [])
        counts = parse_steps(steps)
        from launch.benchmarks.precision import bench_precision

        with console.progress() as report:
            data = bench_precision(model, prompts=prompts, sizes=sizes, steps=counts, log=console.line, progress=report)
        console.result(describe_bench(data), data=data)


def _run(
    measure: Callable[[list[Grid], Progress], Data],
    images: list[Path] | None,
    *,
    max_tokens: int,
    as_json: bool,
    debug: bool,
    describe: Callable[[Data], str] = describe_bench,
) -> None:
    """Run a benchmark on the token grids of images, and print the result."""

    def on_grids(report: Progress) -> Data:
        from launch.benchmarks.network import grids_of  # torch is slow to import, and `--help` does not need it

        return measure(grids_of(images or [], max_tokens=max_tokens), report)

    _report(on_grids, as_json=as_json, debug=debug, describe=describe)


def _report(measure: Callable[[Progress], Data], *, as_json: bool, debug: bool, describe: Callable[[Data], str] = describe_bench) -> None:
    """Run a benchmark, and print the result."""
    with session(as_json=as_json, debug=debug) as console:
        with console.progress() as report:
            data = measure(report)
        console.result(describe(data), data=data)
