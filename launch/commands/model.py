"""The commands from a corpus to images: `tim demo`, `recipes`, `plan`, `train`, `launch`, `sample`, `export`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.arguments import check_guidance, check_prompts, one_config, parse_interval, parse_sizes, parse_steps, parse_times
from launch.commands.options import ConfigArgument, Debug, Json
from launch.commands.text_tables import describe_plan, describe_recipes
from launch.console import STOPPED, Console, session

if TYPE_CHECKING:
    from pipeline.planning.planner import Planner

Replan = Annotated[
    bool,
    typer.Option(
        "--replan",
        help="Go on although corpora, batch or other inputs of the plan have changed: weights, averages, step and learning rate are kept, "
        "the plan begins anew.",
    ),
]
Export = Annotated[
    Path | None,
    typer.Option(
        "--export", metavar="FILE", help="Write the plan for another trainer and print no summary: JSON lines, one for each pack."
    ),
]
ExportAs = Annotated[
    Literal["steps", "tim-buckets"] | None,
    typer.Option(
        help="With --export: steps, or tim-buckets: the whole corpus once, in the two files of the official TiM code, in the folder FILE. "
        "Default: steps."
    ),
]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the corpus, the run and the images.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Updates. Fewer are quicker and draw worse. Default: the recipe's.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole way on an embedded corpus.

    Prepares it, plans, trains, and samples at several sizes and numbers of steps.

    Example: tim demo --out demo
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.demo import run

        run(out, steps=steps, console=console)


def recipes(
    action: Annotated[str, typer.Argument(metavar="list|show", help="List all recipes, or show the text of one.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to show.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The configs that come with tim.

    Where a command wants a CONFIG, a recipe's name will do.

    Example: tim recipes show photos > mine.yaml
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.config.recipes import recipe_names, recipe_path

        if action == "show" and name is not None:
            text = recipe_path(name).read_text(encoding="utf-8")
            console.result(text.rstrip("\n"), data={"name": name, "text": text})
            return
        if action != "list" or name is not None:
            raise ValueError(f"tim recipes {action}{f' {name}' if name else ''}: expected `tim recipes list` or `tim recipes show NAME`")
        texts = {recipe: recipe_path(recipe).read_text(encoding="utf-8") for recipe in recipe_names()}
        console.result(describe_recipes(texts), data={"recipes": list(texts)})


def plan(
    config: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file or a recipe's name, and values that replace its own."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the packs of a step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps to look ahead.")] = 100,
    checkpoint: Annotated[
        Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Go on where this checkpoint, or a run's newest, stands.")
    ] = None,
    replan: Replan = False,
    sizes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan over the columns width and height of a parquet file instead of a CONFIG.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="With --sizes: pixels per token side. Default: 32.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="With --sizes: tokens of an image at most. Default: 1024.")] = None,
    tokens_per_pack: Annotated[int | None, typer.Option(min=1, help="With --sizes: tokens of a pack at most. Default: 4096.")] = None,
    packs_per_step: Annotated[int | None, typer.Option(min=1, help="With --sizes: packs of a step, all ranks. Default: 8.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="With --sizes: width of the network. Default: 1152.")] = None,
    gamma: Annotated[float | None, typer.Option(min=0, help="With --sizes: weight of attention in the cost. Default: 1.")] = None,
    export_file: Export = None,
    export_as: ExportAs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What training steps will hold.

    Fill, balance over ranks, sizes, what is left out and why. No image is read.

    Example: tim plan photos corpus=corpus --ranks 8
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.caption_lengths import caption_lengths
        from launch.training.planning import typed_config
        from pipeline.planning.summary import plan_summary

        options = {
            "stride": stride,
            "max_tokens": max_tokens,
            "tokens_per_pack": tokens_per_pack,
            "packs_per_step": packs_per_step,
            "width": width,
            "gamma": gamma,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if export_as is not None and (export_file is None or (export_as == "tim-buckets" and sizes is not None)):
            raise ValueError(f"--export-as {export_as}: goes with --export FILE{'' if export_file is None else ' and a CONFIG'}")
        planner = _planner(config or [], checkpoint=checkpoint, replan=replan, sizes=sizes, given=given)
        if export_file is not None:
            _export_plan(planner, export_file, format=export_as or "steps", steps=steps, ranks=ranks, console=console)
            return
        with console.progress() as report:
            summary = plan_summary(planner, steps=steps, ranks=ranks, progress=report)
        if sizes is None:
            measured = caption_lengths(typed_config(config or [], checkpoint=checkpoint), planner)
            summary["captions"] = None if measured is None else asdict(measured)
        console.result(describe_plan(summary), data=summary)


def _planner(config: list[str], *, checkpoint: Path | None, replan: bool, sizes: Path | None, given: dict[str, Any]) -> Planner:
    """The planner that `tim plan` was asked for. `given` are options that go with --sizes. Raises ValueError for options that do not."""
    from launch.training.planning import plan_from_checkpoint, plan_from_config, plan_from_sizes

    if replan and checkpoint is None:
        raise ValueError("--replan: goes with --from CHECKPOINT, whose plan it lets end there")
    if sizes is not None:
        if config or checkpoint:
            raise ValueError(f"--sizes {sizes}: stands for itself, leave out {'--from' if checkpoint else ' '.join(config)}")
        return plan_from_sizes(sizes, **given)
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')}: goes with --sizes only, a CONFIG says it otherwise")
    if checkpoint is not None:
        return plan_from_checkpoint(checkpoint, arguments=config, replan=replan)
    if not config:
        raise ValueError("give a CONFIG, --from CHECKPOINT or --sizes FILE (see `tim plan --help`)")
    return plan_from_config(config)


def _export_plan(planner: Planner, file: Path, *, format: str, steps: int, ranks: int, console: Console) -> None:
    from pipeline.planning.export import export_buckets, export_steps

    with console.progress() as report:
        if format == "steps":
            counts = export_steps(planner, file=file, steps=steps, ranks=ranks, progress=report)
        else:
            counts = export_buckets(planner, folder=file, progress=report)
    text = ", ".join(f"{number:,} {what}" for what, number in counts.items())
    console.result(f"{file}: {text}", data={"export": str(file), "format": format, **counts})


def train(config: ConfigArgument, replan: Replan = False, as_json: Json = False, debug: Debug = False) -> None:
    """Train in this process.

    A run that run_dir holds already is continued, with however many processes it was begun. A new one begins with random weights, or with
    those of train.init=PATH: a model folder, another run, or published weights (train.init_strict=false loads what fits).

    Example: tim train photos corpus=corpus run_dir=runs/first train.steps=100
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.config.load import load_config
        from launch.distributed import torchrun
        from launch.training.trainer import train as train_run

        source, overrides = one_config(config)
        done = train_run(load_config(source, overrides=overrides), replan=replan)
        if torchrun.LAUNCHER not in os.environ and os.environ.get("RANK", "0") == "0":  # else `tim launch` says it
            _say_trained(console, done.run_dir, steps=done.steps)


