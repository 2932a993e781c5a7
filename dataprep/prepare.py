"""`tim prepare`: raw sources → a corpus, in two passes. Read `prepare` from top to bottom.

Pass 1 examines the inputs in chunks of 1,024 into tables in a work folder; pass 2 decides on all of them at once and writes the shards.
Every file appears whole or not at all, so that a run that was killed goes on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dataprep.captions import CaptionConfig, check_languages
from dataprep.chunks import ChunkTables, chunk_path
from dataprep.columns import ColumnConfig
from dataprep.dedup import DedupConfig
from dataprep.examine import ImageConfig, Rules
from dataprep.executor import LocalPool, Pool
from dataprep.files import JOB, LOCK, claimed_work, publish_text
from dataprep.filters import FilterConfig
from dataprep.grouping import group_rows
from dataprep.growing import Base, Growth, Selection, read_base
from dataprep.identity import differences
from dataprep.inputs import Examined, Part, examine_all, examined_before
from dataprep.known import Known, open_known, read_known
from dataprep.manifest import MANIFEST, Account, read_account, read_manifest, write_corpus_files
from dataprep.plan import Plan, ShardConfig, make_plan
from dataprep.report import ReportConfig, census, render
from dataprep.shards import Shard, ShardTask, finished_shards, shard_number, stats_name, write_shard
from dataprep.sources import Source, SourceConfig, SourceName, all_samples, open_sources
from dataprep.store import Store, open_store
from pipeline.index import Corpus
from pipeline.progress import Progress, unseen

__all__ = ["Account", "Growth", "Part", "PrepareConfig", "prepare", "prepare_part"]

MANY_SHARDS = 10_000
Announce = Callable[[str], None]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be done, and where. `identity`: what makes two preparations the same, as it stands in the manifest: no path, time or
    worker count. `base`: the manifest of the corpus that is to grow, {} for a new one."""

    store: Store
    work: Path
    config: PrepareConfig
    sources: Sequence[Source]
    against: Sequence[Corpus]
    growth: Growth | None
    base: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def said(self) -> dict[str, Any]:
        """What the work folder says of the job that it belongs to."""
        growth = {"append": self.growth.append, "retry": self.growth.retry, "grows": _digest(self.base)} if self.growth else {}
        return {**self.identity, **growth, "version": version("tim")}

    @property
    def digest(self) -> str:
        """What the shards of this job have in common, and those of no other."""
        return _digest(self.said)[:32]


def prepare(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    against: Sequence[str | Path] = (),
    growth: Growth | None = None,
    merge: bool = False,
    work: str | Path | None = None,
    workers: int = 1,
    pool: Pool | None = None,
    progress: Progress = unseen,
    announce: Announce | None = None,
) -> Account:
    """Make a corpus of `sources` and of `config.sources` (see `open_sources`) at `out`, a folder or a URL, and give account of every input.

    Pictures that one of the prepared corpora `against` has are duplicates, exact or near ones as among the inputs themselves. With
    `growth`, the finished corpus at `out` gets further shards instead. With `merge`, all inputs were examined by `prepare_part`.

    The same command continues a run that was cut short, and returns at once if the corpus is finished. Unfinished work lies in the folder
    `work`; without one, in OUT/.work, or for a URL in the user's cache. The work is done by `pool`, without one by `workers` processes.
    `progress` is called with (stage, done, total): "examine" counts inputs, "write" counts kept samples, "report" shards.
    `announce` is told what is read of each source, in a sentence, before the work starts.
    Raises ValueError if the sources or `out` cannot be used, RuntimeError if no input is usable, a source changes meanwhile, or the disk is
    full.
    """
    pool = pool or LocalPool(workers)
    job = _open_job(sources, out=out, config=config, against=against, growth=growth, work=work)
    finished = None if growth else _check_output(job)
    if finished:
        return finished

    with _claimed(job), pool:
        base, selection = read_base(job.store, manifest=job.base, growth=growth) if growth else (None, None)
        examined = examined_before(job.work) if merge or (job.work / Part().marker).exists() else None
        if merge and examined is None:
            raise RuntimeError(f"{job.store.place}: no part has been examined yet: run --part 1/N, 2/N, … before --merge")
        examined = examined or _examine(job, part=Part(), selection=selection, pool=pool, progress=progress, announce=announce)
        tables = ChunkTables([chunk_path(job.work, number) for number in range(examined.chunks)])
        plan = make_plan(
            tables,
            shards=config.shards,
            dedup=config.dedup,
            seed=config.seed,
            known=Known.join([*([base.pictures] if base else []), read_known(job.against)]),
            columns=base.columns if base else None,
            first_shard=len(base.shards) if base else 0,
        )
        account = _account(plan, examined=examined, base=base)
        if plan.kept:
            shards = _write_all(job, plan=plan, tables=tables, pool=pool, progress=progress)
            shards = [*(base.shards if base else ()), *shards]

            def report(manifest: dict[str, Any]) -> str:
                found = census(job.store.place, manifest=manifest, config=config.report, pool=pool, progress=progress)
                return render([found], config=config.report)

            _finish(job, shards=shards, account=account, plan=plan, base=base, examined=examined, report=report)
    shutil.rmtree(job.work)
    if not plan.kept and base is None:
        _leave_nothing(job.store)
        raise RuntimeError(f"no usable picture among {account.inputs} inputs ({_in_words(account.rejected)}): nothing was written")
    return account


