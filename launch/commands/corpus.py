"""The commands that make, check and describe a corpus: `tim prepare`, `index`, `encode`, `verify`, `report`, `score`, `annotate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.arguments import one_corpus, one_of, parse_part, split_overrides, split_sources
from launch.commands.options import Debug, Json, Workers
from launch.commands.text_tables import count, describe_annotation, describe_features, describe_input_counts, describe_scores
from launch.console import Console, session
from launch.distributed.torchrun import cores

if TYPE_CHECKING:
    from dataprep.examine.run import Examined
    from dataprep.shards.manifest import InputCounts
    from dataprep.workers.pool import Pool


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
        list[str] | None, typer.Option(metavar="CORPUS", help="A prepared corpus whose images count as duplicates; may be given often.")
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
        float, typer.Option(min=0.5, metavar="GB", help="What a worker may take; an image that needs more is rejected as crashed.")
    ] = 8.0,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Raw images and captions to clean shards.

    Reads any common layout; every input is kept or rejected by name, and the account adds up. Columns are guessed and told.

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
            raise ValueError("no source: name image folders or shards, for example tim prepare photos --out corpus")
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
    out: Annotated[Path, typer.Option(help="Folder of the corpus: a new one, or one that an earlier index has begun.")],
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shards that others wrote, as a corpus.

    Planned, trained and verified from where they lie: nothing is copied or changed, and no image is decoded.

    Example: tim index "laion/{00000..41407}.tar" --out corpus
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.index_tars import index as index_shards

        with console.progress() as report:
            counts = index_shards(shards, out=out, workers=workers or cores(), progress=report)
        facts = asdict(counts)
        console.result(describe_input_counts(out, facts), data={"corpus": out, **facts})


def encode(
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS [KEY=VALUE]...", help="A corpus (folder or URL) and settings (dataprep/features/encoders.py)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the features: a new one, or one that an earlier run of the same command has begun.")],
    run: Annotated[
        str | None, typer.Option("--for", metavar="CONFIG", help="Take sizes, codec, text encoder and teacher from this training config.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="KIND[=PATH]", help="pixel, sd-vae, kl, dc-ae or tiny; the weights: a folder, or hf://OWNER/NAME.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="KIND[=PATH]", help="lookup, open_clip or hf; the weights likewise.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="The folder of the text encoder's tokenizer. Default: with the text encoder.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="The result does not depend on their number. Default: one for each GPU, or for each core without one."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Latents and text features, once for all.

    What codec and text encoder make of a corpus, for training to read in place of images and captions. Resumable; says first how much
    there will be.

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
    corpus: Annotated[Path, typer.Argument(help="Folder that `tim prepare` or `tim index` wrote.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="First make again what can be: tables, index, lists, report, manifest; and say what is lost.")
    ] = False,
    workers: Workers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a corpus.

    Digests, counts, keys, tables against tars, and that every image can be decoded. Exit code 1 if something is wrong.

    Example: tim verify corpus --repair
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.checks.repair import Repaired
        from dataprep.checks.repair import repair as repair_corpus
        from dataprep.checks.verify import verify as verify_corpus

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
    """What is in a corpus, in images.

    InputCounts, sizes, tokens, captions, scores, examples of what was kept and rejected, duplicates side by side, and the fill that the
    planner expects: one HTML file that needs no network.

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
            data = write_report(corpora, out=page, config=config, workers=workers or cores(), progress=progress)
        fills = [f"{each['corpus']}: {each['fill']:.1%} fill" for each in data["corpora"] if each["fill"] is not None]
        console.result("\n".join([f"{data['report']}: {data['bytes'] / 1e6:.2f} MB", *fills]), data=data)


def score(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS|KEY=VALUE", help="Folder or URL of a corpus; values of the config: model, aesthetic, …"),
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

    Similarity of image and caption, an aesthetic head, zero-shot labels, semantic duplicates: columns beside the shards, which stay as
    they are. Runs on a GPU if there is one; a run that was cut short goes on. Plans use the columns: where: "similarity >= 0.28".

    Example: tim score corpus model=ViT-L-14 weights=openai aesthetic=sac+logos+ava1-l14-linearMSE.pth
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.sidecars.score import ScoreConfig
        from dataprep.sidecars.score import score as score_corpus
        from launch.config.load import load_settings

        corpus, overrides = one_corpus(arguments)
        settings = load_settings(config, overrides=overrides, schema=ScoreConfig)
        with console.progress() as progress:
            done = score_corpus(corpus, config=settings, name=name, against=against or (), workers=workers or cores(), progress=progress)
        console.result(describe_scores(corpus, asdict(done)), data={"corpus": corpus, **asdict(done)})


def annotate(
    corpus: Annotated[str, typer.Argument(help="Folder or URL that `tim prepare` or `tim index` wrote.")],
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Columns to add (.parquet, .csv, .tsv, .jsonl); caption and captions are new captions."),
    ] = None,
    on: Annotated[str | None, typer.Option(metavar="key|sha256|url", help="The column of both by which rows find their samples.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the sidecar table; one of this name is replaced. Default: the table's name.")] = None,
    captions: Annotated[
        str, typer.Option(metavar="first|last|only", help="New captions come before the old ones, after them, or in their place.")
    ] = "first",
    mark: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Set this column to true for what the table names. What is marked takedown is not planned."),
    ] = None,
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Take this sidecar table away again, instead.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add columns or captions to a corpus.

    A recaptioning, a licence, a takedown: they go beside the shards, which stay as they are, and plans use them at once.

    Example: tim annotate corpus --table recaptioned.parquet --on key

    Example: tim annotate corpus --table requests.parquet --on url --mark takedown

    Example: tim annotate corpus --remove recaptioned
    """
    with session(as_json=as_json, debug=debug) as console:
        from dataprep.sidecars.annotate import annotate as annotate_corpus
        from dataprep.sidecars.writer import remove_sidecar

        if remove is not None:
            if any(given is not None for given in (table, on, name, mark)):
                raise ValueError(f"--remove {remove}: adds nothing; leave --table, --on, --name and --mark out")
            remove_sidecar(corpus, name=remove)
            console.result(f"{corpus}: has no sidecar '{remove}' any more", data={"corpus": corpus, "removed": remove})
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
    """The workers of a preparation; `memory` in bytes for each."""
    if executor == "ray":
        from dataprep.workers.ray_pool import RayPool

        return RayPool(workers, address=ray_address, memory=memory)
    if executor != "local":
        raise ValueError(f"--executor {executor}: expected local or ray")
    if ray_address is not None:
        raise ValueError(f"--ray-address {ray_address}: goes with --executor ray")
    from dataprep.workers.pool import LocalPool

    return LocalPool(workers or cores(), memory=memory)
