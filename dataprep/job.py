"""A preparation: its settings, its output location, and what the location holds: nothing, an unfinished run, or a finished corpus."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dataprep.append import AppendMode
from dataprep.config_diff import all_differences, differences
from dataprep.dedup.perceptual import DedupConfig
from dataprep.dedup.reference_corpora import open_references
from dataprep.examine.captions import LANGUAGE, CaptionConfig, check_languages
from dataprep.examine.examine import ImageConfig
from dataprep.examine.filters import FilterConfig, Filters
from dataprep.examine.run import JobPart
from dataprep.report.html import ReportConfig
from dataprep.shards.layout import ShardConfig
from dataprep.shards.manifest import MANIFEST, InputCounts, read_input_counts
from dataprep.shards.store import Store, open_store
from dataprep.shards.writer import number_of_file, shard_number, stats_name
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.open import FIRST_INPUTS, InputSource, SourceConfig, SourceName, column_names, number_classes, open_sources
from pipeline.corpus.corpus import Corpus, read_manifest
from pipeline.corpus.row_filter import unknown_column
from pipeline.digests import json_digest
from pipeline.storage.atomic import JOB, LOCK, locked_work_folder, publish_text

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PrepareConfig(BaseModel):
    """All settings of a preparation. `name` defaults to the names of the sources.

    `sources`: further sources by name, or settings of the sources given as arguments. `columns`: the default for all sources.
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
class Job:
    """What to prepare, and where.

    `work`: the folder for unfinished work. `identity`: the settings and sources that define the result, as in the manifest; no path, time
    or worker count. `base`: the manifest of the corpus to append to, {} for a new corpus.
    """

    store: Store
    work: Path
    config: PrepareConfig
    sources: Sequence[InputSource]
    against: Sequence[Corpus]
    append_mode: AppendMode | None
    base: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """The record in the work folder by which a later run recognises its own job."""
        append_mode = (
            {"append": self.append_mode.append, "retry": self.append_mode.retry, "grows": json_digest(self.base)}
            if self.append_mode
            else {}
        )
        return {**self.identity, **append_mode, "version": version("tim")}

    @property
    def digest(self) -> str:
        """Identifies the shards of this job."""
        return json_digest(self.record)[:32]


def open_job(
    sources: Sequence[str],
    *,
    out: str | Path,
    config: PrepareConfig,
    against: Sequence[str | Path],
    append_mode: AppendMode | None,
    work: str | Path | None,
) -> Job:
    """Open the sources and corpora of `prepare`, with its arguments. Raises ValueError if they or `out` cannot be used."""
    check_languages(config.captions)
    store, folder = open_store(out, work=work)
    opened = open_sources(sources, named=config.sources, columns=config.columns)
    for source in opened:
        for output in [folder.resolve(), *([] if store.is_remote else [Path(store.location).resolve()])]:
            if source.root in (output, *output.parents):
                raise ValueError(f"{output}: is inside the source {source.root}; give a folder elsewhere")
    others = open_references(against)
    base = read_manifest(store.location) if append_mode else None
    classes = number_classes(opened, known=None if base is None else base.get("classes", {}))
    identity: dict[str, Any] = {
        "config": config.model_dump(mode="json", exclude={"sources"}),
        "sources": [
            {"name": source.name, "layout": source.layout, "digest": source.digest(), "tags": list(source.tags), "reads": source.reads()}
            for source in opened
        ],
        "against": [{"name": corpus.name, "digest": corpus.digest} for corpus in others],
        **({"classes": classes} if classes else {}),
    }
    job = Job(
        store=store, work=folder, config=config, sources=opened, against=others, append_mode=append_mode, base=base or {}, identity=identity
    )
    if append_mode:
        _check_base(job)
    return job


def _check_base(job: Job) -> None:
    """Raises ValueError unless the corpus to append to was prepared with the same settings."""
    location = job.store.location
    if "columns" not in job.base:
        raise ValueError(f"{location}: not made by `tim prepare` of this version; only such a corpus can be appended to")
    changed = ", ".join(all_differences(job.base["config"], job.identity["config"]))
    if changed:
        remedy = "inputs are added with the corpus's own settings: leave yours out, or prepare a new corpus"
        raise ValueError(f"{location}: was prepared with another {changed}; {remedy}")
    begun = begun_in(job.work)
    if begun and begun.get("grows") == json_digest(job.base):
        changed = differences(begun, job.record)
        if changed:
            raise ValueError(f"{location}: an unfinished append has another {changed}; finish that one first, or delete {job.work}")