def prepare_part(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    part: Part,
    against: Sequence[str | Path] = (),
    work: str | Path | None = None,
    workers: int = 1,
    pool: Pool | None = None,
    progress: Progress = unseen,
    announce: Announce | None = None,
) -> Examined | Account:
    """One task of a job array: examine the inputs of a part, for `prepare(…, merge=True)` to make the corpus of. The arguments are those
    of `prepare`, the same for all parts; `work` (or `out`, a folder) lies where all see it. Returns the account of a finished corpus."""
    pool = pool or LocalPool(workers)
    job = _open_job(sources, out=out, config=config, against=against, growth=None, work=work)
    finished = _check_output(job)
    if finished:
        return finished
    with _claimed(job, part=part), pool:
        return _examine(job, part=part, selection=None, pool=pool, progress=progress, announce=announce)


def _open_job(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    against: Sequence[str | Path],
    growth: Growth | None,
    work: str | Path | None,
) -> _Job:
    check_languages(config.captions)
    store, folder = open_store(out, work=work)
    opened = open_sources(sources, named=config.sources, columns=config.columns)
    for source in opened:
        for place in [folder.resolve(), *([] if store.is_remote else [Path(store.place).resolve()])]:
            if source.root in (place, *place.parents):
                raise ValueError(f"{place}: lies inside the source {source.root}; give a folder elsewhere")
    others = open_known(against)
    identity = {
        "config": config.model_dump(mode="json", exclude={"sources"}),
        "sources": [
            {"name": source.name, "layout": source.layout, "digest": source.digest(), "tags": list(source.tags), "reads": source.reads()}
            for source in opened
        ],
        "against": [{"name": corpus.name, "digest": corpus.digest} for corpus in others],
    }
    job = _Job(store=store, work=folder, config=config, sources=opened, against=others, growth=growth, base={}, identity=identity)
    return replace(job, base=_read_base_manifest(job)) if growth else job


def _read_base_manifest(job: _Job) -> Mapping[str, Any]:
    """The manifest of the corpus that is to grow. Raises ValueError unless it was prepared with the same settings."""
    place = job.store.place
    manifest = read_manifest(job.store)
    if "columns" not in manifest:
        raise ValueError(f"{place}: not made by `tim prepare` of this version; only what it made can grow")
    changed = differences({"config": manifest["config"]}, {"config": job.identity["config"]})
    if changed:
        raise ValueError(f"{place}: was prepared with another {changed}; a corpus grows with the settings that it has (see its {MANIFEST})")
    begun = _begun(job.work)
    if begun and begun.get("grows") == _digest(manifest):
        changed = differences(begun, replace(job, base=manifest).said)
        if changed:
            raise ValueError(f"{place}: an unfinished addition had another {changed}; finish that one first, or delete {job.work}")
    return manifest


