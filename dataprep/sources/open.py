"""Every layout that users bring → one iterator of `RawSample`."""

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
    """What there is to say of one source.

    `path`: what a command line would name; may be left out where the command line says NAME=PATH. `tags` end up in the column
    `source_tags`. `columns`: as the section of that name, for this source alone. `split`, `subset`: which part of a data set of the
    `datasets` library is meant, if it has several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(default=None, min_length=1)
    tags: tuple[str, ...] = ()
    columns: ColumnConfig = ColumnConfig()
    split: str | None = Field(default=None, min_length=1)
    subset: str | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, said: Any) -> Any:
        """A text is the path; tags may be one text with commas."""
        if isinstance(said, str):
            return {"path": said}
        if isinstance(said, dict) and isinstance(said.get("tags"), str):
            said = {**said, "tags": [tag.strip() for tag in said["tags"].split(",") if tag.strip()]}
        return _with_tuples(said)


def _with_tuples(value: Any) -> Any:
    """Lists as tuples: what a validator has touched no longer counts as JSON, where a strict schema takes the one for the other."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


class InputSource(Protocol):
    """One place that samples come from. `samples()` may be read again and gives the same samples in the same order."""

    name: str
    tags: tuple[str, ...]

    @property
    def layout(self) -> str: ...

    @property
    def root(self) -> Path | None:
        """The folder, resolved, that a corpus must not be written into."""
        ...

    def reads(self) -> str:
        """What is read, and from which columns, in a sentence."""
        ...

    def expected(self) -> int | None:
        """How many inputs there are, where that is known without reading them."""
        ...

    def digest(self) -> str: ...

    def samples(self) -> Iterator[RawSample]: ...

    def notes(self) -> list[str]: ...


def open_sources(
    specs: Sequence[str], *, named: Mapping[str, SourceConfig] | None = None, columns: ColumnConfig | None = None
) -> list[InputSource]:
    """Open what the user names. Raises ValueError, one line each.

    Args:
        specs: paths, URLs and patterns ("x/{000..009}.tar"), each as it is or as NAME=PATH.
        named: further sources, or what there is to say of those of `specs`, by name.
        columns: what holds for all sources that say nothing else.

    A source without a name is called by its folder (a single file by its own name); a name that comes up again gets a number.
    """
    told = named or {}
    wanted: list[tuple[str, str]] = []
    for spec in specs:
        match = None if os.path.exists(spec) else _NAMED.fullmatch(spec)
        wanted.append((match[1], match[2]) if match else ("", spec))
    given = {name for name, _ in wanted}
    for name, said in told.items():
        if name in given:
            continue
        if said.path is None:
            raise ValueError(f"sources.{name}: has no path; write {name}=PATH among the sources, or sources.{name}.path=PATH")
        wanted.append((name, said.path))
    if not wanted:
        raise ValueError("no source: name at least one image folder, list of images or WebDataset shard")
    taken = {name for name in given | told.keys() if name}
    opened: list[InputSource] = []
    for name, spec in wanted:
        if name and any(source.name == name for source in opened):
            raise ValueError(f"{name}={spec}: this name has been given to another source")
        said = told.get(name, SourceConfig())
        own = (columns or ColumnConfig()).model_copy(update=said.columns.model_dump(exclude_none=True))
        try:
            source = _open(spec, name=name or _free_name(spec, taken=taken), said=said.model_copy(update={"columns": own}))
        except ValueError as error:
            raise ValueError(f"{name}={spec}: neither a setting nor a source: {error}" if name in given - {""} else str(error)) from error
        source.tags = said.tags
        opened.append(source)
    return opened


def all_samples(sources: Sequence[InputSource]) -> Iterator[RawSample]:
    """The samples of all sources, their tags among the further columns."""
    is_tagged = any(source.tags for source in sources)
    for source in sources:
        tags = ", ".join(source.tags)
        for sample in source.samples():
            if is_tagged:
                both = ", ".join(filter(None, (str(sample.extra.get(TAGS) or ""), tags)))  # a corpus brings tags of its own
                sample = replace(sample, extra={**sample.extra, TAGS: both})
            yield sample


