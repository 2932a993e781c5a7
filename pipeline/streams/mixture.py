"""Mix several sources into one endless stream in which each has exactly its share, in every interval.

Each slot of the stream goes to one source. With share w, the k-th sample of a source is released at slot (k−1)/w and due at slot k/w; of
the released sources, the one due first gets the slot. Such a schedule always exists (earliest deadline first, Liu and Layland 1973; Pfair,
Baruah et al. 1996): after n slots a source has had w·n samples, within less than one, and exactly w·n if that is an integer. The slots
are deterministic: the order within a source is random, and a step's packs mix all sources.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline.cost import Ints
from pipeline.planned_steps import SampleTable, ShardRef
from pipeline.size_rule import SizeRule
from pipeline.streams.corpus_view import CorpusView
from pipeline.streams.sample_stream import DrawRule, Position, SampleStream, ShardSubset

_SLOTS_AHEAD = 64


def mixture_shares(
    sources: Sequence[CorpusView], *, scheduled: Mapping[str, float] | None, samples: Callable[[], Sequence[int]]
) -> tuple[int, ...]:
    """The sources' shares, as the smallest integers with these proportions.

    They are the `scheduled` weights by name, else the sources' own weights, else the number of `samples` times repeats: then every sample
    is seen equally often, apart from repeats.

    Raises ValueError if only some sources have weights, if all weights are 0, or if the schedule names other sources.
    """
    names = [source.name for source in sources]
    without = [source.name for source in sources if source.weight is None]
    if scheduled is not None:
        if set(scheduled) != set(names):
            raise ValueError(f"plan.schedule: weights are given to {', '.join(scheduled)}, but the corpora are {', '.join(names)}")
        weights = [_exact(scheduled[name]) for name in names]
    elif len(sources) == 1:
        weights = [Fraction(1)]
    elif not without:
        weights = [_exact(source.weight) for source in sources if source.weight is not None]
    elif len(without) == len(sources):
        counts = samples()
        if 0 in counts:
            raise ValueError(
                f"the plan leaves out every sample of corpus {names[counts.index(0)]}: run `tim plan` with this corpus only to see why"
            )
        weights = [count * _exact(source.repeats) for count, source in zip(counts, sources, strict=True)]
    else:
        raise ValueError(f"corpus {without[0]} has no weight, others have one: give a weight to all corpora, or to none")
    if not any(weights):
        raise ValueError("all corpora have weight 0: at least one must be above 0")
    scale = math.lcm(*[weight.denominator for weight in weights])
    integers = [int(weight * scale) for weight in weights]
    return tuple(share // math.gcd(*integers) for share in integers)


def _exact(weight: float) -> Fraction:
    """The decimal value as written: 0.7 is 7/10."""
    return Fraction(repr(weight))


def next_slots(shares: Sequence[int], *, mixed: Sequence[int], slots: int) -> Ints:
    """The source of each of the next `slots` slots, (slots,), after `mixed` samples of each source."""
    if len(shares) == 1:
        return np.zeros(slots, dtype=np.int64)
    total, counts = sum(shares), list(mixed)
    before = sum(counts)
    slot_sources: list[int] = []
    for slot in range(before + 1, before + slots + 1):
        first, due = -1, 0
        for source, share in enumerate(shares):
            if counts[source] * total < share * slot:
                own_due = -(-(counts[source] + 1) * total // share)
                if first < 0 or own_due < due:
                    first, due = source, own_due
        slot_sources.append(first)
        counts[first] += 1
    return np.array(slot_sources, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Block:
    """The next slots of the stream: their sources and samples, the cumulative tokens, and each source's stream position before the block
    and after each of its samples."""

    slot_sources: Ints
    samples: SampleTable
    cumulative_tokens: Ints
    before: list[Position]
    after: list[Ints]


class Mixture:
    """Samples of several sources as one stream. Its state is the position of each source and the number of samples taken from it.

    `part` selects the shards of each source.
    """

    def __init__(
        self,
        sources: Sequence[CorpusView],
        *,
        shares: Sequence[int],
        rule: SizeRule,
        draw_rule: DrawRule,
        window: int,
        part: ShardSubset,
    ) -> None:
        self.shards = [
            ShardRef(
                corpus=number,
                shard=position,
                name=source.name,
                tar=shard.path,
                texts=source.corpus.texts(position),
                features_tar=source.corpus.features_tar(position),
                loss_weight=source.loss_weight,
            )
            for number, source in enumerate(sources)
            for position, shard in enumerate(source.corpus.shards)
        ]
        first_shards = np.cumsum([0, *[len(source.corpus.shards) for source in sources]]).tolist()
        self._streams = [
            SampleStream(source, rule=rule, draw_rule=draw_rule, window=window, first_shard=first_shard, part=part)
            for source, first_shard in zip(sources, first_shards, strict=False)
        ]
        self._shares = shares
        self._mixed = [0] * len(sources)  # before the block
        self._block: _Block | None = None
        self._used = 0  # slots of the block

    def take(self, *, tokens: int, limit: int | None = None) -> SampleTable:
        """The next samples with a total of at least `tokens` tokens, but at most `limit` samples.

        Raises ValueError if the plan leaves out every sample of a source.
        """
        assert tokens > 0, tokens
        parts: list[SampleTable] = []
        left = sys.maxsize if limit is None else limit
        while tokens > 0 and left > 0:
            block = self._next_block() if self._block is None or self._used == len(self._block.samples) else self._block
            start = self._used
            taken_before = int(block.cumulative_tokens[start - 1]) if start else 0
            end = min(int(np.searchsorted(block.cumulative_tokens, taken_before + tokens)) + 1, len(block.samples), start + left)
            parts.append(block.samples.take(slice(start, end)))
            left -= end - start
            tokens -= int(block.cumulative_tokens[end - 1]) - taken_before
            self._used = end
        return SampleTable.join(parts)

    def find(self, *, shards: Ints, rows: Ints, visits: Ints) -> tuple[SampleTable | None, NDArray[np.bool_]]:
        """The samples at `rows` of `shards` that the size rule keeps, and a mask of them: (n,)."""
        parts: list[SampleTable] = []
        indices: list[Ints] = []
        kept = np.zeros(len(shards), dtype=bool)
        for number in np.unique(shards).tolist():
            in_shard = np.flatnonzero(shards == number)
            shard = self.shards[number]
            samples, mask = self._streams[shard.corpus].find(shard.shard, rows=rows[in_shard], visits=visits[in_shard])
            parts.append(samples)
            indices.append(in_shard[mask])
            kept[in_shard] = mask
        if not kept.any():
            return None, kept
        return SampleTable.join(parts).take(np.argsort(np.concatenate(indices))), kept

    def kept(self, shard: int) -> SampleTable:
        """The samples that the size rule keeps in one of `shards` (`SampleStream.kept`)."""
        return self._streams[self.shards[shard].corpus].kept(self.shards[shard].shard)

    def change(self, *, shares: Sequence[int], rule: SizeRule) -> None:
        """Change the shares, counted from here, and the size rule."""
        self.load_state_dict([{**source, "mixed": 0} for source in self.state_dict()])
        self._shares = shares
        for stream in self._streams:
            stream.change_size_rule(rule)

    def begin(self, epoch: int) -> None:
        """Start at the beginning of an epoch of every source."""
        self.load_state_dict([{**asdict(Position(epoch=epoch)), "mixed": 0} for _ in self._streams])

    def state_dict(self) -> list[dict[str, int]]:
        """`Position` of each source, and how many of its samples were `mixed` in since the shares last changed."""
        block = self._block
        if block is None:
            return [{**asdict(stream.position), "mixed": mixed} for stream, mixed in zip(self._streams, self._mixed, strict=True)]
        used = np.bincount(block.slot_sources[: self._used], minlength=len(self._streams)).tolist()
        return [
            {**asdict(Position(*after[count - 1].tolist()) if count else before), "mixed": mixed + count}
            for count, mixed, before, after in zip(used, self._mixed, block.before, block.after, strict=True)
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """Continue from `state`."""
        for stream, source in zip(self._streams, state, strict=True):
            stream.position = Position(**{key: value for key, value in source.items() if key != "mixed"})
        self._mixed = [source["mixed"] for source in state]
        self._block = None

    def _next_block(self) -> _Block:
        if self._block is not None:
            self._mixed = [source["mixed"] for source in self.state_dict()]
        slot_sources = next_slots(self._shares, mixed=self._mixed, slots=_SLOTS_AHEAD)
        counts = np.bincount(slot_sources, minlength=len(self._streams)).tolist()
        before = [stream.position for stream in self._streams]
        taken = [stream.take(count) if count else None for stream, count in zip(self._streams, counts, strict=True)]
        samples = SampleTable.join([each[0] for each in taken if each is not None])
        if max(counts) < len(slot_sources):
            samples = samples.take(np.argsort(np.argsort(slot_sources, kind="stable")))
        self._block = _Block(
            slot_sources=slot_sources,
            samples=samples,
            cumulative_tokens=np.cumsum(samples.tokens),
            before=before,
            after=[np.zeros((0, 4), dtype=np.int64) if each is None else each[1] for each in taken],
        )
        self._used = 0
        return self._block
