"""The command line: `tim COMMAND …`. Each command reads what was typed, calls one function of the other rooms, and says what came of it.

torch, deepspeed and the rooms that need them are imported inside the commands: `tim --help` answers at once, and every command
needs only its own libraries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from launch.arguments import (
    check_guidance,
    check_prompts,
    one_config,
    one_corpus,
    one_of,
    parse_interval,
    parse_part,
    parse_sizes,
    parse_steps,
    parse_times,
    split_overrides,
    split_sources,
)
from launch.bench import bench
from launch.cluster import cores
from launch.console import STOPPED, Console, session
from launch.tables import count, describe_account, describe_features, describe_plan, describe_recipes, describe_scores

if TYPE_CHECKING:
    from dataprep.executor import Pool

app = typer.Typer(
    help="Text-to-image Transition Models at native resolution: prepare a corpus, plan its packs, train, sample.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")

USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])  # typer has no public name for it

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ConfigArgument = Annotated[
    list[str], typer.Argument(metavar="CONFIG|KEY=VALUE", help="A YAML file or a recipe's name, and values that replace its own.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; the result does not depend on their number. Default: one for each core.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the corpus, the run and the pictures.")] = Path("demo"),
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


@app.command()
def prepare(
    out: Annotated[
        str, typer.Option(help="Folder or URL (s3://…) of the corpus: a new one, or one that an earlier run of the same command has begun.")
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]SOURCE] [KEY=VALUE]...",
            help="Paths or URLs of image folders, lists (.csv, .tsv, .jsonl, .parquet, .arrow), WebDataset shards and data sets (hf:NAME);"
            " values of the config.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with other settings than the defaults.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="CORPUS", help="A prepared corpus whose pictures count as duplicates; may be given often.")
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add the inputs that the finished corpus does not have, in new shards.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Read rejected inputs of the finished corpus once more; what is sound now is added.")
    ] = False,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="As task K of a job array of N: examine a part of the inputs, for --merge.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make the corpus of what all parts of a job array have examined.")] = False,
    work: Annotated[
        Path | None, typer.Option(help="Folder for unfinished work. Default: OUT/.work; for a URL, a folder in ~/.cache/tim.")
    ] = None,
    executor: Annotated[
        str, typer.Option(metavar="local|ray", help="Where workers run: here, or on a Ray cluster that sees the same files.")
    ] = "local",
    ray_address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The Ray cluster. Default: the one that runs here.")] = None,
    worker_memory: Annotated[
        float, typer.Option(min=0.5, metavar="GB", help="What a worker may take; a picture that needs more is rejected as crashed.")
    ] = 8.0,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Raw pictures and captions to clean shards.

    Reads any common layout; every input is kept or rejected by name, and the account adds up. Columns are guessed and told.

    Example: tim prepare photos "more/{00000..00009}.tar" --out corpus filters.min_side=64

    Example: tim prepare web=list.parquet art=s3://bucket/art --out corpus sources.web.tags=[crawl] columns.caption=[synthetic,alt]

    Example: tim prepare more --out corpus --append

    Example: tim prepare photos --out corpus --part $SLURM_ARRAY_TASK_ID/16, and when all are done: tim prepare photos --out corpus --merge
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.prepare import Account, Growth, Part, PrepareConfig, prepare_part
        from dataprep.prepare import prepare as prepare_corpus
        from launch.config import load_config

        positional, overrides = split_sources(sources or [], settings=PrepareConfig.model_fields)
        settings = load_config(config, overrides=overrides, schema=PrepareConfig)
        if not positional and not settings.sources:
            raise ValueError("no source: name image folders or shards, for example tim prepare photos --out corpus")
        modes = {"--append/--retry-failed": append or retry_failed, "--part": part is not None, "--merge": merge}
        if sum(modes.values()) > 1:
            raise ValueError(f"{' and '.join(name for name, given in modes.items() if given)}: give one of them")
        pool = _pool(executor, workers=workers, memory=round(worker_memory * 1e9), ray_address=ray_address)
        with console.progress() as report:
            job: dict[str, Any] = {"out": out, "config": settings, "against": against or (), "work": work, "pool": pool}
            job |= {"progress": report, "announce": console.line}
            if part is not None:
                done = prepare_part(positional, part=Part(*parse_part(part)), **job)
            else:
                growth = Growth(append=append, retry=retry_failed) if append or retry_failed else None
                done = prepare_corpus(positional, growth=growth, merge=merge, **job)
        facts = asdict(done)
        if isinstance(done, Account):
            console.result(describe_account(out, facts), data={"corpus": out, **facts})
        else:
            console.result(f"{out}: part {part} of {count(done.inputs, 'input')} is examined", data={"corpus": out, "part": part, **facts})


@app.command()
def index(
    shards: Annotated[list[str], typer.Argument(metavar="SHARDS", help='WebDataset tars: "x/{00000..41407}.tar", "x/*.tar", URLs.')],
    out: Annotated[Path, typer.Option(help="Folder of the corpus: a new one, or one that an earlier index has begun.")],
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shards that others wrote, as a corpus.

    Planned, trained and verified from where they lie: nothing is copied or changed, and no picture is decoded.

    Example: tim index "laion/{00000..41407}.tar" --out corpus
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.indexing import index as index_shards

        with console.progress() as report:
            account = index_shards(shards, out=out, workers=workers or cores(), progress=report)
        facts = asdict(account)
        console.result(describe_account(out, facts), data={"corpus": out, **facts})


@app.command()
def encode(
    corpus: Annotated[
        list[str], typer.Argument(metavar="CORPUS [KEY=VALUE]...", help="Folder or URL of a corpus, and settings (dataprep/encoders.py).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the features: a new one, or one that an earlier run of the same command has begun.")],
    run: Annotated[
        str | None, typer.Option("--for", metavar="CONFIG", help="Take sizes, codec, text encoder and teacher from this training config.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="KIND[=PATH]", help="pixel, sd-vae, kl, dc-ae or tiny; the weights: a folder, or hf://OWNER/NAME.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="KIND[=PATH]", help="lookup, open_clip or hf; the weights likewise.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="The result does not depend on their number. Default: one for each GPU, or for each core without one."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Latents and text features, once for all.

    What codec and text encoder make of a corpus, for training to read in place of pictures and captions. Resumable; says first how much
    there will be.

    Example: tim encode corpus --codec sd-vae=weights/vae --text hf=weights/gemma --out features max_tokens=[256,1024] flip=true

    Example: tim encode corpus --for t2i-xl-1 --codec dc-ae=weights/dc-ae --text hf=weights/gemma --out features dtype=bfloat16

    Example: accelerate launch --num_machines 4 … -m launch.cli encode corpus --for mine.yaml --out features
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch import encoding

        positional, overrides = split_overrides(corpus)
        if len(positional) != 1:
            raise ValueError("give one corpus, for example tim encode corpus --codec sd-vae=weights/vae --out features")
        overrides = [*encoding.shorthand("codec", codec), *encoding.shorthand("text", text), *overrides]
        settings = encoding.settings(run, overrides=overrides)
        done = encoding.run(
            positional[0], out=out, settings=settings, like=run, overrides=overrides, processes=processes, debug=debug, console=console
        )
        if done is not None:
            data = {"features": out, **asdict(done)}
            console.result(describe_features(out, data), data=data)


@app.command()
def verify(
    corpus: Annotated[Path, typer.Argument(help="Folder that `tim prepare` or `tim index` wrote.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="First make again what can be: tables, index, lists, report, manifest; and say what is lost.")
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a corpus.

    Digests, counts, keys, tables against tars, and that every picture can be decoded. Exit code 1 if something is wrong.

    Example: tim verify corpus --repair
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.repair import Repaired
        from dataprep.repair import repair as repair_corpus
        from dataprep.verify import verify as verify_corpus

        repaired = Repaired(done=[], lost=[])
        if repair:
            with console.progress() as report:
                repaired = repair_corpus(corpus, workers=workers or cores(), progress=report)
        with console.progress() as report:
            found = verify_corpus(corpus, workers=workers or cores(), progress=report)
        clean = not found.problems
        verdict = "clean" if clean else count(len(found.problems), "problem")
        lines = [*repaired.done, *(f"lost: {what}" for what in repaired.lost)]
        lines.append(f"{corpus}: {count(found.samples, 'sample')} in {count(found.shards, 'shard')}, {verdict}")
        data = {"corpus": corpus, "clean": clean, "shards": found.shards, "samples": found.samples, "problems": found.problems}
        console.result("\n".join([*lines, *found.problems]), data={**data, **(asdict(repaired) if repair else {})})
        if not clean:
            raise SystemExit(1)


@app.command()
def report(
    corpus: Annotated[Path | None, typer.Argument(metavar="CORPUS", help="Folder that `tim prepare` or `tim index` wrote.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="Two corpora side by side instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: CORPUS/report.html, or compare.html.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Pixels per token side of the plan.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an image at most.")] = 1024,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What is in a corpus, in pictures.

    Account, sizes, tokens, captions, scores, examples of what was kept and rejected, duplicates side by side, and the fill that the
    planner expects: one HTML file that needs no network.

    Example: tim report corpus --stride 16
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.report import ReportConfig
        from dataprep.report import report as write_report

        if (corpus is None) == (compare is None):
            raise ValueError("give one CORPUS, or --compare A B (see `tim report --help`)")
        corpora = [corpus] if corpus is not None else list(compare or ())
        page = out if out is not None or compare is None else Path("compare.html")
        config = ReportConfig(stride=stride, max_tokens=max_tokens)
        with console.progress() as progress:
            data = write_report(corpora, out=page, config=config, workers=workers or cores(), progress=progress)
        fills = [f"{each['corpus']}: {each['fill']:.1%} fill" for each in data["corpora"] if each["fill"] is not None]
        console.result("\n".join([f"{data['report']}: {data['bytes'] / 1e6:.2f} MB", *fills]), data=data)


@app.command()
def score(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CORPUS|KEY=VALUE", help="A local corpus, and values of the config: model, weights, aesthetic, …")
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file that says what to score, and with which model.")] = None,
    name: Annotated[str, typer.Option(help="Of the sidecar table; an earlier one of this name is replaced.")] = "scores",
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="CORPUS", help="With duplicates=COSINE: a scored corpus to compare with; may be given often."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a corpus with an open_clip model.

    Similarity of picture and caption, an aesthetic head, zero-shot labels, semantic duplicates: columns beside the shards, which stay as
    they are. Runs on a GPU if there is one; a run that was cut short goes on. Plans use the columns: where: "similarity >= 0.28".

    Example: tim score corpus model=ViT-L-14 weights=openai aesthetic=sac+logos+ava1-l14-linearMSE.pth
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.score import ScoreConfig
        from dataprep.score import score as score_corpus
        from launch.config import load_config

        corpus, overrides = one_corpus(arguments)
        settings = load_config(config, overrides=overrides, schema=ScoreConfig)
        with console.progress() as progress:
            done = score_corpus(corpus, config=settings, name=name, against=against or (), workers=workers or cores(), progress=progress)
        console.result(describe_scores(corpus, asdict(done)), data={"corpus": corpus, **asdict(done)})


@app.command()
def annotate(
    corpus: Annotated[Path, typer.Argument(help="Folder that `tim prepare` or `tim index` wrote.")],
    table: Annotated[Path, typer.Option(metavar="F.parquet", help="Columns to add; caption and captions are new captions.")],
    on: Annotated[str, typer.Option(metavar="key|sha256|url", help="The column of both by which rows find their samples.")],
    name: Annotated[str | None, typer.Option(help="Of the sidecar table; one of this name is replaced. Default: the table's name.")] = None,
    captions: Annotated[
        str, typer.Option(metavar="first|last|only", help="New captions come before the old ones, after them, or in their place.")
    ] = "first",
    mark: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Set this column to true for what the table names. What is marked takedown is not planned."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add columns or captions to a corpus.

    A recaptioning, a licence, a takedown: they go beside the shards, which stay as they are, and plans use them at once.

    Example: tim annotate corpus --table recaptioned.parquet --on key

    Example: tim annotate corpus --table requests.parquet --on url --mark takedown
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.annotate import annotate as annotate_corpus

        with console.progress() as progress:
            done = annotate_corpus(
                corpus,
                table=table,
                on=one_of(on, option="--on", known=("key", "sha256", "url")),
                name=name,
                captions=one_of(captions, option="--captions", known=("first", "last", "only")),
                mark=mark,
                progress=progress,
            )
        text = f"{corpus}: {done.matched} of {count(done.samples, 'sample')} in {table}; new: {', '.join(done.columns)}"
        console.result(text, data={"corpus": corpus, **asdict(done)})


@app.command()
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
        from launch.config import recipe_names, recipe_path

        if action == "show" and name is not None:
            text = recipe_path(name).read_text(encoding="utf-8")
            console.result(text.rstrip("\n"), data={"name": name, "text": text})
            return
        if action != "list" or name is not None:
            raise ValueError(f"tim recipes {action}{f' {name}' if name else ''}: expected `tim recipes list` or `tim recipes show NAME`")
        texts = {recipe: recipe_path(recipe).read_text(encoding="utf-8") for recipe in recipe_names()}
        console.result(describe_recipes(texts), data={"recipes": list(texts)})


@app.command()
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
    sizes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan over the columns width and height of a parquet file instead of a CONFIG.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="With --sizes: pixels per token side. Default: 32.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="With --sizes: tokens of an image at most. Default: 1024.")] = None,
    tokens_per_pack: Annotated[int | None, typer.Option(min=1, help="With --sizes: tokens of a pack at most. Default: 4096.")] = None,
    packs_per_step: Annotated[int | None, typer.Option(min=1, help="With --sizes: packs of a step, all ranks. Default: 8.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="With --sizes: width of the network. Default: 1152.")] = None,
    gamma: Annotated[float | None, typer.Option(min=0, help="With --sizes: weight of attention in the cost. Default: 1.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What training steps will hold.

    Fill, balance over ranks, sizes, what is left out and why. No picture is read.

    Example: tim plan photos corpus=corpus --ranks 8
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.planning import plan_from_checkpoint, plan_from_config, plan_from_sizes
        from pipeline.summary import plan_summary

        options = {
            "stride": stride,
            "max_tokens": max_tokens,
            "tokens_per_pack": tokens_per_pack,
            "packs_per_step": packs_per_step,
            "width": width,
            "gamma": gamma,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if sizes is not None:
            if config or checkpoint:
                raise ValueError(f"--sizes {sizes}: stands for itself, leave out {'--from' if checkpoint else ' '.join(config or [])}")
            planner = plan_from_sizes(sizes, **given)
        elif given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')}: goes with --sizes only, a CONFIG says it otherwise")
        elif checkpoint is not None:
            planner = plan_from_checkpoint(checkpoint, arguments=config or [])
        elif not config:
            raise ValueError("give a CONFIG, --from CHECKPOINT or --sizes FILE (see `tim plan --help`)")
        else:
            planner = plan_from_config(config)
        with console.progress() as report:
            summary = plan_summary(planner, steps=steps, ranks=ranks, progress=report)
        console.result(describe_plan(summary), data=summary)


@app.command()
def train(config: ConfigArgument, as_json: Json = False, debug: Debug = False) -> None:
    """Train in this process.

    A run that run_dir holds already is continued.

    Example: tim train photos corpus=corpus run_dir=runs/first train.steps=100
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch import cluster
        from launch.config import load_config
        from launch.trainer import train as train_run

        source, overrides = one_config(config)
        done = train_run(load_config(source, overrides=overrides))
        if cluster.LAUNCHER not in os.environ and os.environ.get("RANK", "0") == "0":  # else `tim launch` says it
            _say_trained(console, done.run_dir, steps=done.steps)


