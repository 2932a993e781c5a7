"""Commands for training and models: `tim demo`, `recipes`, `plan`, `train`, `export`, `pull`."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.arguments import one_config
from launch.command_options import ConfigArgument, Debug, Json, Replan
from launch.commands.estimate import DryRun, DryRunRanks, show_dry_run
from launch.commands.launch import print_result
from launch.console import Console, session
from launch.logs.startup import STARTUP
from launch.text_tables import describe_plan, describe_recipes
from tim.model_kinds import Dtype

if TYPE_CHECKING:
    from pipeline.planning.planner import Planner

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
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps. Fewer are faster but give worse images. Default: the recipe's.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the whole pipeline on an embedded corpus.

    Prepares, plans, trains, and samples at several sizes and numbers of steps.

    Example: tim demo --out demo
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.demo import run

        run(out, steps=steps, console=console)


def recipes(
    action: Annotated[str, typer.Argument(metavar="list|show", help="List all recipes, or print one.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to show.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List or show the configs shipped with tim.

    Commands accept a recipe's name as CONFIG.

    Example: tim recipes show photos > mine.yaml
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.config.recipes import recipe_names, recipe_path, recipe_summary

        if action == "show" and name is not None:
            text = recipe_path(name).read_text(encoding="utf-8")
            console.result(text.rstrip("\n"), data={"name": name, "text": text})
            return
        if action != "list" or name is not None:
            raise ValueError(f"tim recipes {action}{f' {name}' if name else ''}: expected `tim recipes list` or `tim recipes show NAME`")
        summaries = {recipe: recipe_summary(recipe) for recipe in recipe_names()}
        console.result(describe_recipes(summaries), data={"recipes": list(summaries)})


def plan(
    config: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A YAML file or a recipe, and overrides."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of processes that share the packs of a step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps to plan.")] = 100,
    checkpoint: Annotated[
        Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Continue from this checkpoint, or from the newest one of a run.")
    ] = None,
    replan: Replan = False,
    sizes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan over columns width and height of a parquet file, without a CONFIG.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="With --sizes: pixels per token side. Default: 32.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="With --sizes: maximum number of tokens per image. Default: 1024.")] = None,
    tokens_per_pack: Annotated[
        int | None, typer.Option(min=1, help="With --sizes: maximum number of tokens per pack. Default: 4096.")
    ] = None,
    packs_per_step: Annotated[int | None, typer.Option(min=1, help="With --sizes: packs per step, all ranks. Default: 8.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="With --sizes: width of the network. Default: 1152.")] = None,
    gamma: Annotated[float | None, typer.Option(min=0, help="With --sizes: weight of attention in the cost. Default: 1.")] = None,
    export_file: Export = None,
    export_as: ExportAs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the plan of training steps.

    Fill, balance over ranks, sizes, and excluded samples with reasons. Does not read images.

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
    """The planner of `tim plan`. given: options that require --sizes. Raises ValueError for a wrong combination of options."""
    from launch.training.planning import plan_from_checkpoint, plan_from_config, plan_from_sizes

    if replan and checkpoint is None:
        raise ValueError("--replan: requires --from CHECKPOINT")
    if sizes is not None:
        if config or checkpoint:
            raise ValueError(f"--sizes {sizes}: cannot be combined with {'--from' if checkpoint else ' '.join(config)}")
        return plan_from_sizes(sizes, **given)
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')}: requires --sizes; with a CONFIG, use its keys")
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


def train(
    config: ConfigArgument,
    replan: Replan = False,
    dry_run: DryRun = False,
    ranks: DryRunRanks = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train in this process.

    Resumes an existing run in run_dir, whatever its number of processes was. A new run starts from random weights, or from train.init=PATH:
    a model folder, another run, or published weights (train.init_strict=false loads the matching tensors).

    Example: tim train photos corpus=corpus run_dir=runs/first train.steps=100
    """
    with session(as_json=as_json, debug=debug) as console, STARTUP.shown("importing torch and DeepSpeed"):
        from launch.config.load import load_config
        from launch.distributed import torchrun
        from launch.training.train import train as train_run

        source, overrides = one_config(config)
        if dry_run:
            show_dry_run(load_config(source, overrides=overrides), ranks=ranks, console=console)
            return
        done = train_run(load_config(source, overrides=overrides), replan=replan)
        if torchrun.LAUNCHER not in os.environ and os.environ.get("RANK", "0") == "0":  # else `tim launch` prints it
            print_result(console, done.run_dir, steps=done.steps)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run folder of a training run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    step: Annotated[int | None, typer.Option(min=1, help="Step of the checkpoint. Default: the newest.")] = None,
    ema: Annotated[float | None, typer.Option(metavar="DECAY", help="Export the average of this decay. Default: the first.")] = None,
    no_ema: Annotated[bool, typer.Option("--no-ema", help="Export the latest weights, not an average.")] = False,
    official: Annotated[
        bool, typer.Option("--official", help="Write the format of the published TiM code: network.yaml and weights.")
    ] = False,
    with_models: Annotated[
        bool, typer.Option("--with-models", help="Also copy codec, text encoder and tokenizer into the folder.")
    ] = False,
    layout: Annotated[
        Literal["own", "published", "diffusers"],
        typer.Option(help="own: config.json and weights; published: as --official; diffusers: folders transformer, vae, …."),
    ] = "own",
    dtype: Annotated[Dtype, typer.Option(help="Precision of the stored weights.")] = "fp32",
    adapter: Annotated[
        bool,
        typer.Option("--adapter/--merged", help="Of a LoRA run: its adapters as files for PEFT and ComfyUI, or merged into the model."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a run's model.

    Writes a model folder with config.json, README.md and model.safetensors (in shards above 5 GB). With --with-models it has all files
    needed for sampling. With --adapter, a folder of LoRA files instead.

    Example: tim export runs/first --out models/first
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.checkpoints.export import export as export_run
        from launch.checkpoints.export import export_adapter, run_of

        if official and layout == "diffusers":
            raise ValueError("--official and --layout diffusers exclude each other: give one of them")
        if ema is not None and no_ema:
            raise ValueError("--ema and --no-ema exclude each other: give one of them")
        folder, step = run_of(run, step=step)
        chosen: dict[str, Any] = {"out": out, "ema": not no_ema if ema is None else ema, "step": step, "dtype": dtype}
        if adapter and (official or with_models or layout != "own"):
            raise ValueError("--adapter has its own layout: leave out --official, --layout and --with-models")
        settings = {"official": official, "with_models": with_models, "layout": layout}
        done = export_adapter(folder, **chosen) if adapter else export_run(folder, **chosen, **settings)
        for note in done.notes:
            console.line(note)
        weights = "averaged weights" if done.ema else "weights"
        weights += "" if ema is None else f" (decay {ema:g})"
        text = f"{done.folder}: {weights} of step {done.step}, {done.parameters:,} parameters"
        console.result(text, data={"model": done.folder, "step": done.step, "ema": done.ema, "parameters": done.parameters})


def pull(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="The network's recipe, or a YAML file. Default: --list.")] = None,
    out: Annotated[Path | None, typer.Option(help="The model folder to write.")] = None,
    network: Annotated[
        str | None, typer.Option(help="Weights of the network: a .safetensors, .bin, .pt or .pth file, or hf://OWNER/NAME[/FILE].")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="Weights of the codec: a folder, a file, or hf://OWNER/NAME[/FOLDER].")] = None,
    text: Annotated[str | None, typer.Option(help="Weights of the text encoder: a folder, or hf://OWNER/NAME[/FOLDER].")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the tokenizer, if it is not with the text encoder.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the network's repository; of others: hf://OWNER/NAME@REVISION.")
    ] = None,
    sha256: Annotated[
        list[str] | None, typer.Option(metavar="FILE=DIGEST", help="Digest that a file must have. Any number of times.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List what can be pulled, with sizes.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Build the model folder of a published network.

    Takes network, codec and text encoder from the hub or from given files, checks that they fit, and copies all into one folder, which
    tim sample and tim finetune --from read. The same command goes on with a pull that was stopped. Gated models need `hf auth login`.

    Example: tim pull t2i-xl-1 --network t2i_model.bin --codec weights/dc-ae --out models/t2i
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.config.recipes import config_path
        from launch.pulling.published import PUBLISHED, listing

        if list_all or recipe is None:
            if out is not None:
                raise ValueError(f"--out {out}: give a RECIPE too (`tim pull --list` shows them)")
            console.result(listing(), data={"recipes": {name: asdict(found) for name, found in PUBLISHED.items()}})
            return
        config_path(recipe)  # first of all, whether there is such a recipe
        if out is None:
            raise ValueError(f"tim pull {recipe}: give --out FOLDER, the model folder to write")
        from launch.pulling.pull import Given, pull

        digests = dict(_digest(each) for each in sha256 or ())
        given = Given(network=network, codec=codec, text=text, tokenizer=tokenizer, revision=revision, digests=digests)
        done = pull(recipe, out=out, given=given, console=console)
        following = shlex.join(["tim", "sample", str(out), "--prompt", "PROMPT", "--size", "WIDTHxHEIGHT"])
        summary = f"{out}: {done.parameters:,} parameters, {done.bytes / 1e9:.2f} GB"
        data = {"model": done.folder, "parameters": done.parameters, "bytes": done.bytes, "sources": done.sources}
        console.result(f"{summary}\nNext: {following}", data=data)


def _digest(typed: str) -> tuple[str, str]:
    name, equals, digest = typed.rpartition("=")
    if not equals or not name or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"):
        raise ValueError(f"--sha256 {typed}: expected FILE=DIGEST, a digest of 64 hexadecimal digits")
    return name, digest