def number_classes(sources: Sequence[InputSource], *, known: Mapping[str, int] | None) -> dict[str, int]:
    """Number the classes that sources name by texts, all of them together, in sorted order: name → class.

    `known`: the classes of the corpus that is to grow, which stay as they are; None for a new corpus.
    """
    named = [source for source in sources if isinstance(source, (ImageList, ImageFolder))]
    classes = class_numbers(set().union(*(source.class_names() for source in named))) if known is None else dict(known)
    for source in named:
        source.classes = classes
    return classes


def column_names(sources: Sequence[InputSource], *, wanted: Collection[str]) -> set[str]:
    """Names of the further columns that the first thousand inputs of each source have. No more is read than it takes to find those that are
    wanted: mostly one input."""
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


def _open(spec: str, *, name: str, said: SourceConfig) -> InputSource:
    if is_on_hub(spec):
        return HubDataset(spec, name=name, columns=said.columns, split=said.split, subset=said.subset)
    files = expand(spec)
    if len(files) == 1 and (os.path.isdir(files[0]) if not is_remote(spec) else not _is_file(files[0])):
        return _open_folder(files[0], name=name, said=said)
    if all(file.lower().endswith(TAR_SUFFIXES) for file in files):
        corpus = corpus_of_tars(files)
        if corpus:  # not tars alone: what its sidecars say counts
            return CorpusSource(corpus, name=name, columns=said.columns, only={base_name(file) for file in files})
        return Shards(files, name=name, columns=said.columns)
    strange = next((file for file in files if os.path.isdir(file) or not kind_of_list(file)), None)
    if strange:
        raise ValueError(f"{strange}: not a source that can be read; give {_KINDS}")
    return ImageList(files, name=name, columns=said.columns)


def _open_folder(folder: str, *, name: str, said: SourceConfig) -> InputSource:
    """A folder is what lies in it: a corpus, a saved or packed data set, or else images and metadata, or else shards, or else lists."""
    if is_corpus(folder):
        return CorpusSource(folder, name=name, columns=said.columns)
    try:
        files = list_files(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {one_line(error)}") from error
    root, columns = None if is_remote(folder) else Path(folder).resolve(), said.columns
    if is_saved(files):
        return HubDataset(folder, name=name, columns=columns, split=said.split)
    if is_packed(folder, files):
        return PackedSamples(folder, name=name, columns=columns)
    if holds_images(files):
        return ImageFolder(folder, files=files, name=name, columns=columns)
    tars = [join(folder, file) for file in files if file.lower().endswith(TAR_SUFFIXES)]
    if tars and (corpora := corpora_below(folder, files)):
        raise ValueError(f"{folder}: holds corpora ({', '.join(corpora)}): name each of them as a source of its own")
    if tars:
        told = ("_stats.json", ".parquet", *TAR_SUFFIXES)  # what img2dataset writes beside a tar
        notes = [*unread_notes(folder, (file for file in files if not file.lower().endswith(told))), *files.notes]
        return Shards(sorted(tars), name=name, columns=columns, root=root, notes=notes)
    kinds = {file: kind for file in files if (kind := kind_of(file))}
    of_rows = [file for file, kind in kinds.items() if kind != "json"]  # what else lies beside tables is often JSON
    used = of_rows or list(kinds)
    tables = [join(folder, file) for file in used]
    notes = [*unread_notes(folder, (file for file in files if file not in {*used})), *files.notes]
    if not tables:
        raise ValueError("; ".join([f"{folder}: no images, no shards and no lists in this folder", *notes]))
    return ImageList(sorted(tables), name=name, columns=columns, root=root, notes=notes)


def _is_file(url: str) -> bool:
    return url.lower().endswith(TAR_SUFFIXES) or kind_of(url) is not None
