"""The endless, seeded stream of samples: shards in random order, samples in random order within a window of shards, epoch after epoch.

Only the tables of one window are in memory. A position in the stream is (epoch, window, position), so that resuming reads one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cost import Ints
from pipeline.draws import draws, hash_ids, uniforms
from pipeline.index import Corpus
from pipeline.resolution import SizeRule, target_sizes
from pipeline.shuffle import shard_order, window_order
from pipeline.steps import Columns, Place

_MEMBERS = ("image_offset", "image_length", "text_offset", "text_length", "json_offset", "json_length")
_COLUMNS = ("key", "width", "height", "label", "captions", *_MEMBERS)


@dataclass(frozen=True, slots=True)
class Position:
    """Where the stream stands: `position` samples of window `window` of epoch `epoch` were taken."""

    epoch: int
    window: int
    position: int


@dataclass(frozen=True, slots=True)
class _Window:
    """The samples of a window in their order, and how many tokens the first 1, 2, … of them have."""

    epoch: int
    window: int
    samples: Columns
    tokens_up_to: Ints


class SampleStream:
    """Samples of several corpora as if they were one, each once per epoch.

    `window` shards are shuffled together; `caption_dropout` and `flip` are shares of samples.
    """

    def __init__(self, corpora: Sequence[Corpus], *, rule: SizeRule, seed: int, window: int, caption_dropout: float, flip: float) -> None:
        self.places = [
            Place(
                corpus=number,
                shard=shard,
                name=corpus.name,
                tar=corpus.features.shards[shard].tar if corpus.features else corpus.shards[shard].path,
            )
            for number, corpus in enumerate(corpora)
            for shard in range(len(corpus.shards))
        ]
        self.position = Position(epoch=0, window=0, position=0)
        self._corpora = tuple(corpora)
        self._rule = rule
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._flip = flip
        self._shards_per_window = window
        self._windows = -(-len(self.places) // window)
        self._open_shards: dict[int, Columns] = {}
        self._open_window: _Window | None = None

    def take(self, *, tokens: int) -> Columns:
        """The next samples, as many as are needed to hold at least `tokens` tokens together.

        Raises ValueError if an epoch goes by in which the size rule leaves every sample out.
        """
        assert tokens > 0, tokens
        parts: list[Columns] = []
        windows_without = 0
        while tokens > 0:
            window, start = self._window_at_position(), self.position.position
            taken_before = int(window.tokens_up_to[start - 1]) if start else 0
            end = min(int(np.searchsorted(window.tokens_up_to, taken_before + tokens)) + 1, len(window.samples))
            if end > start:
                windows_without = 0
                parts.append(window.samples.take(slice(start, end)))
                tokens -= int(window.tokens_up_to[end - 1]) - taken_before
            else:
                windows_without += 1
                if (
                    windows_without > 2 * self._windows
                ):  # the last of one epoch may have been its first window, the next of another its last
                    raise ValueError(
                        "the plan leaves out every sample of the corpus: see `tim plan`, loosen plan.min_tokens or plan.max_aspect"
                    )
            self._advance(end, of=len(window.samples))
        return Columns.join(parts)

    def fetch(self, places: Sequence[int], *, rows: Sequence[int], visits: Sequence[int]) -> Columns:
        """Samples by shard and row: what a saved state carries. Raises ValueError if one of them is not there."""
        found: dict[tuple[int, int], Columns] = {}
        for place in sorted(set(places)):
            if not 0 <= place < len(self.places):
                raise ValueError(f"the saved plan carries a sample of shard {place}, there are {len(self.places)} shards")
            samples = self._shard(place)
            wanted = {row for other, row in zip(places, rows, strict=True) if other == place}
            found |= {(place, int(row)): samples.take(slice(i, i + 1)) for i, row in enumerate(samples.row) if row in wanted}
        try:
            joined = Columns.join([found[key] for key in zip(places, rows, strict=True)])
        except KeyError as error:
            raise ValueError(f"the saved plan carries row {error.args[0][1]} of shard {error.args[0][0]}, which is not there") from error
        return self._draw(joined, visits=np.asarray(visits, dtype=np.int64))

    def _advance(self, position: int, *, of: int) -> None:
        at = self.position
        if position < of:
            self.position = Position(epoch=at.epoch, window=at.window, position=position)
        elif at.window + 1 < self._windows:
            self.position = Position(epoch=at.epoch, window=at.window + 1, position=0)
        else:
            self.position = Position(epoch=at.epoch + 1, window=0, position=0)

    def _window_at_position(self) -> _Window:
        epoch, window = self.position.epoch, self.position.window
        if self._open_window is not None and (self._open_window.epoch, self._open_window.window) == (epoch, window):
            return self._open_window
        first = window * self._shards_per_window
        positions = np.arange(first, min(first + self._shards_per_window, len(self.places)))
        places = shard_order(positions, count=len(self.places), seed=self._seed, epoch=epoch).tolist()
        self._open_shards = {place: self._open_shards[place] for place in places if place in self._open_shards}
        for place in places:
            self._open_shards[place] = self._shard(place)
        samples = Columns.join([self._open_shards[place] for place in places])
        samples = samples.take(window_order(count=len(samples), seed=self._seed, epoch=epoch, window=window))
        samples = self._draw(samples, visits=np.full(len(samples), epoch))
        self._open_window = _Window(epoch=epoch, window=window, samples=samples, tokens_up_to=np.cumsum(samples.tokens))
        return self._open_window

    def _shard(self, place: int) -> Columns:
        """The kept samples of a shard in the order of the tar, not yet drawn for a visit."""
        if place in self._open_shards:
            return self._open_shards[place]
        corpus = self._corpora[self.places[place].corpus]
        table = corpus.read(self.places[place].shard, columns=_COLUMNS)
        targets = target_sizes(_integers(table, "height"), widths=_integers(table, "width"), rule=self._rule)
        kept = np.flatnonzero(targets.left_out == 0)
        keys = np.array([*table.column("key").to_pylist(), None], dtype=object)[:-1][
            kept
        ]  # the None keeps NumPy from making an array of str
        members = np.stack([_integers(table, member) for member in _MEMBERS], axis=1)[kept]
        if corpus.features is not None:  # they take the place of the image, and have the captions, too
            members = np.full_like(members, -1)
            sizes = {"heights": targets.height[kept], "widths": targets.width[kept]}
            members[:, :2] = corpus.locate_features(self.places[place].shard, table=table.take(pa.array(kept)), **sizes)
        nothing_drawn = np.zeros(len(kept), dtype=np.int64)
        return Columns(
            place=np.full(len(kept), place),
            row=kept,
            visit=nothing_drawn,
            key=keys,
            id_hash=hash_ids([f"{corpus.name}/{key}" for key in keys]),
            label=_integers(table, "label")[kept],
            captions=np.maximum(_lengths(table, "captions"), 1)[kept],
            members=members,
            resize_height=targets.resize_height[kept],
            resize_width=targets.resize_width[kept],
            height=targets.height[kept],
            width=targets.width[kept],
            tokens=targets.tokens[kept],
            kind_draw=nothing_drawn.astype(np.uint64),
            caption=nothing_drawn,
            flip=nothing_drawn.astype(bool),
        )

    def _draw(self, samples: Columns, *, visits: Ints) -> Columns:
        seed, ids = self._seed, samples.id_hash
        dropped = uniforms(seed, "caption-dropout", visits=visits, ids=ids) < self._caption_dropout
        captions = (uniforms(seed, "caption", visits=visits, ids=ids) * samples.captions).astype(np.int64)
        return replace(
            samples,
            visit=visits,
            kind_draw=draws(seed, "kind", visits=visits, ids=ids),
            caption=np.where(dropped, -1, captions),
            flip=uniforms(seed, "flip", visits=visits, ids=ids) < self._flip,
        )


def _integers(table: pa.Table, column: str) -> Ints:
    return pc.fill_null(table.column(column), -1).to_numpy().astype(np.int64)


def _lengths(table: pa.Table, column: str) -> Ints:
    lengths = pc.call_function("list_value_length", [table.column(column)])
    return pc.fill_null(lengths, 0).to_numpy().astype(np.int64)