def with_own_settings(out: str | Path, *, given: PrepareConfig) -> PrepareConfig:
    """The config of the finished corpus at `out`, overridden by the values set explicitly in `given`.

    Raises ValueError if `out` is not a corpus, or its config has settings unknown to this version.
    """
    own = read_manifest(out).get("config", {})
    try:
        merged = _override(own, given.model_dump(mode="json", exclude_unset=True))
        return PrepareConfig.model_validate(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{out}: its {MANIFEST} has a config of another version ({key}: {problem['msg']}): use that version") from error


def _override(values: Any, overrides: Any) -> Any:
    if not isinstance(values, Mapping) or not isinstance(overrides, Mapping):
        return overrides
    return {**values, **{name: _override(values.get(name), value) for name, value in overrides.items()}}


def finished_input_counts(job: Job) -> InputCounts | None:
    """Input counts if the output is this corpus, finished; None if it is empty or an unfinished run. Raises ValueError otherwise."""
    location, begun = job.store.location, begun_in(job.work)
    found = job.store.sizes()
    if MANIFEST in found:
        manifest = read_manifest(job.store.location)
        changed = differences(manifest, job.identity)
        if changed:
            remedy = "append to it, give another folder, or delete this one"
            raise ValueError(f"{location}: holds a finished corpus with another {changed}; {remedy}")
        if begun and "grows" not in begun:
            shutil.rmtree(job.work)
        return read_input_counts(manifest)
    if begun:
        changed = differences(begun, job.record)
        if changed:
            raise ValueError(f"{location}: holds an unfinished corpus with another {changed}; give another folder, or delete this one")
        return None
    if found and not any(_is_of_job(job, name=name) for name in found):
        raise ValueError(f"{location}: not empty ({min(found)} is in it) and not a corpus; give a new or empty folder")
    return None


def _is_of_job(job: Job, *, name: str) -> bool:
    """Whether a file is a stats file of this job, whose work folder may be lost or on another machine."""
    number = shard_number(name)
    return number is not None and name == stats_name(number) and json.loads(job.store.read(name)).get("job") == job.digest


def begun_in(work: Path) -> dict[str, Any]:
    """The record of the unfinished job in a work folder, {} if there is none."""
    job = work / JOB
    return json.loads(job.read_text("utf-8")) if job.is_file() else {}


@contextmanager
def locked_job(job: Job, *, part: JobPart | None = None) -> Iterator[None]:
    """Lock the work folder, and write the job's record into it.

    Raises ValueError if a new job needs columns that no source has, RuntimeError if another run is writing here or the disk is full.
    """
    if not begun_in(job.work):
        _check_columns(job)
    folder = None if job.store.is_remote else Path(job.store.location)
    name = f"part-{part.number}-of-{part.of}" if part else ""
    try:
        with locked_work_folder(job.work, place=job.store.location, folder=folder, part=name):
            begun = begun_in(job.work)
            if not begun or (job.append_mode and begun.get("grows") != job.record["grows"]):
                _begin(job, discard=bool(begun))
            yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = error.filename or job.store.location
        raise RuntimeError(f"{where}: the disk is full; finished work is kept: free some space, and run the same command again") from error


def _check_columns(job: Job) -> None:
    """Raises ValueError for a column that no source has: a mistyped name would reject every input."""
    captions = job.config.captions
    wanted = {f"filters.where.{name}": columns for name, columns in Filters(job.config.filters).wanted.items()}
    if captions.languages and captions.language_column:
        wanted["captions.language_column"] = {captions.language_column}
    computed = {LANGUAGE} if captions.detects else set()
    names = sorted(column_names(job.sources, wanted=set().union(*wanted.values()) - computed) | computed)
    for key, columns in wanted.items():
        unknown = unknown_column(sorted(columns), names=names)
        if unknown:
            raise ValueError(f"{key}: the first {FIRST_INPUTS:,} inputs of the sources have no column {unknown}")


def _begin(job: Job, *, discard: bool) -> None:
    """Write the job's record. `discard`: first delete the work of a finished job, or of one for an older state of the corpus."""
    if discard:
        for path in job.work.iterdir():
            if not path.name.startswith(LOCK):
                path.unlink()
    if job.append_mode:  # shards of an abandoned append
        first = len(job.base["shards"])
        for name in job.store.sizes():
            number = number_of_file(name)
            if number is not None and number >= first:
                job.store.remove(name)
    publish_text(job.work / JOB, json.dumps(job.record, indent=1))