def launch(
    config: ConfigArgument,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Training processes on this machine: one for each GPU.")],
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; run the command on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the machines this is, from 0.")] = 0,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 can be reached.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command that would be run, and stop.")] = False,
    replan: Replan = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train with several processes.

    They run under torchrun and end with this command, however it ends. A run that run_dir holds already is continued, also by more or fewer
    processes than before: the samples and draws of every step stay the same.

    Example: tim launch photos --nproc-per-node 2 corpus=corpus run_dir=runs/first
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.config.load import load_config
        from launch.distributed import torchrun
        from launch.training.planning import check_ready

        source, overrides = one_config(config)
        settings = load_config(source, overrides=overrides)
        run_dir = check_ready(settings)
        layout: dict[str, Any] = {
            "overrides": overrides,
            "nproc_per_node": nproc_per_node,
            "nnodes": nnodes,
            "node_rank": node_rank,
            "rdzv_endpoint": rdzv_endpoint,
            "options": [*["--debug"] * debug, *["--replan"] * replan],
        }
        if dry_run:
            line = torchrun.command_line(torchrun.torchrun_arguments(source, **layout), nproc_per_node=nproc_per_node)
            console.result(line, data={"command": line})
            return
        code = torchrun.launch(source, **layout)
        if code == 0:
            _say_trained(console, run_dir, steps=settings.train.steps)
        elif code == STOPPED:
            console.result(f"{run_dir}: stopped by a signal, and saved", data={"run": run_dir, "exit": code})
        else:
            console.failure(f"training ended with exit code {code}: the lines above say why", code=code)
        raise SystemExit(code)


