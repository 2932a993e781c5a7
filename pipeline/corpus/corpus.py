"""A corpus as training sees it: its manifest, and the tables of its kept samples, read one shard at a time.

Columns and files are those that `tim prepare` and `tim index` write (docs/formats.md). Every shard has its own table, so memory stays
bounded by the shards that a plan has open, however many there are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.sidecars import Sidecar, provider, read_sidecars
from pipeline.cost import Ints
from pipeline.digests import json_digest
from pipeline.errors import one_line
from pipeline.features.manifest import Features
from pipeline.size_rule import SizeRule
from pipeline.storage.remote import is_remote, read_file

FORMAT = 1


@dataclass(frozen=True, slots=True)
class CorpusShard:
    """One tar of a corpus: path or URL, number of samples, bytes, its sha256 ("" if unknown), the name of its table and its sha256.

    Where a sidecar has new captions, `texts` is the path or URL of the file that has them, with its size and sha256, and `digest`, by which
    features know what they were made of, is another one.
    """

    path: str
    count: int
    bytes: int
    sha256: str
    table: str
    digest: str
    table_digest: str
    texts: str = ""
    texts_bytes: int = 0
    texts_sha256: str = ""


class Corpus:
    """A corpus of shards and their tables. Make one with `Corpus.open`.

    `features` are read in place of its images and captions, if there are any. Columns and captions of its `sidecars` are as good as its
    own, and take their place where they have the same name.
    """

    def __init__(
        self,
        *,
        folder: str,
        name: str,
        digest: str,
        shards: tuple[CorpusShard, ...],
        qualified: bool,
        features: Features | None,
        sidecars: tuple[Sidecar, ...] = (),
        partial: bool = False,
    ) -> None:
        self.folder = folder
        self.name = name
        self.digest = digest
        self.shards = shards
        self.count = sum(shard.count for shard in shards)
        self.features = features
        self.sidecars = sidecars
        self._qualified = qualified
        self._partial = partial

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        features: str | Path | None = None,
        check_shards: bool = True,
        without: str | None = None,
        partial: bool = False,
    ) -> Corpus:
        """Open the corpus at `path`, a folder or a URL (s3://…), under the `name` of its manifest unless another is given, with the
        `features` of a folder joined to it.

        With `check_shards`, local shards must be there in their full size; remote ones are looked at when they are first read. `without`
        names a sidecar to leave out. With `partial`, sidecars may lack shards, of which they then say nothing.

        Raises ValueError, in one line, if it is no corpus, is of an unknown format, or lacks or mismatches one of its files.
        """
        folder = str(path).rstrip("/") if is_remote(path) else os.fspath(path)
        manifest = read_manifest(folder)
        sidecars = tuple(sidecar for sidecar in read_sidecars(folder) if sidecar.name != without)
        return cls.of_manifest(
            manifest,
            folder=folder,
            name=name,
            features=features,
            check_shards=check_shards,
            sidecars=sidecars,
            partial=partial,
        )

    @classmethod
    def of_manifest(
        cls,
        manifest: dict[str, Any],
        *,
        folder: str,
        name: str | None = None,
        features: str | Path | None = None,
        check_shards: bool = True,
        sidecars: tuple[Sidecar, ...] = (),
        partial: bool = False,
    ) -> Corpus:
        """The same of a manifest that may not have been written yet."""
        try:
            shards = tuple(_shard(folder, entry, check=check_shards) for entry in manifest["shards"])
            contents = {key: [shard[key] for shard in manifest["shards"]] for key in ("table", "count", "bytes", "sha256", "table_sha256")}
            corpus_name = manifest["name"] if name is None else name
            qualified = manifest.get("qualified_keys", False)
        except (KeyError, TypeError) as error:
            raise ValueError(f"corpus {folder}: manifest.json is damaged ({error}): run `tim prepare` again") from error
        texts = provider(sidecars, "captions")
        if texts is not None:
            shards = tuple(
                shard if partial and shard.table not in texts.shards else _with_texts(shard, texts, folder=folder) for shard in shards
            )
            contents["texts"] = [shard.digest for shard in shards]
        digest = json_digest(contents)
        joined = None if features is None else Features.open(features)
        return cls(
            folder=folder,
            name=corpus_name,
            digest=digest,
            shards=shards,
            qualified=qualified,
            features=joined,
            sidecars=sidecars,
            partial=partial,
        )

    @property
    def path(self) -> Path:
        """The folder of a local corpus."""
        return Path(self.folder)

    def read(self, shard: int, *, columns: Sequence[str]) -> pa.Table:
        """The kept rows of one shard, in the order of the tar. Raises ValueError if its table is missing, damaged or lacks a column.

        Where keys of different shards may be equal, the shard's number stands before them: `000012/KEY`.
        """
        path = os.path.join(self.folder, self.shards[shard].table)
        sidecars = [each for each in self.sidecars if not self._partial or self.shards[shard].table in each.shards]
        providers = {name: beside for name in columns if (beside := provider(sidecars, name)) is not None}
        own = [name for name in columns if name not in providers]
        table = self._completed(self._read_table(self.shards[shard].table, columns=own), columns=own, path=path)
        keys = table.column("key")
        if keys.null_count:  # rejected inputs
            table = table.filter(keys.is_valid())
        if table.num_rows != self.shards[shard].count:
            raise ValueError(
                f"{path} has {table.num_rows} samples, manifest.json says {self.shards[shard].count}: they are not of one corpus, "
                "make it again"
            )
        if self._qualified:
            keys = pc.call_function("binary_join_element_wise", [pa.scalar(f"{shard:06d}"), table.column("key"), pa.scalar("/")])
            table = table.set_column(table.column_names.index("key"), "key", keys)
        for sidecar in sidecars:
            names = [name for name, beside in providers.items() if beside is sidecar]
            if names:
                table = self._beside(shard, table, sidecar=sidecar, columns=names)
        return table.select(columns)

    def read_rejected(self, shard: int, *, columns: Sequence[str]) -> pa.Table:
        """The rejected rows of one shard, with those of the columns that its table has. Raises ValueError as `read` does."""
        table = self._read_table(self.shards[shard].table, columns=columns)
        return table.filter(table.column("key").is_null())

    def _read_table(self, name: str, *, columns: Sequence[str]) -> pa.Table:
        """All rows of a table, with those of the columns that it has, and its keys."""
        path = os.path.join(self.folder, name)
        try:
            source = io.BytesIO(read_file(path)) if is_remote(path) else path
            return pq.ParquetFile(source).read(columns=[*dict.fromkeys(("key", *columns))], use_threads=False)
        except FileNotFoundError as error:
            raise ValueError(f"corpus {self.folder} lacks {name}: restore the file, or make the corpus again") from error
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read ({one_line(error)}): run `tim verify` on the corpus") from error

    def _beside(self, shard: int, table: pa.Table, *, sidecar: Sidecar, columns: Sequence[str]) -> pa.Table:
        """The kept rows of a shard with columns of a sidecar's table."""
        beside = sidecar.of(self.shards[shard].table, digest=self.shards[shard].table_digest, folder=self.folder)
        found = self._read_table(beside.table, columns=columns)
        if not found.column("key").equals(table.column("key")):
            raise ValueError(f"corpus {self.folder}: {beside.table} has other samples than {self.shards[shard].table}: make it again")
        for name in columns:
            table = table.append_column(found.schema.field(name), found.column(name))
        return table

    def features_tar(self, shard: int) -> str:
        """Path of a shard's features, "" where the corpus has none."""
        return self.features.shards[shard].tar if self.features else ""

    def texts(self, shard: int) -> str:
        """Path or URL of the file that `text_offset` and `json_offset` of a shard are of: its tar, or a sidecar's captions."""
        return self.shards[shard].texts or self.shards[shard].path

    def check_features(self, *, rules: Sequence[SizeRule], flips: bool) -> None:
        """Refuse a plan that the features are not for (`Features.check`). Raises ValueError."""
        if self.features is not None:
            self.features.check(of=[shard.digest for shard in self.shards], corpus=self.name, rules=rules, flips=flips)

    def locate_features(self, shard: int, *, table: pa.Table, crops: Ints) -> Ints:
        """Where the features of samples of a shard lie, (n, 2): offset and length in the features' tar. Only with features.

        `table` has the n samples' columns key and captions, `crops` is (n, 4), `Targets.crops`. Raises ValueError (`Features.join`).
        """
        assert self.features is not None
        keys = self.bare_keys(shard, table.column("key").to_pylist())
        captions = pc.fill_null(pc.call_function("list_value_length", [table.column("captions")]), 0).to_numpy()
        return self.features.join(shard, keys=keys, crops=crops, captions=captions)

    def bare_keys(self, shard: int, keys: Sequence[str]) -> list[str]:
        """Keys as the shard's own tar has them: without the shard's number, which `read` puts before those that may repeat."""
        return [key.removeprefix(f"{shard:06d}/") for key in keys] if self._qualified else list(keys)

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the tables' columns, as the first shard with samples has them, and of its sidecars'.

        Raises ValueError if one of its tables is damaged.
        """
        first = next((shard for shard in self.shards if shard.count), self.shards[0])
        beside = [(each.of(first.table, digest=first.table_digest, folder=self.folder).table, each) for each in self.sidecars]
        fields: dict[str, pa.Field] = {}
        for name, sidecar in [(first.table, None), *beside]:
            path = os.path.join(self.folder, name)
            try:
                found = pq.read_schema(io.BytesIO(read_file(path)) if is_remote(path) else path)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{path} cannot be read ({one_line(error)}): run `tim verify` on the corpus") from error
            fields |= {field.name: field for field in found if sidecar is None or field.name in sidecar.columns}
        return pa.schema(list(fields.values()))

    def _completed(self, table: pa.Table, *, columns: Sequence[str], path: str) -> pa.Table:
        """With the columns that other shards have and this one has not, as nulls: each tar of an index says what it likes."""
        for name in columns:
            if name not in table.column_names and name not in self.schema.names:
                raise ValueError(f"{path} has no column '{name}': make the corpus again with this version")
            kind = table.schema.field(name).type if name in table.column_names else None
            wanted = self.schema.field(name).type if name in self.schema.names else kind
            if kind is None:
                table = table.append_column(name, pa.nulls(table.num_rows, wanted))
            elif kind != wanted and _is_number(kind) != _is_number(wanted):
                raise ValueError(f"{path}: column '{name}' is {kind}, and {wanted} in the corpus's first shard: leave it out of the config")
        return table


def read_manifest(corpus: str | Path) -> dict[str, Any]:
    """The manifest of the corpus in a folder or at a URL. Raises ValueError, in one line, for anything else."""
    folder = str(corpus)
    file = os.path.join(folder, "manifest.json")
    if not is_remote(folder) and not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a corpus: there is no such folder")
    try:
        text = read_file(file) if is_remote(file) else Path(file).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a corpus: it has no manifest.json; `tim prepare SOURCE --out CORPUS` makes one") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({one_line(error)}): is the storage alive?") from error
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): run `tim prepare` again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} is of format {found!r}, this version of tim reads format {FORMAT}: use the version that wrote it")
    return manifest


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _shard(folder: str, entry: dict[str, Any], *, check: bool) -> CorpusShard:
    """A shard lies in the corpus's folder, or at the absolute path or URL that `tim index` was given; its table in the folder."""
    name, table = entry["name"], entry["table"]
    is_foreign = name.startswith("/") or is_remote(name)
    for inside in (table,) if is_foreign else (name, table):
        if "/" in inside or inside in ("", ".", ".."):
            raise ValueError(f"corpus {folder}: manifest.json names {inside!r}, which leads out of the folder: do not use this corpus")
    path = name if is_foreign else os.path.join(folder, name)
    if check and not is_remote(path) and entry["count"]:  # what an index could not read has no samples
        _expect_size(path, size=entry["bytes"])
    return CorpusShard(
        path=path,
        count=entry["count"],
        bytes=entry["bytes"],
        sha256=entry["sha256"] or "",
        table=table,
        digest=entry["table_sha256"],
        table_digest=entry["table_sha256"],
    )


def _with_texts(shard: CorpusShard, sidecar: Sidecar, *, folder: str) -> CorpusShard:
    """A shard with the captions of a sidecar."""
    beside = sidecar.of(shard.table, digest=shard.table_digest, folder=folder)
    return replace(
        shard,
        digest=hashlib.sha256(f"{shard.table_digest} {beside.texts_sha256}".encode()).hexdigest(),
        texts=os.path.join(folder, beside.texts),
        texts_bytes=beside.texts_bytes,
        texts_sha256=beside.texts_sha256,
    )


def _expect_size(path: str, *, size: int) -> None:
    try:
        found = os.stat(path).st_size
    except FileNotFoundError as error:
        folder, name = os.path.split(path)
        raise ValueError(f"corpus {folder} lacks the shard {name}: restore the file, or make the corpus again") from error
    if found != size:
        raise ValueError(f"shard {path} has {found} bytes, manifest.json says {size}: restore the file, or make the corpus again")
