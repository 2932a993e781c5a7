"""A finished corpus as a source, with the values of its sidecars, including takedown marks.

Inputs are the kept samples of the corpus, named by their keys; rejected inputs are not read again. Extra columns of tables and sidecars are
kept. The original source and path of a sample are in `source_source` and `source_path`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataprep.row_schema import SEMANTIC_DUPLICATE, TABLE_COLUMNS, TAKEN_DOWN
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.files.paths import join
from dataprep.sources.raw_sample import RawMask, RawSample
from dataprep.sources.tabular.tables import plain
from pipeline.corpus.corpus import MASK_COLUMNS, Corpus
from pipeline.corpus.record_fields import ColumnMapping, read_fields
from pipeline.corpus.sidecars import SIDECARS, TAKEDOWN, TEXT_COLUMNS, provider
from pipeline.digests import json_digest
from pipeline.errors import one_line
from pipeline.images.masks import MASK_EXTENSION
from pipeline.storage.remote import is_remote, read_file

MANIFEST = "manifest.json"
TAGS = "source_tags"
_ORIGIN = {"source": "source_source", "path": "source_path"}
_FILTER_ONLY = ("source", "path", "near_duplicate_of", SEMANTIC_DUPLICATE)  # keys of the old corpus, or computed again in the new one
_READ = ("key", "sha256", "captions", "label", "image_offset", "image_length", "original_height", "original_width")


class CorpusSource:
    """A corpus written by `tim prepare` or `tim index`, in a folder or at a URL.

    `columns`: columns of the corpus that replace its captions and classes. `only`: names of the tars to read, all if empty. Raises
    ValueError if the corpus or one of its sidecars cannot be used.
    """

    layout = "corpus"
    tags: tuple[str, ...] = ()

    def __init__(self, folder: str, *, name: str, columns: ColumnConfig, only: Collection[str] = ()) -> None:
        self.name = name
        self.root = None if is_remote(folder) else Path(folder).resolve()
        self._corpus = Corpus.open(folder, check_shards=False)
        self._shards = [number for number, shard in enumerate(self._corpus.shards) if not only or _base(shard.path) in only]
        self._marked = 0
        _check_sidecars(self._corpus)
        schema = self._corpus.schema
        self._vectors = sorted(each.name for each in schema if each.name not in TABLE_COLUMNS and _is_vector(each.type))
        self._caption_columns = tuple(name for name in columns.captions or () if name in schema.names)
        self._label = columns.label if columns.label in schema.names else None
        if columns.captions and not self._caption_columns:
            raise ValueError(f"{folder}: has no column {columns.captions[0]} of captions; there are {', '.join(schema.names)}")
        skipped = {*TABLE_COLUMNS, *TEXT_COLUMNS, *self._vectors, *_FILTER_ONLY}
        self._takedown = provider(self._corpus.sidecars, TAKEDOWN)
        if self._takedown is not None:
            skipped.add(TAKEDOWN)
        self._extra = [name for name in schema.names if name not in skipped]
        self._filter_only = [name for name in _FILTER_ONLY if name in schema.names]

    def reads(self) -> str:
        """One sentence on what is read."""
        sidecars = ", ".join(sidecar.name for sidecar in self._corpus.sidecars)
        return f"{self.name}: corpus {self._corpus.name}, {self.expected():,} samples" + (f", sidecars {sidecars}" if sidecars else "")

    def expected(self) -> int:
        """Number of inputs."""
        return sum(self._corpus.shards[number].count for number in self._shards)

    def digest(self) -> str:
        """Digest of the corpus and its sidecars."""
        sidecars = [[sidecar.name, list(sidecar.columns), sidecar.digest] for sidecar in self._corpus.sidecars]
        return json_digest([self._corpus.digest, self._shards, sidecars])

    def samples(self) -> Iterator[RawSample]:
        """All kept samples, in tar order. Raises ValueError if a table is damaged or a sidecar does not belong to the corpus."""
        self._marked = 0
        schema = self._corpus.schema
        takedown = [TAKEDOWN] if self._takedown is not None else []
        chosen = [*self._caption_columns, *([self._label] if self._label else [])]
        wanted = dict.fromkeys([*_READ, *chosen, *self._extra, *self._filter_only, *takedown])
        columns = [name for name in wanted if name in schema.names] + list(MASK_COLUMNS)
        for number in self._shards:
            _check_sidecar_files(self._corpus, number)
            for row in self._corpus.read(number, columns=columns).to_pylist():
                yield self._sample(row, tar=self._corpus.shards[number].path)

    def notes(self) -> list[str]:
        """One sentence for each kind of data that is not taken over."""
        notes = []
        if self._marked:
            notes.append(f"{self.name}: {self._marked} sample(s) are marked {TAKEDOWN}: nothing but their keys is in the new corpus")
        if self._vectors:
            notes.append(f"{self.name}: columns of vectors were left out ({', '.join(self._vectors)}): `tim score` makes them again")
        return notes

    def _sample(self, row: dict[str, Any], *, tar: str) -> RawSample:
        if row.get(TAKEDOWN) and self._takedown is not None:
            self._marked += 1
            detail = f"marked in the corpus's sidecar '{self._takedown.name}'"
            return RawSample(source=self.name, path=row["key"], reason=TAKEN_DOWN, detail=detail, sha256=row.get("sha256") or "")
        tags = row.get(TAGS)
        record = {name: plain(row[name]) for name in row if name in {*self._extra, *self._caption_columns, self._label} and name != TAGS}
        labels = () if self._label is None else (self._label,)
        fields = read_fields(record, columns=ColumnMapping(captions=self._caption_columns, labels=labels, image=""))
        extra = fields.extra
        for name, stored_as in _ORIGIN.items():
            if row.get(name) is not None:
                extra.setdefault(stored_as, row[name])
        height, width = row.get("original_height"), row.get("original_width")
        return RawSample(
            source=self.name,
            path=row["key"],
            file=tar,
            offset=row["image_offset"],
            length=row["image_length"],
            captions=fields.captions if self._caption_columns else tuple(text for text in row["captions"] or () if text),
            label=fields.label if labels else row["label"],
            extra=extra | ({TAGS: tags} if tags else {}),
            filter_only={name: row[name] or "" for name in self._filter_only},
            original_size=None if height is None or width is None else (height, width),
            mask=_mask(row, tar=tar),
        )


def _mask(row: Mapping[str, Any], *, tar: str) -> RawMask | None:
    """The mask of a sample. One without a name is the white mask that `tim prepare` gave a sample without its own."""
    if row["mask_offset"] is None or row["mask_path"] == "":
        return None
    return RawMask(f"{row['key']}.{MASK_EXTENSION}", file=tar, offset=row["mask_offset"], length=row["mask_length"])


def is_corpus(folder: str) -> bool:
    """Whether the folder or URL holds a corpus.

    Raises ValueError if it has sidecars without a manifest, because their takedown marks must not be lost.
    """
    return _manifest(folder) is not None


def corpora_below(folder: str, files: Iterable[str]) -> list[str]:
    """The corpora below a folder with these files."""
    inner = (file.removesuffix(f"/{MANIFEST}") for file in files if file.endswith(f"/{MANIFEST}"))
    return [path for path in (join(folder, name) for name in inner) if is_corpus(path)]


def corpus_of_tars(tars: Sequence[str]) -> str:
    """The folder of the corpus whose shards all these tars are; "" if none is a shard of a corpus in its folder.

    Raises ValueError if only some are, or if they belong to several corpora.
    """
    folders = {tar: tar.rpartition("/")[0] or ("/" if tar.startswith("/") else ".") for tar in tars}
    shards = {folder: _shard_names(folder) for folder in dict.fromkeys(folders.values())}
    owners = {folder if _base(tar) in shards[folder] else "" for tar, folder in folders.items()}
    if len(owners) > 1:
        corpora = ", ".join(sorted(owners - {""}))
        raise ValueError(f"{corpora}: name each corpus, and other tars, as separate sources")
    return owners.pop()


def _check_sidecars(corpus: Corpus) -> None:
    """Raises ValueError if a sidecar lacks a shard or was made for another corpus."""
    for shard in corpus.shards:
        for sidecar in corpus.sidecars:
            sidecar.of(shard.table, digest=shard.table_digest, folder=corpus.folder)


def _check_sidecar_files(corpus: Corpus, number: int) -> None:
    """Raises ValueError if a sidecar's table of a shard is missing or damaged."""
    shard = corpus.shards[number]
    for sidecar in corpus.sidecars:
        entry = sidecar.of(shard.table, digest=shard.table_digest, folder=corpus.folder)
        found = _read(join(corpus.folder, entry.table))
        if found is None or hashlib.sha256(found).hexdigest() != entry.sha256:
            what = "is missing" if found is None else "was changed or damaged"
            remedy = "run the command that made it again, or remove it with `tim annotate`"
            raise ValueError(f"corpus {corpus.folder}: {entry.table} of its sidecar '{sidecar.name}' {what}: {remedy}")


def _shard_names(folder: str) -> set[str]:
    """Names of the shards in a corpus's folder; empty if it is not a corpus."""
    names = [shard["name"] for shard in (_manifest(folder) or {}).get("shards", ())]
    return {name for name in names if "/" not in name}


def _manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of a corpus, of any format; None if there is none, or a manifest of something else. Raises as `is_corpus`."""
    try:
        found = json.loads(_read(join(folder, MANIFEST)) or b"null")
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("shards"), list) and "totals" in found:
        return found
    if _read(join(folder, SIDECARS)) is not None:
        raise ValueError(f"{folder}: has {SIDECARS} but no valid {MANIFEST}: repair it first, with `tim verify`")
    return None


def _read(file: str) -> bytes | None:
    """A small file at a path or URL, None if it does not exist. Raises ValueError if it cannot be read."""
    try:
        return read_file(file) if is_remote(file) else Path(file).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {one_line(error)}") from error


def _is_vector(kind: pa.DataType) -> bool:
    """Lists of numbers, such as embeddings."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and not pa.types.is_string(kind.value_type)


def _base(path: str) -> str:
    return path.rpartition("/")[2]
