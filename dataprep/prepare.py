"""`tim prepare`: raw sources → a corpus folder, in two passes. Read `prepare` from top to bottom.

Pass 1 examines the inputs in chunks of 1,024 into tables in OUT/.work; pass 2 decides on all of them at once and writes the shards. Every
file appears whole or not at all, so that a run that was killed goes on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dataprep.captions import CaptionConfig, check_languages
from dataprep.chunks import CHUNK_SIZE, ChunkTables, write_chunk
from dataprep.columns import ColumnConfig
from dataprep.dedup import DedupConfig
from dataprep.examine import PIECE_BYTES, PIECE_SIZE, ImageConfig, Piece, Rules, examine_piece
from dataprep.executor import LocalPool, WorkerDied
from dataprep.files import JOB, WORK, claimed, publish_text
from dataprep.filters import FilterConfig
from dataprep.manifest import MANIFEST, REPORT, Account, read_account, read_manifest, write_corpus_files, write_manifest
from dataprep.plan import Plan, ShardConfig, make_plan
from dataprep.records import RawSample
from dataprep.report import ReportConfig, census, render
from dataprep.shards import Shard, ShardTask, finished_shard, write_shard
from dataprep.sources import Source, SourceConfig, SourceName, all_samples, open_sources

__all__ = ["Account", "PrepareConfig", "prepare"]

Progress = Callable[[str, int, int | None], None]

MANY_SHARDS = 10_000


class PrepareConfig(BaseModel):
    """All settings of a preparation. The defaults are those of DESIGN §4; `name` is the first source's if it is None.

    `sources`: by name, what is read beside the sources of the command line, or what there is to say of those. `columns`: for all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    images: ImageConfig = ImageConfig()
    captions: CaptionConfig = CaptionConfig()
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    shards: ShardConfig = ShardConfig()
    report: ReportConfig = ReportConfig()
    columns: ColumnConfig = ColumnConfig()
    sources: dict[SourceName, SourceConfig] = Field(default_factory=dict)


def prepare(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    workers: int = 1,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Account:
    """Make a corpus of `sources` and of `config.sources` (see `open_sources`) in the folder `out`, and give account of every input.

    The same command continues a run that was cut short, and returns at once if the corpus is finished. `progress` is called with (stage,
    done, total): "examine" counts inputs, of which the total is not known in advance (None), "write" counts kept samples, "report" shards.
    `announce` is told what is read of each source, in a sentence, before the work starts.
    Raises ValueError if the sources or `out` cannot be used, RuntimeError if no input is usable or a source changes meanwhile.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more")
    check_languages(config.captions)
    out = Path(out)
    opened = open_sources(sources, named=config.sources, columns=config.columns)
    identity = _identity(opened, config=config)
    finished = _check_output(out, identity=identity, sources=opened)
    if finished:
        return finished
    if announce:
        for source in opened:
            announce(source.reads())

    with _claimed(out, identity=identity) as work, LocalPool(workers) as pool:
        tables = _examine_all(opened, work=work, config=config, pool=pool, progress=progress)
        plan = make_plan(tables, shards=config.shards, dedup=config.dedup, seed=config.seed)
        account = _account(plan, sources=opened)
        if not plan.kept:
            _abandon(out)
            raise RuntimeError(f"no usable picture among {account.inputs} inputs ({_in_words(account)}): nothing was written")
        shards = _write_all(plan, tables=tables, out=out, config=config, pool=pool, progress=progress)
        name = config.name or opened[0].name
        manifest = write_corpus_files(out, name=name, shards=shards, account=account, identity=identity, image_format=config.images.format)
        found = census(out, manifest=manifest, config=config.report, pool=pool, progress=progress)
        publish_text(out / REPORT, render([found], config=config.report))
        write_manifest(out, manifest=manifest)
    shutil.rmtree(out / WORK)
    return account


def _identity(sources: Sequence[Source], *, config: PrepareConfig) -> dict[str, Any]:
    """What makes two preparations the same, as it stands in the manifest: no path, time or worker count."""
    return {
        "config": config.model_dump(mode="json", exclude={"sources"}),
        "sources": [
            {"name": source.name, "layout": source.layout, "digest": source.digest(), "tags": list(source.tags), "reads": source.reads()}
            for source in sources
        ],
    }


def _check_output(out: Path, *, identity: dict[str, Any], sources: Sequence[Source]) -> Account | None:
    """The account if `out` already holds this very corpus, None if it is free or holds an unfinished run of it; ValueError otherwise."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder")
    for source in sources:
        if source.root in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"{out}: lies inside the source {source.root}; give a folder elsewhere")
    if not out.is_dir():
        return None
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        changed = _difference(manifest, identity)
        if changed:
            raise ValueError(f"{out}: holds a finished corpus with another {changed}; give another folder, or delete this one")
        shutil.rmtree(out / WORK, ignore_errors=True)
        return read_account(manifest)
    job = out / WORK / JOB
    if job.is_file():
        begun = json.loads(job.read_text("utf-8"))
        changed = _difference(begun, {**identity, "version": version("tim")})
        if changed:
            raise ValueError(f"{out}: holds an unfinished corpus with another {changed}; give another folder, or delete this one")
        return None
    strangers = sorted(path.name for path in out.iterdir() if path.name != WORK)
    if strangers:
        raise ValueError(f"{out}: not empty ({strangers[0]} is in it) and not a corpus; give a new or empty folder")
    return None


