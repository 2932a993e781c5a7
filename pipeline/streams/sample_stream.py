"""The endless, seeded stream of one corpus: in every epoch, shards in random order, and samples in random order within a window of shards.

Memory holds the tables of one window, or of 16 shards. A position in the stream is (epoch, window, position), so that resuming reads one
window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.cost import Ints
from pipeline.planned_steps import SampleTable
from pipeline.randomness import draws, uniforms
from pipeline.size_rule import SizeRule
from pipeline.streams.corpus_view import CorpusView, integers
from pipeline.streams.shuffle import shard_order, window_order

_MEMBERS = ("image_offset", "image_length", "text_offset", "text_length", "json_offset", "json_length")
_SHARDS_KEPT = 16  # at least, so that a small corpus is read once
_MASK = ("mask_offset", "mask_length")
_COLUMNS = ("key", "label", "captions", *_MEMBERS, *_MASK)


@dataclass(frozen=True, slots=True)
class DrawRule:
    """Draws of samples: `seed`, the shares with dropped condition and of mirrored images, and the relative weights of a sample's 1st,
    2nd, … caption; the last weight applies to all further captions."""

    seed: int
    caption_dropout: float = 0.0
    caption_weights: tuple[float, ...] = (1.0,)
    flip: float = 0.0


_Index = TypeVar("_Index", int, Ints)


@dataclass(frozen=True, slots=True)
class ShardSubset:
    """Every `of`-th item, from item `number` on."""

    number: int = 0
    of: int = 1

    def size(self, count: int) -> int:
        """Number of selected items out of `count`."""
        return len(range(self.number, count, self.of))

    def member(self, index: _Index) -> _Index:
        """The item number of the subset's `index`-th item, elementwise for an array."""
        return index * self.of + self.number


@dataclass(frozen=True, slots=True)
class Position:
    """Position in a stream: after `position` rows of window `window` of epoch `epoch`, with `taken` samples taken in the epoch."""

    epoch: int = 0
    window: int = 0
    position: int = 0
    taken: int = 0


@dataclass(frozen=True, slots=True)
class _Window:
    """The samples of a window in order, and the position of each among all rows of the window, left-out rows included."""

    epoch: int
    window: int
    samples: SampleTable
    positions: Ints