@app.command()
def launch(
    config: ConfigArgument,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Training processes on this machine: one for each GPU.")],
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; run the command on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the machines this is, from 0.")] = 0,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 can be reached.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command that would be run, and stop.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train with several processes.

    They run under torchrun and end with this command, however it ends.

    Example: tim launch photos --nproc-per-node 2 corpus=corpus run_dir=runs/first
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch import cluster
        from launch.config import load_config
        from launch.planning import check_ready

        source, overrides = one_config(config)
        settings = load_config(source, overrides=overrides)
        run_dir = check_ready(settings)
        layout: dict[str, Any] = {
            "overrides": overrides,
            "nproc_per_node": nproc_per_node,
            "nnodes": nnodes,
            "node_rank": node_rank,
            "rdzv_endpoint": rdzv_endpoint,
            "options": ["--debug"] if debug else [],
        }
        if dry_run:
            line = cluster.command_line(cluster.torchrun_arguments(source, **layout), nproc_per_node=nproc_per_node)
            console.result(line, data={"command": line})
            return
        code = cluster.launch(source, **layout)
        if code == 0:
            _say_trained(console, run_dir, steps=settings.train.steps)
        elif code == STOPPED:
            console.result(f"{run_dir}: stopped by a signal, and saved", data={"run": run_dir, "exit": code})
        else:
            console.failure(f"training ended with exit code {code}: the lines above say why", code=code)
        raise SystemExit(code)


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="A model folder, or the run_dir of a training run.")],
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
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same pictures.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw pictures at any size.

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
        from launch.draw import draw

        drawings, grid = draw(
            model,
            prompts=prompts,
            sizes=sizes,
            steps=step_counts,
            guidance=scale,
            seed=seed,
            out=out,
            console=console,
            negative=negative,
            times=grid_times,
            interval=guided,
            stochasticity=stochasticity,
        )
        text = "\n".join([*(str(drawing.path) for drawing in drawings), str(grid)])
        console.result(text, data={"images": [asdict(drawing) for drawing in drawings], "grid": grid})


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run_dir of a training run.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    step: Annotated[int | None, typer.Option(min=1, help="Which checkpoint. Default: the newest.")] = None,
    ema: Annotated[bool, typer.Option(help="The averaged weights, or those of the last update.")] = True,
    official: Annotated[bool, typer.Option("--official", help="Write what the published TiM code reads: network.yaml, weights.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model of a run.

    The model folder holds config.json and model.safetensors: all that sampling needs.

    Example: tim export runs/first --out models/first
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.export import export as export_run

        done = export_run(run, out=out, ema=ema, step=step, official=official)
        for note in done.notes:
            console.line(note)
        weights = "averaged weights" if done.ema else "weights"
        text = f"{done.folder}: {weights} of step {done.step}, {done.parameters:,} parameters"
        console.result(text, data={"model": done.folder, "step": done.step, "ema": done.ema, "parameters": done.parameters})


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tim`; returns the exit code, or raises SystemExit with it (see `launch.console`). Wrong usage is one line, too."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        return app(arguments, prog_name="tim", standalone_mode=False) or 0
    except USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tim"
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        with session(as_json="--json" in arguments, debug="--debug" in arguments):
            raise ValueError(f"{message} (see `{command} --help`)") from error


def _pool(executor: str, *, workers: int | None, memory: int, ray_address: str | None) -> Pool:
    """The workers of a preparation; `memory` in bytes for each."""
    if executor == "ray":
        from dataprep.cluster import RayPool

        return RayPool(workers, address=ray_address, memory=memory)
    if executor != "local":
        raise ValueError(f"--executor {executor}: expected local or ray")
    if ray_address is not None:
        raise ValueError(f"--ray-address {ray_address}: goes with --executor ray")
    from dataprep.executor import LocalPool

    return LocalPool(workers or cores(), memory=memory)


def _say_trained(console: Console, run_dir: Path, *, steps: int) -> None:
    from launch.metrics import read_rows

    model = run_dir / "model"
    rows = read_rows(run_dir / "metrics.jsonl")
    data = {"run": run_dir, "model": model, "steps": steps, "last": rows[-1] if rows else None}
    console.result(f"{model}: trained for {steps} steps", data=data)


if __name__ == "__main__":
    sys.exit(main())