def _check_output(job: _Job) -> Account | None:
    """The account if `out` already holds this very corpus, None if it is free or holds an unfinished run of it; ValueError otherwise."""
    place, begun = job.store.place, _begun(job.work)
    found = job.store.sizes()
    if MANIFEST in found:
        manifest = read_manifest(job.store)
        changed = differences(manifest, job.identity)
        if changed:
            remedy = "add inputs with --append, give another folder, or delete this one"
            raise ValueError(f"{place}: holds a finished corpus with another {changed}; {remedy}")
        if begun and "grows" not in begun:
            shutil.rmtree(job.work)
        return read_account(manifest)
    if begun:
        changed = differences(begun, job.said)
        if changed:
            raise ValueError(f"{place}: holds an unfinished corpus with another {changed}; give another folder, or delete this one")
        return None
    if found and not any(_is_of_job(job, name=name) for name in found):
        raise ValueError(f"{place}: not empty ({min(found)} is in it) and not a corpus; give a new or empty folder")
    return None


def _is_of_job(job: _Job, *, name: str) -> bool:
    """Whether a file is a stats file of this job: its work folder was lost, or lies on another machine."""
    number = shard_number(name)
    return number is not None and name == stats_name(number) and json.loads(job.store.read(name)).get("job") == job.digest


def _begun(work: Path) -> dict[str, Any] | None:
    """What the work folder says of an unfinished job, None if there is none."""
    job = work / JOB
    return json.loads(job.read_text("utf-8")) if job.is_file() else None


@contextmanager
def _claimed(job: _Job, *, part: Part | None = None) -> Iterator[None]:
    """The work folder, locked, with the job written down. A full disk is told as such."""
    folder = None if job.store.is_remote else Path(job.store.place)
    name = f"part-{part.number}-of-{part.of}" if part else ""
    try:
        with claimed_work(job.work, place=job.store.place, folder=folder, part=name):
            begun = _begun(job.work)
            if begun is None or (job.growth and begun.get("grows") != job.said["grows"]):
                _begin(job, anew=begun is not None)
            yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = error.filename or job.store.place
        raise RuntimeError(f"{where}: the disk is full; what is finished is kept: make room, and run the same command again") from error


def _begin(job: _Job, *, anew: bool) -> None:
    """Write the job down. `anew`: forget the work of another one, which came to its end or belongs to an older state of the corpus."""
    if anew:
        for path in job.work.iterdir():
            if not path.name.startswith(LOCK):
                path.unlink()
    if job.growth:  # shards of an addition that was given up
        first = len(job.base["shards"])
        for name in job.store.sizes():
            number = shard_number(name)
            if number is not None and number >= first:
                job.store.remove(name)
    publish_text(job.work / JOB, json.dumps(job.said, indent=1))


def _examine(job: _Job, *, part: Part, selection: Selection | None, pool: Pool, progress: Progress, announce: Announce | None) -> Examined:
    """Pass 1."""
    if announce:
        for source in job.sources:
            announce(source.reads())
    config = job.config
    rules = Rules(images=config.images, captions=config.captions, filters=config.filters, hashes=config.dedup.near != "off")
    samples = all_samples(job.sources)
    expected = [source.expected() for source in job.sources]
    inputs, chunks = examine_all(
        selection.of(samples) if selection else samples,
        part=part,
        work=job.work,
        rules=rules,
        pool=pool,
        expected=None if selection or None in expected else sum(number for number in expected if number),
        progress=progress,
    )
    notes = [note for source in job.sources for note in source.notes()]
    examined = Examined(
        inputs=inputs,
        chunks=chunks,
        notes=[*notes, *(selection.notes() if selection else ())],
        replaced=dict(selection.replaced) if selection else {},
    )
    examined.save(job.work, part=part)
    return examined


