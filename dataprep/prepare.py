"""`tim prepare`: raw sources → a corpus, in two passes. Read `prepare` from top to bottom.

Pass 1 examines the inputs in chunks of 1,024 into tables in a work folder; pass 2 decides on all of them at once and writes the shards.
Every file appears whole or not at all, so that a run that was killed goes on where it was, and ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataprep.append import AppendMode, Base, Selection, read_base
from dataprep.dedup.reference_corpora import ReferenceImages, read_references
from dataprep.examine.examine import ImageConfig, Rules
from dataprep.examine.row_chunks import ChunkTables, chunk_path
from dataprep.examine.run import Examined, JobPart, examine_all, examined_before
from dataprep.job import Job, PrepareConfig, finished_input_counts, locked_job, open_job
from dataprep.report.html import corpus_statistics, render
from dataprep.report.rejections import NothingKept, example_lines, find_examples, in_words
from dataprep.shards.layout import Plan, make_plan
from dataprep.shards.manifest import InputCounts, write_corpus_files
from dataprep.shards.regroup import group_rows
from dataprep.shards.store import Store
from dataprep.shards.writer import ShardEntry, ShardTask, finished_shards, write_shard
from dataprep.sidecars.writer import extended_sidecars, listed_sidecars
from dataprep.sources.class_labels import describe_classes
from dataprep.sources.open import InputSource, all_samples
from dataprep.workers.pool import LocalPool, Pool
from pipeline.corpus.sidecars import Sidecar
from pipeline.progress import Progress, no_progress

__all__ = ["AppendMode", "InputCounts", "JobPart", "PrepareConfig", "prepare", "prepare_part"]

MANY_SHARDS = 10_000
_MAX_NAMES = 4  # of sources that make the name of a corpus
Announce = Callable[[str], None]


def prepare(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    against: Sequence[str | Path] = (),
    append_mode: AppendMode | None = None,
    merge: bool = False,
    work: str | Path | None = None,
    workers: int = 1,
    pool: Pool | None = None,
    progress: Progress = no_progress,
    announce: Announce | None = None,
) -> InputCounts:
    """Make a corpus of `sources` and of `config.sources` (see `open_sources`) at `out`, a folder or a URL, and give account of every input.

    Images that one of the prepared corpora `against` has are duplicates, exact or near ones as among the inputs themselves. With
    `growth`, the finished corpus at `out` gets further shards instead. With `merge`, all inputs were examined by `prepare_part`.

    The same command continues a run that was cut short, and returns at once if the corpus is finished. Unfinished work lies in the folder
    `work`; without one, in OUT/.work, or for a URL in the user's cache. The work is done by `pool`, without one by `workers` processes.
    `progress` is called with (stage, done, total): "examine" counts inputs, "write" counts kept samples, "report" shards.
    `announce` is told what is read of each source, in a sentence, before the work starts.
    Raises ValueError if the sources or `out` cannot be used, NothingKept if no input is usable, RuntimeError if a source changes meanwhile
    or the disk is full.
    """
    pool = pool or LocalPool(workers)
    job = open_job(sources, out=out, config=config, against=against, append_mode=append_mode, work=work)
    finished = None if append_mode else finished_input_counts(job)
    if finished:
        return finished

    with locked_job(job), pool:
        base, selection = read_base(job.store, manifest=job.base, append_mode=append_mode) if append_mode else (None, None)
        if base:  # a broken sidecar is told before the work, not after it
            extended_sidecars(job.store, shards=base.shards, first=len(base.shards))
        examined = examined_before(job.work) if merge or (job.work / JobPart().marker).exists() else None
        if merge and examined is None:
            raise RuntimeError(f"{job.store.place}: no part has been examined yet: run part 1/N, 2/N, … before the merge")
        examined = examined or _examine(job, part=JobPart(), selection=selection, pool=pool, progress=progress, announce=announce)
        tables = ChunkTables([chunk_path(job.work, number) for number in range(examined.chunks)])
        plan = make_plan(
            tables,
            shards=config.shards,
            dedup=config.dedup,
            seed=config.seed,
            references=ReferenceImages.join([*([base.images] if base else []), read_references(job.against)]),
            columns=base.columns if base else None,
            taken_down=base.taken_down if base else None,
            first_shard=len(base.shards) if base else 0,
        )
        counts = _input_counts(plan, examined=examined, base=base, images=config.images)
        if plan.kept:
            shards = _write_all(job, plan=plan, tables=tables, pool=pool, progress=progress)
            sidecars = extended_sidecars(job.store, shards=[*base.shards, *shards], first=len(base.shards)) if base else ()
            _finish(
                job,
                shards=shards,
                counts=counts,
                plan=plan,
                base=base,
                examined=examined,
                sidecars=sidecars,
                pool=pool,
                progress=progress,
            )
            if sidecars and announce:
                names = ", ".join(sidecar.name for sidecar in sidecars)
                announce(f"{out}: its sidecars ({names}) say nothing of the added samples yet: run the commands that made them again")
        examples = {} if plan.kept else find_examples(tables, plan=plan)
    shutil.rmtree(job.work)
    if not plan.kept and base is None:
        _leave_nothing(job.store)
        raise NothingKept(counts, examples=examples)
    return replace(counts, notes=[*counts.notes, *example_lines(examples)])


def prepare_part(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    part: JobPart,
    against: Sequence[str | Path] = (),
    work: str | Path | None = None,
    workers: int = 1,
    pool: Pool | None = None,
    progress: Progress = no_progress,
    announce: Announce | None = None,
) -> Examined | InputCounts:
    """One task of a job array: examine the inputs of a part, for `prepare(…, merge=True)` to make the corpus of. The arguments are those
    of `prepare`, the same for all parts; `work` (or `out`, a folder) lies where all see it. Returns the account of a finished corpus."""
    pool = pool or LocalPool(workers)
    job = open_job(sources, out=out, config=config, against=against, append_mode=None, work=work)
    finished = finished_input_counts(job)
    if finished:
        return finished
    with locked_job(job, part=part), pool:
        return _examine(job, part=part, selection=None, pool=pool, progress=progress, announce=announce)


def _examine(
    job: Job, *, part: JobPart, selection: Selection | None, pool: Pool, progress: Progress, announce: Announce | None
) -> Examined:
    """Pass 1."""
    classes = [describe_classes(job.identity["classes"])] if "classes" in job.identity else []
    if announce:
        for sentence in [*(source.reads() for source in job.sources), *classes]:
            announce(sentence)
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
        notes=[*notes, *classes, *(selection.notes() if selection else ())],
        replaced=dict(selection.replaced) if selection else {},
    )
    examined.save(job.work, part=part)
    return examined


def _input_counts(plan: Plan, *, examined: Examined, base: Base | None, images: ImageConfig) -> InputCounts:
    """Of the corpus as it will be."""
    notes = list(examined.notes)
    if plan.left_out:
        notes.append(f"columns that the corpus does not have were left out: {', '.join(plan.left_out)}")
    if plan.scaled_down:
        limits = {"images.max_side": images.max_side, "images.max_pixels": images.max_pixels}
        said = ", ".join(f"{key}={limit}" for key, limit in limits.items() if limit is not None)
        number = f"{plan.scaled_down} added images were" if base else f"{plan.scaled_down} images were"
        notes.append(f"{number} scaled down ({said})")
    if base is None and 0 < plan.labelled < plan.kept:
        notes.append(f"only {plan.labelled} of {plan.kept} samples have a class, so the shards have no .cls members")
    shards = plan.shards + (len(base.shards) if base else 0)
    if shards > MANY_SHARDS:
        notes.append(f"{shards} shards are many for a file system: raise shards.max_bytes or shards.max_samples")
    inputs = plan.kept + sum(plan.rejected.values())
    if base is None:
        return InputCounts(inputs=inputs, kept=plan.kept, rejected=dict(plan.rejected), notes=notes, shards=shards)
    old = base.counts
    if not plan.kept:
        return replace(old, notes=[*notes, f"nothing was added: of {inputs} inputs none could be kept ({in_words(plan.rejected)})"])
    rejected = Counter(old.rejected)
    rejected.subtract(examined.replaced)
    rejected.update(plan.rejected)
    return InputCounts(
        inputs=old.inputs + inputs - sum(examined.replaced.values()),
        kept=old.kept + plan.kept,
        rejected={reason: number for reason, number in sorted(rejected.items()) if number},
        notes=list(dict.fromkeys([*old.notes, *notes])),
        shards=shards,
    )


def _leave_nothing(store: Store) -> None:
    if not store.is_remote and not any(Path(store.place).iterdir()):
        Path(store.place).rmdir()


def _write_all(job: Job, *, plan: Plan, tables: ChunkTables, pool: Pool, progress: Progress) -> list[ShardEntry]:
    """Pass 2. Shards that are complete are not written again."""
    first, digest = plan.first_shard, job.digest
    shards = finished_shards(job.store, first=first, count=plan.shards, job=digest)
    missing = [place for place, shard in enumerate(shards) if shard is None]
    written_before = sum(shard.count for shard in shards if shard)
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
            job=digest,
        )
        for place in missing
    )
    note = f"{plan.kept:,} kept, {sum(plan.rejected.values()):,} rejected"

    def show(written: int) -> None:
        progress("write", min(written_before + written, plan.kept), plan.kept, note=note)

    for place, shard in zip(missing, pool.map(write_shard, tasks, on_items=show), strict=True):
        shards[place] = shard
    show(plan.kept - written_before)
    return [shard for shard in shards if shard]


def _finish(
    job: Job,
    *,
    shards: Sequence[ShardEntry],
    counts: InputCounts,
    plan: Plan,
    base: Base | None,
    examined: Examined,
    sidecars: tuple[Sidecar, ...],
    pool: Pool,
    progress: Progress,
) -> None:
    """The files that make the old shards and the new ones a corpus."""
    identity = dict(job.identity)
    append_mode: list[Mapping[str, Any]] = []
    if base:
        for section in ("sources", "against"):
            old = base.manifest[section]
            identity[section] = [*old, *(entry for entry in identity[section] if entry not in old)]
        append_mode = [
            *base.manifest.get("growth", ()),
            {"first_shard": len(base.shards), "replaced": dict(sorted(examined.replaced.items()))},
        ]

    def report(manifest: dict[str, Any]) -> str:
        found = corpus_statistics(
            job.store.place, manifest=manifest, config=job.config.report, pool=pool, sidecars=sidecars, progress=progress
        )
        return render([found], config=job.config.report)

    write_corpus_files(
        job.store,
        name=base.manifest["name"] if base else job.config.name or _joined_name(job.sources),
        shards=[*(base.shards if base else ()), *shards],
        counts=counts,
        columns=plan.columns,
        identity=identity,
        image_format=job.config.images.format,
        report=report,
        append_mode=append_mode,
        sidecars=listed_sidecars(sidecars) if sidecars else "",
    )


def _joined_name(sources: Sequence[InputSource]) -> str:
    """A name for a corpus of these sources."""
    names = [source.name for source in sources]
    more = len(names) - _MAX_NAMES
    return "+".join(names if more <= 0 else [*names[:_MAX_NAMES], f"{more}-more"])
