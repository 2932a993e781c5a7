"""Commands that create, check and describe a corpus: `tim prepare`, `index`, `encode`, `verify`, `report`, `score`, `annotate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.arguments import one_corpus, one_of, parse_part, split_overrides, split_sources
from launch.command_options import Debug, Json, Workers
from launch.console import Console, session
from launch.text_tables import count, describe_annotation, describe_features, describe_input_counts, describe_scores

if TYPE_CHECKING:
    from dataprep.examine.run import Examined
    from dataprep.shards.manifest import InputCounts
    from dataprep.workers.pool import Pool


def prepare(
    out: Annotated[str, typer.Option(help="Folder or URL (s3://…) of the corpus: new, or started by an earlier run of the same command.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]SOURCE] [KEY=VALUE]...",
            help="Paths or URLs of image folders, lists (.csv, .tsv, .jsonl, .parquet, .arrow), WebDataset shards and data sets (hf:NAME);"
            " overrides of the config.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="CORPUS", help="A prepared corpus; its images count as duplicates. May be repeated.")
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add inputs that a finished corpus does not have, in new shards.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry rejected inputs of a finished corpus, and add those that are valid now.")
    ] = False,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Run as task K of a job array of N: examine one part of the inputs, for --merge.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Create the corpus from all examined parts of a job array.")] = False,
    work: Annotated[
        Path | None, typer.Option(help="Folder for unfinished work. Default: OUT/.work; for a URL, a folder in ~/.cache/tim.")
    ] = None,
    executor: Annotated[
        str,
        typer.Option(metavar="local|ray", help="Where workers run: on this machine, or on a Ray cluster with access to the same files."),
    ] = "local",
    ray_address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Address of the Ray cluster. Default: the local one.")] = None,
    worker_memory: Annotated[
        float, typer.Option(min=0.5, metavar="GB", help="Memory limit per worker; an image that needs more is rejected as crashed.")
    ] = 8.0,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prepare raw images and captions as clean shards.

    Reads all common layouts. Every input is either kept or rejected with a reason. Detects columns, and prints which ones it uses.

    Example: tim prepare photos "more/{00000..00009}.tar" --out corpus filters.min_side=64

    Example: tim prepare web=list.parquet art=s3://bucket/art --out corpus "sources.web.columns.caption=[synthetic,alt]"

    Example: tim prepare more --out corpus --append

    Example: tim prepare photos --out corpus --part $SLURM_ARRAY_TASK_ID/16, and when all are done: tim prepare photos --out corpus --merge
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.job import with_own_settings
        from dataprep.prepare import AppendMode, JobPart, PrepareConfig, prepare_part
        from dataprep.prepare import prepare as prepare_corpus
        from launch.config.load import load_settings

        positional, overrides = split_sources(sources or [], settings=PrepareConfig.model_fields)
        settings = load_settings(config, overrides=overrides, schema=PrepareConfig)
        if (append or retry_failed) and config is None:
            settings = with_own_settings(out, given=settings)
        if not positional and not settings.sources:
            raise ValueError("no source: give image folders or shards, for example tim prepare photos --out corpus")
        _check_one_mode({"--append/--retry-failed": append or retry_failed, "--part": part is not None, "--merge": merge})
        pool = _pool(executor, workers=workers, memory=round(worker_memory * 1e9), ray_address=ray_address)
        with console.progress() as report:
            job: dict[str, Any] = {"out": out, "config": settings, "against": against or (), "work": work, "pool": pool, "progress": report}
            append_mode = AppendMode(append=append, retry=retry_failed) if append or retry_failed else None
            if part is not None:
                done = prepare_part(positional, part=JobPart(*parse_part(part)), announce=console.line, **job)
            else:
                done = prepare_corpus(positional, append_mode=append_mode, merge=merge, announce=console.line, **job)
        _show_prepared(console, done, out=out, part=part)


def _check_one_mode(modes: Mapping[str, bool]) -> None:
    given = [option for option, is_given in modes.items() if is_given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")


def _show_prepared(console: Console, done: InputCounts | Examined, *, out: str, part: str | None) -> None:
    from dataprep.shards.manifest import REPORT

    counts = asdict(done)
    if part is not None:
        console.result(f"{out}: part {part} of {count(done.inputs, 'input')} is examined", data={"corpus": out, "part": part, **counts})
        return
    page = f"{out.rstrip('/')}/{REPORT}"
    console.result(f"{describe_input_counts(out, counts)}\nreport: {page}", data={"corpus": out, **counts, "report": page})


def index(
    shards: Annotated[list[str], typer.Argument(metavar="SHARDS", help='WebDataset tars: "x/{00000..41407}.tar", "x/*.tar", URLs.')],
    out: Annotated[Path, typer.Option(help="Folder of the corpus: new, or started by an earlier run of the same command.")],
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Index shards written by other tools as a corpus.

    The tars are not modified or copied, and no image is decoded.

    Example: tim index "laion/{00000..41407}.tar" --out corpus
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.index_tars import index as index_shards

        with console.progress() as report:
            counts = index_shards(shards, out=out, workers=_workers(workers), progress=report)
        facts = asdict(counts)
        console.result(describe_input_counts(out, facts), data={"corpus": out, **facts})


def encode(
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS [KEY=VALUE]...", help="A corpus (folder or URL) and settings (docs/configuration.md, Encoding)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the features: new, or started by an earlier run of the same command.")],
    run: Annotated[
        str | None, typer.Option("--for", metavar="CONFIG", help="Take sizes, codec, text encoder and teacher from this training config.")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[=PATH]",
            help="pixel, sd-vae, sd3-vae, flux-vae, flux2-vae, kl, dc-ae or tiny; PATH of its weights: a folder, a file, or hf://OWNER/NAME.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="KIND[=PATH]", help="lookup, open_clip or hf; PATH as for --codec.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of the text encoder's tokenizer. Default: that of the text encoder.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes; does not affect the result. Default: one per GPU, or one per core without a GPU."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Precompute latents and text features of a corpus.

    Training reads them instead of images and captions. Resumable. Prints the expected size first.

    Example: tim encode corpus --codec sd-vae=weights/vae --text hf=weights/gemma --out features max_tokens=[256,1024] flip=true

    Example: tim encode corpus --for t2i-xl-1 --codec dc-ae=weights/dc-ae --text hf=weights/gemma --out features dtype=bfloat16

    Example: accelerate launch --num_machines 4 … -m launch.cli encode corpus --for mine.yaml --out features
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch import encode_job

        positional, overrides = split_overrides(corpus)
        if len(positional) != 1:
            raise ValueError("give one corpus, for example tim encode corpus --codec sd-vae=weights/vae --out features")
        named = [] if tokenizer is None else [f"text.tokenizer={tokenizer}"]
        overrides = [*encode_job.shorthand("codec", codec), *encode_job.shorthand("text", text), *named, *overrides]
        settings = encode_job.settings(run, overrides=overrides)
        done = encode_job.run(
            positional[0], out=out, settings=settings, like=run, overrides=overrides, processes=processes, debug=debug, console=console
        )
        if done is not None:
            data = {"features": out, **asdict(done)}
            console.result(describe_features(out, data), data=data)


def verify(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="Corpus folder, written by `tim prepare` or `tim index`.")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="First rebuild tables, index, lists, report and manifest where possible, and report what is lost."),
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a corpus.

    Verifies digests, counts, keys, tables against tars, and that every image can be decoded. Exits with code 1 if there are problems.

    Example: tim verify corpus --repair
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.checks.repair import Repaired
        from dataprep.checks.repair import repair as repair_corpus
        from dataprep.checks.verify import verify as verify_corpus

        repaired = Repaired(done=[], lost=[])
        if repair:
            with console.progress() as report:
                repaired = repair_corpus(corpus, workers=_workers(workers), progress=report)
        with console.progress() as report:
            found = verify_corpus(corpus, workers=_workers(workers), progress=report)
        clean = not found.problems
        verdict = "clean" if clean else count(len(found.problems), "problem")
        lines = [*repaired.done, *(f"lost: {what}" for what in repaired.lost)]
        lines.append(f"{corpus}: {count(found.samples, 'sample')} in {count(found.shards, 'shard')}, {verdict}")
        data = {"corpus": corpus, "clean": clean, "shards": found.shards, "samples": found.samples, "problems": found.problems}
        console.result("\n".join([*lines, *found.problems]), data={**data, **(asdict(repaired) if repair else {})})
        if not clean:
            raise SystemExit(1)


def report(
    corpus: Annotated[Path | None, typer.Argument(metavar="CORPUS", help="Corpus folder, written by `tim prepare` or `tim index`.")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two corpora side by side instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output file. Default: CORPUS/report.html, or compare.html.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Pixels per token side for the plan.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per image.")] = 1024,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an HTML report on a corpus, with images.

    Input counts, sizes, tokens, captions, scores, examples of kept and rejected images, duplicates side by side, and the planner's expected
    fill, in one self-contained HTML file.

    Example: tim report corpus --stride 16
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.report.html import ReportConfig
        from dataprep.report.html import report as write_report

        if (corpus is None) == (compare is None):
            raise ValueError("give one CORPUS, or --compare A B (see `tim report --help`)")
        corpora = [corpus] if corpus is not None else list(compare or ())
        page = out if out is not None or compare is None else Path("compare.html")
        config = ReportConfig(stride=stride, max_tokens=max_tokens)
        with console.progress() as progress:
            data = write_report(corpora, out=page, config=config, workers=_workers(workers), progress=progress)
        fills = [f"{each['corpus']}: {each['fill']:.1%} fill" for each in data["corpora"] if each["fill"] is not None]
        console.result("\n".join([f"{data['report']}: {data['bytes'] / 1e6:.2f} MB", *fills]), data=data)


def score(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS|KEY=VALUE", help="Folder or URL of a corpus, and overrides of the config: model, aesthetic, …"),
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file with the model and the scores to compute.")] = None,
    name: Annotated[str, typer.Option(help="Name of the sidecar table; an existing one is replaced.")] = "scores",
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="CORPUS", help="With duplicates=COSINE: a scored corpus to compare with. May be repeated."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a corpus with an open_clip model.

    Adds columns for similarity of image and caption, aesthetic score, zero-shot labels and semantic duplicates, in a sidecar table; the
    shards do not change. Uses a GPU if there is one. Resumable. Use the columns to filter a plan: where: "similarity >= 0.28".

    Example: tim score corpus model=ViT-L-14 weights=openai aesthetic=sac+logos+ava1-l14-linearMSE.pth
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.sidecars.score import ScoreConfig
        from dataprep.sidecars.score import score as score_corpus
        from launch.config.load import load_settings

        corpus, overrides = one_corpus(arguments)
        settings = load_settings(config, overrides=overrides, schema=ScoreConfig)
        with console.progress() as progress:
            done = score_corpus(corpus, config=settings, name=name, against=against or (), workers=_workers(workers), progress=progress)
        console.result(describe_scores(corpus, asdict(done)), data={"corpus": corpus, **asdict(done)})


def annotate(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Folder or URL of a corpus, written by `tim prepare` or `tim index`.")],
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table of columns to add (.parquet, .csv, .tsv, .jsonl); its columns caption and captions are new captions.",
        ),
    ] = None,
    on: Annotated[str | None, typer.Option(metavar="key|sha256|url", help="Column that matches rows of the table to samples.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the sidecar table; an existing one is replaced. Default: the table's name.")
    ] = None,
    captions: Annotated[
        str, typer.Option(metavar="first|last|only", help="Put new captions before the existing ones, after them, or replace them.")
    ] = "first",
    mark: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Set this column to true for the table's samples. Samples marked takedown are excluded from plans."
        ),
    ] = None,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Remove this sidecar table instead.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add columns or captions to a corpus.

    For example new captions, licences or takedowns. They are stored in a sidecar table and used by plans at once; the shards do not change.

    Example: tim annotate corpus --table recaptioned.parquet --on key

    Example: tim annotate corpus --table requests.parquet --on url --mark takedown

    Example: tim annotate corpus --remove recaptioned
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.sidecars.annotate import annotate as annotate_corpus
        from dataprep.sidecars.writer import remove_sidecar

        if remove is not None:
            if any(given is not None for given in (table, on, name, mark)):
                raise ValueError(f"--remove {remove}: cannot be combined with --table, --on, --name and --mark")
            remove_sidecar(corpus, name=remove)
            console.result(f"{corpus}: removed sidecar '{remove}'", data={"corpus": corpus, "removed": remove})
            return
        if table is None or on is None:
            raise ValueError("give --table FILE and --on key|sha256|url, or --remove NAME")
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
        console.result(describe_annotation(corpus, table, asdict(done), on=on), data={"corpus": corpus, **asdict(done)})


def _pool(executor: str, *, workers: int | None, memory: int, ray_address: str | None) -> Pool:
    """Create the worker pool; `memory` in bytes per worker."""
    if executor == "ray":
        from dataprep.workers.ray_pool import RayPool

        return RayPool(workers, address=ray_address, memory=memory)
    if executor != "local":
        raise ValueError(f"--executor {executor}: expected local or ray")
    if ray_address is not None:
        raise ValueError(f"--ray-address {ray_address}: requires --executor ray")
    from dataprep.workers.pool import LocalPool

    return LocalPool(_workers(workers), memory=memory)


def _workers(typed: int | None) -> int:
    """Number of processes: that of --workers, or one per core."""
    from launch.distributed.torchrun import cores  # with the supervisor of processes, which every command would import

    return typed or cores()
