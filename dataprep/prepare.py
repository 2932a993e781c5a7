"""`tim prepare`: raw sources → a corpus, in two passes. Read `prepare` from top to bottom.

Pass 1 examines the inputs in chunks of 1,024 and writes tables into a work folder. Pass 2 decides on all inputs at once and writes the
shards. Files are written atomically, so a killed run can be resumed and ends with the same bytes.
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
from dataprep.report.rejections import NothingKept, example_lines, find_examples, format_counts
from dataprep.shards.layout import Plan, make_plan
from dataprep.shards.manifest import InputCounts, write_corpus_files
from dataprep.shards.regroup import group_rows
from dataprep.shards.store import Store
from dataprep.shards.writer import ShardEntry, ShardTask, finished_shards, write_shard
from dataprep.sidecars.writer import extended_sidecars, listed_sidecars
from dataprep.sources.class_labels import describe_classes
from dataprep.sources.open import InputSource, all_samples
from dataprep.workers.pool import LocalPool, Pool
from pipeline.progress import Progress, no_progress

__all__ = ["AppendMode", "InputCounts", "JobPart", "PrepareConfig", "prepare", "prepare_part"]

MANY_SHARDS = 10_000
_MAX_NAMES = 4  # sources whose names form the name of a corpus
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
    """Make a corpus from `sources` and `config.sources` (see `open_sources`) at `out`, a folder or a URL. Returns the input counts.

    Images that also are in one of the prepared corpora `against` count as duplicates, exact or near. With `append_mode`, further shards
    are added to the finished corpus at `out`. With `merge`, all inputs have been examined by `prepare_part`.

    The same call resumes an interrupted run, and returns at once if the corpus is finished. Unfinished work is kept in the folder `work`,
    by default OUT/.work, or a folder in the user's cache for a URL. `pool` runs the tasks, by default `workers` processes.
    `progress` is called with (stage, done, total): "examine" counts inputs, "write" kept samples, "report" shards.
    `announce` is called with one sentence per source on what is read from it, before the work starts.
    Raises ValueError if the sources or `out` cannot be used, NothingKept if no input is usable, RuntimeError if a source changes during
    the run or the disk is full.
    """
    pool = pool or LocalPool(workers)
    job = open_job(sources, out=out, config=config, against=against, append_mode=append_mode, work=work)
    finished = None if append_mode else finished_input_counts(job)
    if finished:
        return finished

    with locked_job(job), pool:
        base, selection = read_base(job.store, manifest=job.base, append_mode=append_mode) if append_mode else (None, None)
        if base:  # raise for a broken sidecar before the work, not after it
            extended_sidecars(job.store, shards=base.shards, first=len(base.shards))
        examined = _examined_earlier(job, merge=merge)
        examined = examined or _examine(job, part=JobPart(), selection=selection, pool=pool, progress=progress, announce=announce)
        tables = ChunkTables([chunk_path(job.work, number) for number in range(examined.chunks)])
        plan = _make_plan(job, tables=tables, base=base)
        counts = _input_counts(plan, examined=examined, base=base, images=config.images)
        if plan.kept:
            _write_corpus(
                job,
                plan=plan,
                tables=tables,
                counts=counts,
                base=base,
                examined=examined,
                pool=pool,
                progress=progress,
                announce=announce,
            )
        examples = {} if plan.kept else find_examples(tables, plan=plan)
    shutil.rmtree(job.work)
    if not plan.kept and base is None:
        _remove_empty_folder(job.store)
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
    """Run one task of a job array: examine the inputs of a part; `prepare(…, merge=True)` then makes the corpus.

    The arguments are those of `prepare` and equal for all parts. All tasks must see `work` (or `out`, if it is a folder). Returns the
    input counts if the corpus is finished already.
    """
    pool = pool or LocalPool(workers)
    job = open_job(sources, out=out, config=config, against=against, append_mode=None, work=work)
    finished = finished_input_counts(job)
    if finished:
        return finished
    with locked_job(job, part=part), pool:
        return _examine(job, part=part, selection=None, pool=pool, progress=progress, announce=announce)


def _examined_earlier(job: Job, *, merge: bool) -> Examined | None:
    """Result of pass 1 if an earlier run, or all parts of a job array, finished it. Raises RuntimeError if `merge` finds none."""
    examined = examined_before(job.work) if merge or (job.work / JobPart().marker).exists() else None
    if merge and examined is None:
        raise RuntimeError(f"{job.store.location}: no part has been examined yet: run part 1/N, 2/N, … before the merge")
    return examined


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


def _make_plan(job: Job, *, tables: ChunkTables, base: Base | None) -> Plan:
    references = ReferenceImages.join([*([base.images] if base else []), read_references(job.against)])
    return make_plan(
        tables,
        shards=job.config.shards,
        dedup=job.config.dedup,
        seed=job.config.seed,
        references=references,
        columns=base.columns if base else None,
        taken_down=base.taken_down if base else None,
        first_shard=len(base.shards) if base else 0,
    )


def _input_counts(plan: Plan, *, examined: Examined, base: Base | None, images: ImageConfig) -> InputCounts:
    """Input counts of the finished corpus."""
    notes = list(examined.notes)
    if plan.left_out:
        notes.append(f"columns that the corpus does not have were left out: {', '.join(plan.left_out)}")
    if plan.scaled_down:
        limits = {"images.max_side": images.max_side, "images.max_pixels": images.max_pixels}
        given = ", ".join(f"{key}={limit}" for key, limit in limits.items() if limit is not None)
        number = f"{plan.scaled_down} added images were" if base else f"{plan.scaled_down} images were"
        notes.append(f"{number} scaled down ({given})")
    if plan.masked:
        notes.append(f"{plan.masked} of {plan.kept} {'added ' if base else ''}images have a loss mask")
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
        return replace(old, notes=[*notes, f"nothing was added: of {inputs} inputs none could be kept ({format_counts(plan.rejected)})"])
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


def _remove_empty_folder(store: Store) -> None:
    if not store.is_remote and not any(Path(store.location).iterdir()):
        Path(store.location).rmdir()


def _write_shards(job: Job, *, plan: Plan, tables: ChunkTables, pool: Pool, progress: Progress) -> list[ShardEntry]:
    """Write all shards; complete ones of an earlier run are skipped."""
    first, digest = plan.first_shard, job.digest
    shards = finished_shards(job.store, first=first, count=plan.shards, job=digest)
    missing = [index for index, shard in enumerate(shards) if shard is None]
    written_before = sum(shard.count for shard in shards if shard)
    groups = group_rows(tables, plan=plan, work=job.work) if missing else ()
    tasks = (
        ShardTask(
            number=first + index,
            index=index,
            groups=groups,
            work=job.work,
            store=job.store,
            columns=plan.columns,
            image_format=job.config.images.format,
            job=digest,
        )
        for index in missing
    )
    note = f"{plan.kept:,} kept, {sum(plan.rejected.values()):,} rejected"

    def show(written: int) -> None:
        progress("write", min(written_before + written, plan.kept), plan.kept, note=note)

    for index, shard in zip(missing, pool.map(write_shard, tasks, on_items=show), strict=True):
        shards[index] = shard
    show(plan.kept - written_before)
    return [shard for shard in shards if shard]


def _write_corpus(
    job: Job,
    *,
    plan: Plan,
    tables: ChunkTables,
    counts: InputCounts,
    base: Base | None,
    examined: Examined,
    pool: Pool,
    progress: Progress,
    announce: Announce | None,
) -> None:
    """Pass 2: the shards, then the files that make the old and the new shards one corpus."""
    shards = _write_shards(job, plan=plan, tables=tables, pool=pool, progress=progress)
    all_shards = [*(base.shards if base else ()), *shards]
    sidecars = extended_sidecars(job.store, shards=all_shards, first=len(base.shards)) if base else ()

    def report(manifest: dict[str, Any]) -> str:
        statistics = corpus_statistics(
            job.store.location, manifest=manifest, config=job.config.report, pool=pool, sidecars=sidecars, progress=progress
        )
        return render([statistics], config=job.config.report)

    identity, append_history = _manifest_entries(job, base=base, examined=examined)
    write_corpus_files(
        job.store,
        name=base.manifest["name"] if base else job.config.name or _joined_name(job.sources),
        shards=all_shards,
        counts=counts,
        columns=plan.columns,
        identity=identity,
        image_format=job.config.images.format,
        report=report,
        append_history=append_history,
        sidecars=listed_sidecars(sidecars) if sidecars else "",
    )
    if sidecars and announce:
        names = ", ".join(sidecar.name for sidecar in sidecars)
        announce(
            f"{job.store.location}: its sidecars ({names}) have no values for the added samples yet: rerun the commands that made them"
        )


def _manifest_entries(job: Job, *, base: Base | None, examined: Examined) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """(`identity`, `append_history`) of `write_corpus_files`, with those of the corpus that the job appends to."""
    identity = dict(job.identity)
    if base is None:
        return identity, []
    for section in ("sources", "against"):
        old = base.manifest[section]
        identity[section] = [*old, *(entry for entry in identity[section] if entry not in old)]
    appended = {"first_shard": len(base.shards), "replaced": dict(sorted(examined.replaced.items()))}
    return identity, [*base.manifest.get("growth", ()), appended]


def _joined_name(sources: Sequence[InputSource]) -> str:
    """A name for a corpus of these sources."""
    names = [source.name for source in sources]
    more = len(names) - _MAX_NAMES
    return "+".join(names if more <= 0 else [*names[:_MAX_NAMES], f"{more}-more"])