def _account(plan: Plan, *, examined: Examined, base: Base | None) -> Account:
    """Of the corpus as it will be."""
    notes = list(examined.notes)
    if plan.left_out:
        notes.append(f"columns that the corpus does not have were left out: {', '.join(plan.left_out)}")
    if base is None and 0 < plan.labelled < plan.kept:
        notes.append(f"only {plan.labelled} of {plan.kept} samples have a class, so the shards have no .cls members")
    shards = plan.shards + (len(base.shards) if base else 0)
    if shards > MANY_SHARDS:
        notes.append(f"{shards} shards are many for a file system: raise shards.max_bytes or shards.max_samples")
    inputs = plan.kept + sum(plan.rejected.values())
    if base is None:
        return Account(inputs=inputs, kept=plan.kept, rejected=dict(plan.rejected), notes=notes, shards=shards)
    old = base.account
    if not plan.kept:
        return replace(old, notes=[*notes, f"nothing was added: of {inputs} inputs none could be kept ({_in_words(plan.rejected)})"])
    rejected = Counter(old.rejected)
    rejected.subtract(examined.replaced)
    rejected.update(plan.rejected)
    return Account(
        inputs=old.inputs + inputs - sum(examined.replaced.values()),
        kept=old.kept + plan.kept,
        rejected={reason: number for reason, number in sorted(rejected.items()) if number},
        notes=list(dict.fromkeys([*old.notes, *notes])),
        shards=shards,
    )


def _in_words(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in rejected.items()) or "there is none"


def _leave_nothing(store: Store) -> None:
    if not store.is_remote and not any(Path(store.place).iterdir()):
        Path(store.place).rmdir()


def _write_all(job: _Job, *, plan: Plan, tables: ChunkTables, pool: Pool, progress: Progress) -> list[Shard]:
    """Pass 2. Shards that are complete are not written again."""
    first = plan.first_shard
    shards = finished_shards(job.store, first=first, count=plan.shards, job=job.digest)
    missing = [place for place, shard in enumerate(shards) if shard is None]
    known = sum(shard.count for shard in shards if shard)
    groups = group_rows(tables, plan=plan, work=job.work) if missing else ()
    tasks = (
        ShardTask(
            number=first + place,
            place=place,
            groups=groups,
            work=job.work,
            store=job.store,
            columns=plan.columns,
            image_format=job.config.images.format,
            job=job.digest,
        )
        for place in missing
    )
    note = f"{plan.kept:,} kept, {sum(plan.rejected.values()):,} rejected"

    def show(written: int) -> None:
        progress("write", min(known + written, plan.kept), plan.kept, note=note)

    for place, shard in zip(missing, pool.map(write_shard, tasks, on_items=show), strict=True):
        shards[place] = shard
    show(plan.kept - known)
    return [shard for shard in shards if shard]


def _finish(
    job: _Job,
    *,
    shards: Sequence[Shard],
    account: Account,
    plan: Plan,
    base: Base | None,
    examined: Examined,
    report: Callable[[dict[str, Any]], str],
) -> None:
    """The files that make shards a corpus."""
    identity = dict(job.identity)
    growth: list[Mapping[str, Any]] = []
    if base:
        for section in ("sources", "against"):
            old = base.manifest[section]
            identity[section] = [*old, *(entry for entry in identity[section] if entry not in old)]
        growth = [*base.manifest.get("growth", ()), {"first_shard": len(base.shards), "replaced": dict(sorted(examined.replaced.items()))}]
    write_corpus_files(
        job.store,
        name=base.manifest["name"] if base else job.config.name or job.sources[0].name,
        shards=shards,
        account=account,
        columns=plan.columns,
        identity=identity,
        image_format=job.config.images.format,
        report=report,
        growth=growth,
    )


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
