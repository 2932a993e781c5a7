"""A corpus in a plan: selected rows (`where`, `exclude`, the size rule), share (`weight`, `repeats`, `cap`) and loss weight."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.row_filter import Where
from pipeline.corpus.sidecars import TAKEDOWN, provider
from pipeline.cost import Ints
from pipeline.errors import one_line
from pipeline.randomness import Hashes, hash_ids, uniforms
from pipeline.size_rule import LEFT_OUT_REASONS, SizeRule, Targets, target_sizes


class CorpusView:
    """A corpus in a plan.

    Args:
        corpus: its tables.
        weight: its share of all images, relative to the weights of the other sources; None: its number of samples times `repeats`.
        repeats: number of passes for each pass over a source with repeats 1.
        cap: at most this many samples per epoch, a different subset each time.
        where: use only rows that match this expression (`pipeline.corpus.row_filter`).
        exclude: a parquet file; rows with a key in its column `key` are left out.
        validation_share: share of the samples, by hash of their ids, that is kept for validation and left out.
        loss_weight: factor of the loss of its samples. Not a part of `identity`: no draw and no pack depends on it.

    Samples that a sidecar marks as taken down are left out, too. Raises ValueError, in one line, if `where` does not fit the corpus's
    columns, or if `exclude` is not such a file.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        weight: float | None = None,
        repeats: float = 1.0,
        cap: int | None = None,
        where: str | None = None,
        exclude: Path | None = None,
        validation_share: float | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        if loss_weight <= 0:
            raise ValueError(f"corpus {corpus.name}: loss_weight {loss_weight:g} must be above 0: leave the corpus out instead")
        if weight is not None and repeats != 1:
            raise ValueError(f"corpus {corpus.name}: weight and repeats both set how much of it is used: give one of them")
        self.corpus = corpus
        self.name = corpus.name
        self.weight = weight
        self.repeats = repeats
        self.cap = cap
        self.loss_weight = float(loss_weight)
        self._where = None if where is None else Where(where)
        self._excluded = None if exclude is None else _read_excluded(exclude, name=corpus.name)
        self._validation_share = validation_share
        self._is_held_out = False
        self._columns = ("key",) * (exclude is not None or validation_share is not None)
        if self._where is not None:
            try:
                self._where.check(corpus.schema)
            except ValueError as error:
                raise ValueError(f"corpus {corpus.name}: {error}") from None
            self._columns += self._where.columns
        marks = provider(corpus.sidecars, TAKEDOWN)
        self.takedown_sidecar = None if marks is None else marks.name
        self._has_takedowns = marks is not None
        self._columns += (TAKEDOWN,) * self._has_takedowns
        settings: dict[str, Any] = {"weight": weight, "repeats": None if repeats == 1 else repeats, "cap": cap, "where": where}
        if self._excluded is not None:
            settings["exclude"] = hashlib.sha256(self._excluded.tobytes()).hexdigest()
        self.identity: list[Any] = [corpus.name, corpus.digest]
        """Everything that a plan depends on, JSON-serialisable."""
        settings["validation.share"] = validation_share
        used_sidecars = {sidecar.name: sidecar.digest for name in self._columns if (sidecar := provider(corpus.sidecars, name)) is not None}
        settings["sidecars"] = used_sidecars or None
        if used := {key: value for key, value in settings.items() if value is not None}:
            self.identity.append(used)

    @property
    def excluded(self) -> int:
        """Number of keys in its `exclude` file."""
        return 0 if self._excluded is None else len(self._excluded)

    def held_out(self) -> CorpusView:
        """The samples that `validation_share` leaves out, as a view of its own."""
        view = copy.copy(self)
        view._is_held_out = True
        return view

    def count_takedowns(self) -> int:
        """Number of samples marked as taken down. Reads the marks of all shards. Raises ValueError if a table cannot be read."""
        if not self._has_takedowns:
            return 0
        marks = (self.corpus.read(shard, columns=("key", TAKEDOWN)).column(TAKEDOWN) for shard in range(len(self.corpus.shards)))
        return sum(pc.call_function("sum", [column]).as_py() or 0 for column in marks)

    def select(self, shard: int, *, rule: SizeRule, columns: Sequence[str] = ()) -> tuple[pa.Table, Targets]:
        """All rows of a shard with these `columns`, `width` and `height`, and their target sizes; `left_out` is why a row is not used."""
        table = self.corpus.read(shard, columns=tuple(dict.fromkeys(("width", "height", *columns, *self._columns))))
        targets = target_sizes(integers(table, "height"), widths=integers(table, "width"), rule=rule)
        left_out = targets.left_out
        if self._where is not None:
            left_out = np.where(self._where.rows(table), left_out, LEFT_OUT_REASONS.index("where"))
        if self._excluded is not None:
            is_excluded = np.isin(self.hashes(table.column("key").to_pylist()), self._excluded)
            left_out = np.where(is_excluded, LEFT_OUT_REASONS.index("exclude"), left_out)
        if self._has_takedowns:
            marked = pc.fill_null(table.column(TAKEDOWN), False).to_numpy()
            left_out = np.where(marked, LEFT_OUT_REASONS.index("takedown"), left_out)
        if self._validation_share is not None:
            is_held_out = validation_draws(self.hashes(table.column("key").to_pylist())) < self._validation_share
            other_part = (is_held_out != self._is_held_out) & (left_out == 0)
            left_out = np.where(other_part, LEFT_OUT_REASONS.index("validation"), left_out)
        return table, replace(targets, left_out=left_out)

    def hashes(self, keys: Sequence[str]) -> Hashes:
        """Hashes of the ids of samples with these keys."""
        return hash_ids([f"{self.name}/{key}" for key in keys])


def validation_draws(ids: Hashes) -> NDArray[np.float64]:
    """(n,) a number in (0, 1) for each sample id, by which samples are kept for validation. The same in every run."""
    return uniforms(0, "validation", visits=0, ids=ids)


def integers(table: pa.Table, column: str) -> Ints:
    """A column as int64, −1 for null."""
    return pc.fill_null(table.column(column), -1).to_numpy().astype(np.int64)


def _read_excluded(file: Path, *, name: str) -> Hashes:
    """Sorted hashes of the ids of excluded samples, 8 bytes each."""
    if not file.is_file():
        raise ValueError(f"corpus {name}: exclude {file}: there is no such file")
    try:
        parquet = pq.ParquetFile(file)
        if "key" not in parquet.schema_arrow.names:
            raise ValueError(f"corpus {name}: exclude {file} has no column 'key'; there are: {', '.join(parquet.schema_arrow.names)}")
        keys = parquet.read(columns=["key"]).column("key").cast(pa.string()).drop_null().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"corpus {name}: exclude {file} is not a parquet file of keys ({one_line(error)})") from error
    return np.unique(hash_ids([f"{name}/{key}" for key in keys]))