class SampleStream:
    """The samples of a source, each once per epoch, or `source.cap` of them. `window` shards are shuffled together.

    `first_shard` is the index of its first shard over all sources. `part` selects its shards, the same in every epoch.
    """

    def __init__(
        self, source: CorpusView, *, rule: SizeRule, draw_rule: DrawRule, window: int, first_shard: int, part: ShardSubset
    ) -> None:
        self.position = Position()
        self._source = source
        self._rule = rule
        self._draw_rule = draw_rule
        self._shards_per_window = window
        self._first_shard = first_shard
        self._part = part
        self._shards = part.size(len(source.corpus.shards))
        self._cap = None if source.cap is None else part.size(source.cap)
        self._windows = -(-self._shards // window)
        self._open_shards: dict[int, tuple[SampleTable, int]] = {}
        self._open_window: _Window | None = None

    def change_size_rule(self, rule: SizeRule) -> None:
        """Change the size rule, keeping the position."""
        if rule != self._rule:
            self._rule = rule
            self._open_shards = {}
            self._open_window = None

    def take(self, count: int) -> tuple[SampleTable, Ints]:
        """The next `count` samples, and the position after each of them: (count, 4), the fields of `Position`.

        Raises ValueError if every sample of an epoch is left out.
        """
        assert count > 0, count
        parts: list[SampleTable] = []
        positions: list[Ints] = []
        empty_windows = 0
        while count > 0:
            window, at = self._window_at_position(), self.position
            start = int(np.searchsorted(window.positions, at.position))
            left = len(window.samples) - start
            if self._cap is not None:
                left = min(left, self._cap - at.taken)
            if left <= 0:
                empty_windows += 1
                if empty_windows > 2 * self._windows:  # the rest of this epoch, and all of the next
                    raise ValueError(
                        f"the plan leaves out every sample of corpus {self._source.name}: see `tim plan`, and relax plan.min_tokens, "
                        "plan.max_aspect, or the corpus's `where` and `exclude`"
                    )
                self._next_window()
                continue
            empty_windows = 0
            end = start + min(count, left)
            after = np.empty((end - start, 4), dtype=np.int64)
            after[:, 0], after[:, 1], after[:, 2] = at.epoch, at.window, window.positions[start:end] + 1
            after[:, 3] = at.taken + 1 + np.arange(end - start)
            parts.append(window.samples.take(slice(start, end)))
            positions.append(after)
            self.position = Position(*after[-1].tolist())
            count -= end - start
        return SampleTable.join(parts), np.concatenate(positions)

    def find(self, shard: int, *, rows: Ints, visits: Ints) -> tuple[SampleTable, NDArray[np.bool_]]:
        """The samples at `rows` of a shard that the size rule keeps, and a mask of them: (n,)."""
        samples, _ = self._shard(shard)
        index = np.searchsorted(samples.row, rows)
        kept = np.append(samples.row, -1)[index] == rows
        return self._draw(samples.take(index[kept]), visits=visits[kept]), kept

    def kept(self, shard: int) -> SampleTable:
        """The samples of a shard that the size rule keeps, in tar order: with their first captions, and no other draws."""
        return self._shard(shard)[0]

    def _next_window(self) -> None:
        at = self.position
        if at.window + 1 < self._windows and at.taken != self._cap:
            self.position = Position(epoch=at.epoch, window=at.window + 1, position=0, taken=at.taken)
        else:
            self.position = Position(epoch=at.epoch + 1)

    def _window_at_position(self) -> _Window:
        epoch, window, seed = self.position.epoch, self.position.window, self._draw_rule.seed
        if self._open_window is not None and (self._open_window.epoch, self._open_window.window) == (epoch, window):
            return self._open_window
        first = window * self._shards_per_window
        positions = np.arange(first, min(first + self._shards_per_window, self._shards))
        part_epoch = self._part.member(epoch)  # gives every part its own shard order
        shards = self._part.member(shard_order(positions, count=self._shards, seed=seed, epoch=part_epoch)).tolist()
        for shard in shards:
            self._open_shards[shard] = self._open_shards.pop(shard, None) or self._shard(shard)
        for shard in list(self._open_shards)[: -max(self._shards_per_window, _SHARDS_KEPT)]:
            del self._open_shards[shard]
        samples = SampleTable.join([self._open_shards[shard][0] for shard in shards])
        rows = np.cumsum([0, *[self._open_shards[shard][1] for shard in shards]])
        sample_of_row = np.full(rows[-1], -1)
        sample_of_row[np.repeat(rows[:-1], [len(self._open_shards[shard][0]) for shard in shards]) + samples.row] = np.arange(len(samples))
        in_order = sample_of_row[window_order(count=int(rows[-1]), seed=seed, epoch=epoch, window=self._part.member(window))]
        positions = np.flatnonzero(in_order >= 0)
        samples = self._draw(samples.take(in_order[positions]), visits=np.full(len(samples), epoch))
        self._open_window = _Window(epoch=epoch, window=window, samples=samples, positions=positions)
        return self._open_window

    def _shard(self, shard: int) -> tuple[SampleTable, int]:
        """The kept samples of a shard in tar order, without draws; and the number of rows."""
        if shard in self._open_shards:
            return self._open_shards[shard]
        table, targets = self._source.select(shard, rule=self._rule, columns=_COLUMNS)
        kept = np.flatnonzero(targets.left_out == 0)
        keys = np.array(table.column("key").to_pylist(), dtype=object)[kept]
        located = [[integers(table, name) for name in names] for names in (_MEMBERS, _MASK)]
        members = np.stack([*located[0], *np.full((2, table.num_rows), -1), *located[1]], axis=1)[kept]
        if self._source.corpus.features is not None:
            members[:, 6:8] = self._source.corpus.locate_features(shard, table=table.take(pa.array(kept)), crops=targets.crops[kept])
        zeros = np.zeros(len(kept), dtype=np.int64)
        samples = SampleTable(
            shard=np.full(len(kept), self._first_shard + shard),
            row=kept,
            visit=zeros,
            key=keys,
            id_hash=self._source.hashes(keys.tolist()),
            label=integers(table, "label")[kept],
            captions=np.maximum(_lengths(table, "captions"), 1)[kept],
            members=members,
            resize_height=targets.resize_height[kept],
            resize_width=targets.resize_width[kept],
            height=targets.height[kept],
            width=targets.width[kept],
            tokens=targets.tokens[kept],
            kind_draw=zeros.astype(np.uint64),
            caption=zeros,
            flip=zeros.astype(bool),
        )
        return samples, table.num_rows

    def _draw(self, samples: SampleTable, *, visits: Ints) -> SampleTable:
        rule, seed, ids = self._draw_rule, self._draw_rule.seed, samples.id_hash
        dropped = uniforms(seed, "caption-dropout", visits=visits, ids=ids) < rule.caption_dropout
        captions = _choose(uniforms(seed, "caption", visits=visits, ids=ids), among=samples.captions, weights=rule.caption_weights)
        return replace(
            samples,
            visit=visits,
            kind_draw=draws(seed, "kind", visits=visits, ids=ids),
            caption=np.where(dropped, -1, captions),
            flip=uniforms(seed, "flip", visits=visits, ids=ids) < rule.flip,
        )


def _choose(uniform: NDArray[np.float64], *, among: Ints, weights: Sequence[float]) -> Ints:
    """Choose one of `among` items for each sample, (n,), in proportion to `weights`; the first if all weights are 0."""
    count = int(among.max(initial=1))
    cumulative = np.cumsum([*weights[:count], *[weights[-1]] * (count - len(weights))])
    chosen = np.searchsorted(cumulative, uniform * cumulative[among - 1], side="right")
    return np.where(cumulative[among - 1] > 0, np.minimum(chosen, among - 1), 0)


def _lengths(table: pa.Table, column: str) -> Ints:
    lengths = pc.call_function("list_value_length", [table.column(column)])
    return pc.fill_null(lengths, 0).to_numpy().astype(np.int64)
