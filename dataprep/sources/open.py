"""Open sources of any supported layout as iterators of `RawSample`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dataprep.sources.class_labels import class_numbers
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.files.paths import base_name, expand, join, list_files, names_many
from dataprep.sources.hf_datasets import HubDataset, is_on_hub, is_saved
from dataprep.sources.image_folder import ImageFolder, holds_images
from dataprep.sources.image_list import ImageList
from dataprep.sources.mds_litdata import PackedSamples, is_packed
from dataprep.sources.raw_sample import RawSample
from dataprep.sources.tabular.tables import kind_of, kind_of_list
from dataprep.sources.tim_corpus import TAGS, CorpusSource, corpora_below, corpus_of_tars, is_corpus
from dataprep.sources.unread_files import unread_notes
from dataprep.sources.webdataset import TAR_SUFFIXES, Shards
from pipeline.errors import one_line
from pipeline.storage.remote import is_remote

_NAME = r"[A-Za-z_][\w-]*"
_NAMED = re.compile(rf"({_NAME})=(.+)", re.ASCII | re.DOTALL)
SourceName = Annotated[str, Field(pattern=rf"^{_NAME}$")]
FIRST_INPUTS = 1000
_KINDS = "an image folder, a corpus, .tar shards, a list (.csv, .tsv, .jsonl, .json, .parquet, .arrow) or hf:NAME"


class SourceConfig(BaseModel):
    """Settings of one source.

    `path`: path, URL or pattern; may be left out if it is given as NAME=PATH. `tags`: stored in the column `source_tags`. `columns`: as
    the section `columns`, for this source only. `split`, `subset`: the part of a dataset of the `datasets` library to read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(default=None, min_length=1)
    tags: tuple[str, ...] = ()
    columns: ColumnConfig = ColumnConfig()
    split: str | None = Field(default=None, min_length=1)
    subset: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, value: Any) -> Any:
        """A string is the path. Tags may be one string, separated by commas."""
        if isinstance(value, str):
            return {"path": value}
        if isinstance(value, dict) and isinstance(value.get("tags"), str):
            value = {**value, "tags": [tag.strip() for tag in value["tags"].split(",") if tag.strip()]}
        return _with_tuples(value)