def sample(
    model: Annotated[
        Path, typer.Argument(help="A model folder, the run_dir of a training run, what tim export --official wrote, or a file of weights.")
    ],
    size: Annotated[
        str, typer.Option(metavar="WxH[,WxH]...", help="Widths and heights in pixels, rounded down to what the model can draw.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given several times.")] = None,
    classes: Annotated[
        list[int] | None, typer.Option("--class", min=0, metavar="ID", help="The same for a model of classes: which one to draw.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N[,N]...", help="Numbers of sampling steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none. Default: the model's.")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance leads away from. Default: nothing in particular.")] = None,
    interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="When guidance acts: shares of the noisiest time, ends included.")
    ] = None,
    times: Annotated[
        str | None, typer.Option(metavar="T,T[,T]...", help="Times to step through instead of --steps: 1 (noise) to 0 for ot_fm.")
    ] = None,
    stochasticity: Annotated[float, typer.Option(min=0, help="New noise in every step but the first and the last; ot_fm only.")] = 0.0,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="With a file of weights: the recipe or YAML file of its network, e.g. t2i-xl-1.")
    ] = None,
    codec: Annotated[str | None, typer.Option(metavar="[KIND=]PATH", help="Where the codec is, in place of the model's own path.")] = None,
    text: Annotated[str | None, typer.Option(metavar="[KIND=]PATH", help="Where the text encoder is, likewise.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH", help="Where its tokenizer is. Default: with the text encoder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw images at any size.

    One PNG for every prompt or class, size and number of steps, and all of them in grid.png.

    Example: tim sample runs/first --prompt "a red fox" --size 512x128,256x256 --steps 1,4,8 --out samples
    """
    with session(as_json=as_json, debug=debug) as console:
        sizes = parse_sizes(size)
        step_counts = parse_steps(steps) if steps is not None else None
        scale = check_guidance(guidance) if guidance is not None else None
        prompts = check_prompts(prompt or [], classes=classes or [])
        grid_times = parse_times(times) if times is not None else None
        guided = parse_interval(interval) if interval is not None else None
        if steps is not None and times is not None:
            raise ValueError(f"--steps {steps} and --times {times}: give one of them")
        from launch.sampling.draw import DrawSettings, draw
        from launch.sampling.model_source import Replacements

        settings = DrawSettings(
            steps=step_counts,
            guidance=scale,
            seed=seed,
            negative=negative,
            times=grid_times,
            interval=guided,
            stochasticity=stochasticity,
        )
        places = Replacements(codec=codec, text=text, tokenizer=tokenizer)
        drawings, grid = draw(
            model, prompts=prompts, sizes=sizes, settings=settings, out=out, recipe=recipe, replacements=places, console=console
        )
        listed = "\n".join([*(str(drawing.path) for drawing in drawings), str(grid)])
        console.result(listed, data={"images": [asdict(drawing) for drawing in drawings], "grid": grid})


def export(
    run: Annotated[Path, typer.Argument(help="The run_dir of a training run.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    step: Annotated[int | None, typer.Option(min=1, help="Which checkpoint. Default: the newest.")] = None,
    ema: Annotated[bool, typer.Option(help="The averaged weights, or those of the last update.")] = True,
    official: Annotated[bool, typer.Option("--official", help="Write what the published TiM code reads: network.yaml, weights.")] = False,
    with_models: Annotated[
        bool, typer.Option("--with-models", help="Copy the codec, the text encoder and its tokenizer into the folder, too.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model of a run.

    The model folder holds config.json and model.safetensors, and with --with-models all that sampling needs.

    Example: tim export runs/first --out models/first
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.checkpoints.export import export as export_run

        done = export_run(run, out=out, ema=ema, step=step, official=official, with_models=with_models)
        for note in done.notes:
            console.line(note)
        weights = "averaged weights" if done.ema else "weights"
        text = f"{done.folder}: {weights} of step {done.step}, {done.parameters:,} parameters"
        console.result(text, data={"model": done.folder, "step": done.step, "ema": done.ema, "parameters": done.parameters})


def _say_trained(console: Console, run_dir: Path, *, steps: int) -> None:
    from launch.training.metrics import read_rows

    model = run_dir / "model"
    rows = read_rows(run_dir / "metrics.jsonl")
    data = {"run": run_dir, "model": model, "steps": steps, "last": rows[-1] if rows else None}
    console.result(f"{model}: trained for {steps} steps", data=data)