def _difference(before: Any, now: Any, *, at: str = "") -> str:
    """The name of the first value of `now` that is another one in `before`, "" if none is."""
    if isinstance(now, dict) and isinstance(before, dict):
        names = sorted(now.keys() | (before.keys() if at else ()))
        return next((found for name in names if (found := _difference(before.get(name), now.get(name), at=f"{at}{name}."))), "")
    return "" if before == now else at.removesuffix(".").removeprefix("config.")


@contextmanager
def _claimed(out: Path, *, identity: dict[str, Any]) -> Iterator[Path]:
    """OUT/.work with the job written down."""
    with claimed(out) as work:
        if not (work / JOB).exists():
            publish_text(work / JOB, json.dumps({**identity, "version": version("tim")}, indent=1))
        yield work


def _examine_all(
    sources: Sequence[Source], *, work: Path, config: PrepareConfig, pool: LocalPool, progress: Progress | None
) -> ChunkTables:
    """Pass 1. Chunks whose table is there already are not examined again."""
    rules = Rules(images=config.images, captions=config.captions, filters=config.filters, hashes=config.dedup.near != "off")
    samples = all_samples(sources)
    tables: list[Path] = []
    known = 0

    def pieces() -> Iterator[Piece]:
        nonlocal known
        following = next(samples, None)
        while following is not None:
            table = work / f"chunk-{len(tables):06d}.arrow"
            tables.append(table)
            if table.exists():
                known += 1 + sum(1 for _ in islice(samples, CHUNK_SIZE - 1))
                following = next(samples, None)
                continue
            room = CHUNK_SIZE
            while room and following is not None:
                members = [following, *_up_to_a_piece(islice(samples, min(room, PIECE_SIZE) - 1), first=following)]
                following = next(samples, None)
                room -= len(members)
                yield Piece(samples=tuple(members), table=table, ends_chunk=not room or following is None, rules=rules)

    def show(examined: int) -> None:
        if progress:
            progress("examine", known + examined, None)

    rows: list[dict[str, Any]] = []
    for examined in pool.map(examine_piece, pieces(), retry=_without_culprit, on_items=show):
        rows += examined.rows
        if examined.ends_chunk:
            write_chunk(examined.table, rows)
            rows = []
    return ChunkTables(tables)


def _up_to_a_piece(samples: Iterator[RawSample], *, first: RawSample) -> Iterator[RawSample]:
    """As many of the samples after the first as may wait in memory together."""
    held = len(first.data or b"")
    while held < PIECE_BYTES and (sample := next(samples, None)) is not None:
        held += len(sample.data or b"")
        yield sample


def _without_culprit(piece: Piece, death: WorkerDied) -> Piece:
    """After a worker's death: an input that was under the decoder gets one more try, then it is left out as `crashed`."""
    if death.at < 0:
        raise death
    if death.at in piece.suspects:
        return replace(piece, crashed=piece.crashed | {death.at})
    return replace(piece, suspects=piece.suspects | {death.at})


def _account(plan: Plan, *, sources: Sequence[Source]) -> Account:
    notes = [note for source in sources for note in source.notes()]
    if 0 < plan.labelled < plan.kept:
        notes.append(f"only {plan.labelled} of {plan.kept} samples have a class, so the shards have no .cls members")
    if len(plan.shards) > MANY_SHARDS:
        notes.append(f"{len(plan.shards)} shards are many for a file system: raise shards.max_bytes or shards.max_samples")
    inputs = plan.kept + sum(plan.rejected.values())
    return Account(inputs=inputs, kept=plan.kept, rejected=plan.rejected, notes=notes, shards=len(plan.shards))


def _in_words(account: Account) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in account.rejected.items()) or "none at all"


def _abandon(out: Path) -> None:
    """Leave nothing of a run that came to nothing."""
    shutil.rmtree(out / WORK)
    if not any(out.iterdir()):
        out.rmdir()


def _write_all(
    plan: Plan, *, tables: ChunkTables, out: Path, config: PrepareConfig, pool: LocalPool, progress: Progress | None
) -> list[Shard]:
    """Pass 2. Shards that are complete are not written again."""
    shards = [finished_shard(out, number=number) for number in range(len(plan.shards))]
    missing = [number for number, shard in enumerate(shards) if shard is None]
    known = sum(shard.count for shard in shards if shard)
    tasks = (
        ShardTask(
            number=number,
            entries=plan.shards[number],
            tables=tables.paths,
            out=out,
            columns=plan.columns,
            has_classes=plan.has_classes,
            image_format=config.images.format,
        )
        for number in missing
    )

    def show(written: int) -> None:
        if progress:
            progress("write", known + written, plan.kept)

    for number, shard in zip(missing, pool.map(write_shard, tasks, on_items=show), strict=True):
        shards[number] = shard
    show(plan.kept - known)
    return [shard for shard in shards if shard]
