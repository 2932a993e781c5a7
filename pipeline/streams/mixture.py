"""Several sources as one endless stream in which each has exactly its share, however short a stretch one looks at.

A slot of the stream goes to one source. With shares w, the k-th sample of a source may not come before slot (k−1)/w and is due at slot
k/w; of the sources that may come, the one that is due first does. On a single track such a plan always works out (earliest deadline first,
Liu and Layland 1973; Pfair, Baruah et al. 1996): after any number n of slots a source has had w·n samples to within less than one. Where
w·n is whole it has had exactly that. Nothing is drawn for this: the order within a source is random, and a step's packs mix all.
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
from pipeline.size_rule import SizeRule
from pipeline.steps import SampleTable, ShardRef
from pipeline.streams.corpus_view import CorpusView
from pipeline.streams.sample_stream import DrawRule, Position, SampleStream, ShardSubset

_SLOTS_AHEAD = 64


def mixture_shares(
    sources: Sequence[CorpusView], *, scheduled: Mapping[str, float] | None, samples: Callable[[], Sequence[int]]
) -> tuple[int, ...]:
    """The sources' shares, in the smallest whole numbers that have these proportions.

    They are the `scheduled` weights by name, else the sources' own, else how many `samples` each of them has, times its repeats: then
    every sample is seen equally often, but for repeats.

    Raises ValueError if some sources have weights and others have none, if all weigh nothing, or if the schedule names other sources.
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
            raise ValueError(f"the plan leaves out every sample of corpus {names[counts.index(0)]}: `tim plan` with it alone says why")
        weights = [count * _exact(source.repeats) for count, source in zip(counts, sources, strict=True)]
    else:
        raise ValueError(f"corpus {without[0]} has no weight, others have one: give a weight to all corpora, or to none")
    if not any(weights):
        raise ValueError("all corpora have weight 0: one at least must weigh something")
    scale = math.lcm(*[weight.denominator for weight in weights])
    whole = [int(weight * scale) for weight in weights]
    return tuple(share // math.gcd(*whole) for share in whole)


def _exact(weight: float) -> Fraction:
    """As it was written: 0.7 is 7/10."""
    return Fraction(repr(weight))


def next_slots(shares: Sequence[int], *, mixed: Sequence[int], slots: int) -> Ints:
    """Whose samples come in the next `slots` slots, (slots,), after so many samples of each source were `mixed` in."""
    if len(shares) == 1:
        return np.zeros(slots, dtype=np.int64)
    total, counts = sum(shares), list(mixed)
    before = sum(counts)
    whose: list[int] = []
    for slot in range(before + 1, before + slots + 1):
        first, due = -1, 0
        for source, share in enumerate(shares):
            if counts[source] * total < share * slot:
                own_due = -(-(counts[source] + 1) * total // share)
                if first < 0 or own_due < due:
                    first, due = source, own_due
        whose.append(first)
        counts[first] += 1
    return np.array(whose, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The next slots of the stream: whose they are, their samples, the tokens of the first 1, 2, … of them; and of each source where its
    stream stood before them, and after each of its samples in them."""

    whose: Ints
    samples: SampleTable
    tokens_up_to: Ints
    before: list[Position]
    after: list[Ints]


class Mixture:
    """Samples of several sources as one stream. Its state is where each source stands and how many of its samples were taken.

    `part` says which shards of each source the stream has.
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
        self.places = [
            ShardRef(
                corpus=number,
                shard=position,
                name=source.name,
                tar=shard.path,
                texts=source.corpus.texts(position),
                features_tar=source.corpus.features_tar(position),
            )
            for number, source in enumerate(sources)
            for position, shard in enumerate(source.corpus.shards)
        ]
        first_places = np.cumsum([0, *[len(source.corpus.shards) for source in sources]]).tolist()
        self._streams = [
            SampleStream(source, rule=rule, draw_rule=draw_rule, window=window, first_place=first_place, part=part)
            for source, first_place in zip(sources, first_places, strict=False)
        ]
        self._shares = shares
        self._mixed = [0] * len(sources)  # before the stretch
        self._stretch: _Stretch | None = None
        self._used = 0  # slots of the stretch

    def take(self, *, tokens: int, most: int | None = None) -> SampleTable:
        """The next samples, as many as are needed to hold at least `tokens` tokens together, but no more than `most`.

        Raises ValueError if a source has no sample that may be used.
        """
        assert tokens > 0, tokens
        parts: list[SampleTable] = []
        left = sys.maxsize if most is None else most
        while tokens > 0 and left > 0:
            stretch = self._next_stretch() if self._stretch is None or self._used == len(self._stretch.samples) else self._stretch
            start = self._used
            taken_before = int(stretch.tokens_up_to[start - 1]) if start else 0
            end = min(int(np.searchsorted(stretch.tokens_up_to, taken_before + tokens)) + 1, len(stretch.samples), start + left)
            parts.append(stretch.samples.take(slice(start, end)))
            left -= end - start
            tokens -= int(stretch.tokens_up_to[end - 1]) - taken_before
            self._used = end
        return SampleTable.join(parts)

    def find(self, *, places: Ints, rows: Ints, visits: Ints) -> tuple[SampleTable | None, NDArray[np.bool_]]:
        """Those of the samples at `rows` of the shards `places` that the size rule keeps, and which those are: (n,)."""
        parts: list[SampleTable] = []
        indices: list[Ints] = []
        found = np.zeros(len(places), dtype=bool)
        for number in np.unique(places).tolist():
            asked = np.flatnonzero(places == number)
            place = self.places[number]
            samples, here = self._streams[place.corpus].find(place.shard, rows=rows[asked], visits=visits[asked])
            parts.append(samples)
            indices.append(asked[here])
            found[asked] = here
        if not found.any():
            return None, found
        return SampleTable.join(parts).take(np.argsort(np.concatenate(indices))), found

    def turn(self, *, shares: Sequence[int], rule: SizeRule) -> None:
        """Go on with other shares, counted from here, and another size rule."""
        self.load_state_dict([{**source, "mixed": 0} for source in self.state_dict()])
        self._shares = shares
        for stream in self._streams:
            stream.resize(rule)

    def begin(self, epoch: int) -> None:
        """Start at the beginning of an epoch of every source."""
        self.load_state_dict([{**asdict(Position(epoch=epoch)), "mixed": 0} for _ in self._streams])

    def state_dict(self) -> list[dict[str, int]]:
        """Of each source its `Position`, and how many of its samples were `mixed` in since the shares are what they are."""
        stretch = self._stretch
        if stretch is None:
            return [{**asdict(stream.position), "mixed": mixed} for stream, mixed in zip(self._streams, self._mixed, strict=True)]
        used = np.bincount(stretch.whose[: self._used], minlength=len(self._streams)).tolist()
        return [
            {**asdict(Position(*after[count - 1].tolist()) if count else before), "mixed": mixed + count}
            for count, mixed, before, after in zip(used, self._mixed, stretch.before, stretch.after, strict=True)
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """Continue where `state` was taken."""
        for stream, source in zip(self._streams, state, strict=True):
            stream.position = Position(**{key: value for key, value in source.items() if key != "mixed"})
        self._mixed = [source["mixed"] for source in state]
        self._stretch = None

    def _next_stretch(self) -> _Stretch:
        if self._stretch is not None:
            self._mixed = [source["mixed"] for source in self.state_dict()]
        whose = next_slots(self._shares, mixed=self._mixed, slots=_SLOTS_AHEAD)
        counts = np.bincount(whose, minlength=len(self._streams)).tolist()
        before = [stream.position for stream in self._streams]
        taken = [stream.take(count) if count else None for stream, count in zip(self._streams, counts, strict=True)]
        samples = SampleTable.join([each[0] for each in taken if each is not None])
        if max(counts) < len(whose):
            samples = samples.take(np.argsort(np.argsort(whose, kind="stable")))
        self._stretch = _Stretch(
            whose=whose,
            samples=samples,
            tokens_up_to=np.cumsum(samples.tokens),
            before=before,
            after=[np.zeros((0, 4), dtype=np.int64) if each is None else each[1] for each in taken],
        )
        self._used = 0
        return self._stretch
