"""A corpus for training: its manifest, and the tables of its kept samples, read one shard at a time.

`tim prepare` and `tim index` write the files (docs/formats.md). Every shard has its own table, so that memory is bounded by the shards
that a plan has open.
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
MASK_COLUMNS = {"mask_path": pa.string(), "mask_offset": pa.int64(), "mask_length": pa.int64()}
"""Columns of tables of shards with loss masks; null in all rows of other shards."""


@dataclass(frozen=True, slots=True)
class CorpusShard:
    """One tar of a corpus: path or URL, number of samples, bytes, sha256 ("" if unknown), name of its table and the table's sha256.

    If a sidecar has new captions, `texts` is the path or URL of its file, with size and sha256, and they are included in `digest`, which
    identifies the source of features.
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
    """A corpus of shards and their tables. Create one with `Corpus.open`.

    `features`, if any, replace its images and captions. Columns and captions of its `sidecars` override its own of the same name.
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
        """Open the corpus at `path`, a folder or a URL (s3://…). `name` defaults to that of the manifest; `features` is a features folder.

        With `check_shards`, local shards must exist and have the right size; remote shards are checked at their first read. `without` names
        a sidecar to ignore. With `partial`, sidecars may lack shards.

        Raises ValueError, in one line, if it is not a corpus, has an unknown format, or a file is missing or does not match.
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
        """Open a corpus from a manifest, which need not be written yet."""
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
        """The kept rows of one shard, in tar order. Raises ValueError if its table is missing, damaged or lacks a column.

        If different shards may have equal keys, the shard number is prepended: `000012/KEY`.
        """
        path = os.path.join(self.folder, self.shards[shard].table)
        sidecars = [each for each in self.sidecars if not self._partial or self.shards[shard].table in each.shards]
        providers = {name: sidecar for name in columns if (sidecar := provider(sidecars, name)) is not None}
        own = [name for name in columns if name not in providers]
        table = self._with_missing_columns(self._read_table(self.shards[shard].table, columns=own), columns=own, path=path)
        keys = table.column("key")
        if keys.null_count:  # rejected inputs
            table = table.filter(keys.is_valid())
        if table.num_rows != self.shards[shard].count:
            raise ValueError(
                f"{path} has {table.num_rows} samples, manifest.json says {self.shards[shard].count}: they do not belong together, "
                "make the corpus again"
            )
        if self._qualified:
            keys = pc.call_function("binary_join_element_wise", [pa.scalar(f"{shard:06d}"), table.column("key"), pa.scalar("/")])
            table = table.set_column(table.column_names.index("key"), "key", keys)
        for sidecar in sidecars:
            names = [name for name, source in providers.items() if source is sidecar]
            if names:
                table = self._with_sidecar(shard, table, sidecar=sidecar, columns=names)
        return table.select(columns)

    def read_rejected(self, shard: int, *, columns: Sequence[str]) -> pa.Table:
        """The rejected rows of one shard, with the given columns if its table has them. Raises ValueError like `read`."""
        table = self._read_table(self.shards[shard].table, columns=columns)
        return table.filter(table.column("key").is_null())

    def _read_table(self, name: str, *, columns: Sequence[str]) -> pa.Table:
        """All rows of a table with `key` and the given columns, if it has them."""
        path = os.path.join(self.folder, name)
        try:
            source = io.BytesIO(read_file(path)) if is_remote(path) else path
            return pq.ParquetFile(source).read(columns=[*dict.fromkeys(("key", *columns))], use_threads=False)
        except FileNotFoundError as error:
            raise ValueError(f"corpus {self.folder} lacks {name}: restore the file, or make the corpus again") from error
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read ({one_line(error)}): run `tim verify` on the corpus") from error

    def _with_sidecar(self, shard: int, table: pa.Table, *, sidecar: Sidecar, columns: Sequence[str]) -> pa.Table:
        """Append columns of a sidecar's table to the kept rows of a shard."""
        entry = sidecar.of(self.shards[shard].table, digest=self.shards[shard].table_digest, folder=self.folder)
        added = self._read_table(entry.table, columns=columns)
        if not added.column("key").equals(table.column("key")):
            raise ValueError(f"corpus {self.folder}: {entry.table} has other samples than {self.shards[shard].table}: make it again")
        for name in columns:
            table = table.append_column(added.schema.field(name), added.column(name))
        return table

    def features_tar(self, shard: int) -> str:
        """Path of a shard's features, "" if the corpus has none."""
        return self.features.shards[shard].tar if self.features else ""

    def texts(self, shard: int) -> str:
        """Path or URL of the file that `text_offset` and `json_offset` of a shard refer to: its tar, or a sidecar's captions."""
        return self.shards[shard].texts or self.shards[shard].path

    def check_features(self, *, rules: Sequence[SizeRule], flips: bool) -> None:
        """Check that the features fit a plan (`Features.check`). Raises ValueError."""
        if self.features is not None:
            self.features.check(of=[shard.digest for shard in self.shards], corpus=self.name, rules=rules, flips=flips)

    def locate_features(self, shard: int, *, table: pa.Table, crops: Ints) -> Ints:
        """Offset and length of samples' features in the features' tar, (n, 2). Only with features.

        `table` has the n samples' columns key and captions, `crops` is (n, 4), `Targets.crops`. Raises ValueError (`Features.join`).
        """
        assert self.features is not None
        keys = self.bare_keys(shard, table.column("key").to_pylist())
        captions = pc.fill_null(pc.call_function("list_value_length", [table.column("captions")]), 0).to_numpy()
        return self.features.join(shard, keys=keys, crops=crops, captions=captions)

    def bare_keys(self, shard: int, keys: Sequence[str]) -> list[str]:
        """Keys as in the shard's tar: without the shard number that `read` prepends to keys that may repeat."""
        return [key.removeprefix(f"{shard:06d}/") for key in keys] if self._qualified else list(keys)

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the columns in the first shard with samples, and in its sidecars.

        Raises ValueError if a table is damaged.
        """
        first = next((shard for shard in self.shards if shard.count), self.shards[0])
        sidecar_tables = [(each.of(first.table, digest=first.table_digest, folder=self.folder).table, each) for each in self.sidecars]
        fields: dict[str, pa.Field] = {}
        for name, sidecar in [(first.table, None), *sidecar_tables]:
            path = os.path.join(self.folder, name)
            try:
                schema = pq.read_schema(io.BytesIO(read_file(path)) if is_remote(path) else path)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{path} cannot be read ({one_line(error)}): run `tim verify` on the corpus") from error
            fields |= {field.name: field for field in schema if sidecar is None or field.name in sidecar.columns}
        return pa.schema(list(fields.values()))

    def _with_missing_columns(self, table: pa.Table, *, columns: Sequence[str], path: str) -> pa.Table:
        """Add columns that only other shards have, as nulls: the tars of an index may have different columns."""
        for name in columns:
            if name in MASK_COLUMNS and name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, MASK_COLUMNS[name]))
                continue
            if name not in table.column_names and name not in self.schema.names:
                raise ValueError(f"{path} has no column '{name}': make the corpus again with this version")
            kind = table.schema.field(name).type if name in table.column_names else None
            wanted = self.schema.field(name).type if name in self.schema.names else kind
            if kind is None:
                table = table.append_column(name, pa.nulls(table.num_rows, wanted))
            elif kind != wanted and _is_number(kind) != _is_number(wanted):
                raise ValueError(f"{path}: column '{name}' is {kind}, but {wanted} in the corpus's first shard: remove it from the config")
        return table


def read_manifest(corpus: str | Path) -> dict[str, Any]:
    """The manifest of the corpus in a folder or at a URL. Raises ValueError, in one line, if there is none."""
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
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ValueError(f"{file} has format {version!r}, this version of tim reads format {FORMAT}: use the version that wrote it")
    return manifest


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _shard(folder: str, entry: dict[str, Any], *, check: bool) -> CorpusShard:
    """A shard is in the corpus's folder, or at the absolute path or URL given to `tim index`; its table is in the folder."""
    name, table = entry["name"], entry["table"]
    is_foreign = name.startswith("/") or is_remote(name)
    for file in (table,) if is_foreign else (name, table):
        if "/" in file or file in ("", ".", ".."):
            raise ValueError(f"corpus {folder}: manifest.json names {file!r}, which is outside the folder: do not use this corpus")
    path = name if is_foreign else os.path.join(folder, name)
    if check and not is_remote(path) and entry["count"]:  # an unreadable tar of an index has no samples
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
    entry = sidecar.of(shard.table, digest=shard.table_digest, folder=folder)
    return replace(
        shard,
        digest=hashlib.sha256(f"{shard.table_digest} {entry.texts_sha256}".encode()).hexdigest(),
        texts=os.path.join(folder, entry.texts),
        texts_bytes=entry.texts_bytes,
        texts_sha256=entry.texts_sha256,
    )


def _expect_size(path: str, *, size: int) -> None:
    try:
        actual = os.stat(path).st_size
    except FileNotFoundError as error:
        folder, name = os.path.split(path)
        raise ValueError(f"corpus {folder} lacks the shard {name}: restore the file, or make the corpus again") from error
    if actual != size:
        raise ValueError(f"shard {path} has {actual} bytes, manifest.json says {size}: restore the file, or make the corpus again")