def _with_tuples(value: Any) -> Any:
    """Lists as tuples: a strict schema accepts a list for a tuple in JSON only, and a validator's result is not JSON."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


class InputSource(Protocol):
    """A source of samples. `samples()` can be called again, and gives the same samples in the same order."""

    name: str
    tags: tuple[str, ...]

    @property
    def layout(self) -> str: ...

    @property
    def root(self) -> Path | None:
        """The resolved folder of the source, into which a corpus must not be written."""
        ...

    def reads(self) -> str:
        """One sentence on what is read, and from which columns."""
        ...

    def expected(self) -> int | None:
        """Number of inputs, None if it is unknown before they are read."""
        ...

    def digest(self) -> str: ...

    def samples(self) -> Iterator[RawSample]: ...

    def notes(self) -> list[str]: ...


def open_sources(
    specs: Sequence[str], *, named: Mapping[str, SourceConfig] | None = None, columns: ColumnConfig | None = None
) -> list[InputSource]:
    """Open sources. Raises ValueError for one that cannot be read.

    Args:
        specs: paths, URLs and patterns ("x/{000..009}.tar"), each with or without a name as in NAME=PATH.
        named: further sources, or settings of those in `specs`, by name.
        columns: the default for all sources.

    A source without a name gets that of its folder, or of a single file; a repeated name gets a number.
    """
    configs = named or {}
    wanted: list[tuple[str, str]] = []
    for spec in specs:
        match = None if os.path.exists(spec) else _NAMED.fullmatch(spec)
        wanted.append((match[1], match[2]) if match else ("", spec))
    given = {name for name, _ in wanted}
    for name, config in configs.items():
        if name in given:
            continue
        if config.path is None:
            raise ValueError(f"sources.{name}: has no path; write {name}=PATH among the sources, or sources.{name}.path=PATH")
        wanted.append((name, config.path))
    if not wanted:
        raise ValueError("no source: name at least one image folder, list of images or WebDataset shard")
    taken = {name for name in given | configs.keys() if name}
    opened: list[InputSource] = []
    for name, spec in wanted:
        if name and any(source.name == name for source in opened):
            raise ValueError(f"{name}={spec}: another source has this name")
        config = configs.get(name, SourceConfig())
        own = (columns or ColumnConfig()).model_copy(update=config.columns.model_dump(exclude_none=True))
        try:
            source = _open(spec, name=name or _free_name(spec, taken=taken), config=config.model_copy(update={"columns": own}))
        except ValueError as error:
            raise ValueError(f"{name}={spec}: neither a setting nor a source: {error}" if name in given - {""} else str(error)) from error
        if own.masks is not None and not isinstance(source, ImageFolder):
            raise ValueError(f"{spec}: columns.masks={own.masks} is for image folders: put KEY.mask.png beside the images of shards")
        source.tags = config.tags
        opened.append(source)
    return opened


def all_samples(sources: Sequence[InputSource]) -> Iterator[RawSample]:
    """The samples of all sources, with tags as an extra column."""
    is_tagged = any(source.tags for source in sources)
    for source in sources:
        tags = ", ".join(source.tags)
        for sample in source.samples():
            if is_tagged:
                both = ", ".join(filter(None, (str(sample.extra.get(TAGS) or ""), tags)))  # a corpus brings tags of its own
                sample = replace(sample, extra={**sample.extra, TAGS: both})
            yield sample


def number_classes(sources: Sequence[InputSource], *, known: Mapping[str, int] | None) -> dict[str, int]:
    """Number the text labels of all sources in sorted order: name → class.

    `known`: the classes of the corpus to append to, which are kept; None for a new corpus.
    """
    named = [source for source in sources if isinstance(source, (ImageList, ImageFolder))]
    classes = class_numbers(set().union(*(source.class_names() for source in named))) if known is None else dict(known)
    for source in named:
        source.classes = classes
    return classes


def column_names(sources: Sequence[InputSource], *, wanted: Collection[str]) -> set[str]:
    """Names of the extra columns in the first thousand inputs of each source. Reading stops once all `wanted` ones are found, usually after
    one input."""
    found: set[str] = set()
    samples = chain.from_iterable(islice(all_samples([source]), FIRST_INPUTS) for source in sources)
    while not found.issuperset(wanted) and (sample := next(samples, None)):
        found |= sample.extra.keys() | sample.filter_only.keys()
    return found


def _free_name(spec: str, *, taken: set[str]) -> str:
    path = spec.rstrip("/") if is_remote(spec) or is_on_hub(spec) else str(Path(spec).expanduser().absolute())
    folder, _, base = path.rpartition("/")
    is_file = kind_of(base) is not None or base.lower().endswith((*TAR_SUFFIXES, ".txt"))
    base = base.partition("@")[0].removeprefix("hf:") if is_on_hub(spec) else base
    name = root = base_name(folder) if names_many(spec) else base.partition(".")[0] or base if is_file else base or "data"
    number = 2
    while name in taken:
        name, number = f"{root}-{number}", number + 1
    taken.add(name)
    return name


def _open(spec: str, *, name: str, config: SourceConfig) -> InputSource:
    if is_on_hub(spec):
        return HubDataset(spec, name=name, columns=config.columns, split=config.split, subset=config.subset)
    files = expand(spec)
    if len(files) == 1 and (os.path.isdir(files[0]) if not is_remote(spec) else not _is_file(files[0])):
        return _open_folder(files[0], name=name, config=config)
    if all(file.lower().endswith(TAR_SUFFIXES) for file in files):
        corpus = corpus_of_tars(files)
        if corpus:  # read its tables and sidecars, not the tars only
            return CorpusSource(corpus, name=name, columns=config.columns, only={base_name(file) for file in files})
        return Shards(files, name=name, columns=config.columns)
    unusable = next((file for file in files if os.path.isdir(file) or not kind_of_list(file)), None)
    if unusable:
        raise ValueError(f"{unusable}: not a source that can be read; give {_KINDS}")
    return ImageList(files, name=name, columns=config.columns)


def _open_folder(folder: str, *, name: str, config: SourceConfig) -> InputSource:
    """Open a folder by its content: a corpus, a saved or packed dataset, images and metadata, shards or lists, in this order."""
    if is_corpus(folder):
        return CorpusSource(folder, name=name, columns=config.columns)
    try:
        files = list_files(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {one_line(error)}") from error
    root, columns = None if is_remote(folder) else Path(folder).resolve(), config.columns
    if is_saved(files):
        return HubDataset(folder, name=name, columns=columns, split=config.split)
    if is_packed(folder, files):
        return PackedSamples(folder, name=name, columns=columns)
    if holds_images(files):
        return ImageFolder(folder, files=files, name=name, columns=columns)
    tars = [join(folder, file) for file in files if file.lower().endswith(TAR_SUFFIXES)]
    if tars and (corpora := corpora_below(folder, files)):
        raise ValueError(f"{folder}: holds corpora ({', '.join(corpora)}): name each of them as a separate source")
    if tars:
        expected = ("_stats.json", ".parquet", *TAR_SUFFIXES)  # written by img2dataset
        notes = [*unread_notes(folder, (file for file in files if not file.lower().endswith(expected))), *files.notes]
        return Shards(sorted(tars), name=name, columns=columns, root=root, notes=notes)
    kinds = {file: kind for file in files if (kind := kind_of(file))}
    of_rows = [file for file, kind in kinds.items() if kind != "json"]  # JSON files beside tables are often something else
    used = of_rows or list(kinds)
    tables = [join(folder, file) for file in used]
    notes = [*unread_notes(folder, (file for file in files if file not in {*used})), *files.notes]
    if not tables:
        raise ValueError("; ".join([f"{folder}: no images, no shards and no lists in this folder", *notes]))
    return ImageList(sorted(tables), name=name, columns=columns, root=root, notes=notes)


def _is_file(url: str) -> bool:
    return url.lower().endswith(TAR_SUFFIXES) or kind_of(url) is not None
