"""The parts of a plan: samples with their draws, packs of samples, steps of packs.

A step stores its samples as arrays and creates `PlannedSample` records only for requested packs: every rank plans the whole step, but
reads only its own packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pipeline.cost import Floats, Ints
from pipeline.randomness import Hashes


@dataclass(frozen=True, slots=True)
class Member:
    """Byte offset and length of a sample's file in its tar; offset -1 if the sample has no such file."""

    offset: int
    length: int

    @property
    def exists(self) -> bool:
        return self.offset >= 0


NO_MEMBER = Member(-1, -1)


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A shard of a plan: positions in the planner's corpora and in the corpus's shards, the corpus's name, the paths of the tar, of the
    file with texts and JSON, and of the features ("" if there are none), and the loss weight of the corpus."""

    corpus: int
    shard: int
    name: str
    tar: str
    texts: str
    features_tar: str = ""
    loss_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One image of a step with all its draws. Sizes are (height, width) in pixels, costs as in `pipeline.cost`."""

    id: str  # corpus name / key
    corpus: int  # position in the planner's list of corpora
    shard: int  # position in the corpus's list of shards
    row: int  # position in the shard
    key: str
    tar: str  # path of the shard
    texts: str  # path of the file with `text` and `json`: the shard, or captions of a sidecar
    image: Member
    text: Member
    json: Member
    features_tar: str  # path of the shard's features, "" without
    features: Member
    label: int  # class, -1 without classes or if the condition is dropped
    resize: tuple[int, int]
    height: int
    width: int
    tokens: int
    kind: int
    caption: int  # index of the caption, -1 if the condition is dropped
    flip: bool
    visit: int  # number of times this sample was planned before
    cost: float
    loss_weight: float = 1.0  # of its corpus
    mask: Member = NO_MEMBER


@dataclass(frozen=True, slots=True)
class SampleTable:
    """n samples that the size rule keeps, with their draws, as arrays of length n.

    `shard` is the shard's index over all corpora, `row` the position in it, `visit` the epoch. `members` is (n, 10): offset and length of
    image, text, json, features and mask, offset −1 if a sample has none. `captions` is their number, at least 1; `caption` the drawn one,
    −1 if the condition is dropped. Images of a step get their kinds in the order of `kind_draw`.
    """

    shard: Ints
    row: Ints
    visit: Ints
    key: NDArray[np.object_]
    id_hash: Hashes
    label: Ints
    captions: Ints
    members: Ints
    resize_height: Ints
    resize_width: Ints
    height: Ints
    width: Ints
    tokens: Ints
    kind_draw: Hashes
    caption: Ints
    flip: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: Ints | slice) -> SampleTable:
        """The samples at `indices`, in that order."""
        return SampleTable(*[getattr(self, name)[indices] for name in _FIELDS])

    @staticmethod
    def join(parts: Sequence[SampleTable]) -> SampleTable:
        """Concatenate tables, at least one."""
        if len(parts) == 1:
            return parts[0]
        return SampleTable(*[np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS])


_FIELDS = tuple(field.name for field in fields(SampleTable))


@dataclass(frozen=True, slots=True)
class StepTable:
    """The samples of a step with their kinds, costs and shards."""

    columns: SampleTable
    kinds: Ints
    costs: Floats
    shards: Sequence[ShardRef]

    def split(self, assigned: Ints, *, packs: int, rows: Ints | None = None) -> tuple[Pack, ...]:
        """Split the samples, or those at `rows`, into packs; `assigned` (n,) is the pack of each."""
        by_pack = np.argsort(assigned, kind="stable")
        if rows is not None:
            by_pack = rows[by_pack]
        ends = np.cumsum(np.bincount(assigned, minlength=packs))
        return tuple(
            Pack(rows=own, tokens=int(self.columns.tokens[own].sum()), cost=float(self.costs[own].sum()), table=self)
            for own in np.split(by_pack, ends[:-1])
        )

    def keys(self, rows: Ints) -> list[str]:
        return self.columns.key[rows].tolist()

    def ids(self, rows: Ints) -> list[str]:
        names = [self.shards[shard].name for shard in self.columns.shard[rows].tolist()]
        return [f"{name}/{key}" for name, key in zip(names, self.keys(rows), strict=True)]

    def sample(self, row: int, *, id: str) -> PlannedSample:
        columns = self.columns
        shard = self.shards[columns.shard[row]]
        offsets = columns.members[row].tolist()
        caption = int(columns.caption[row])
        return PlannedSample(
            id=id,
            corpus=shard.corpus,
            shard=shard.shard,
            row=int(columns.row[row]),
            key=columns.key[row],
            tar=shard.tar,
            texts=shard.texts,
            image=Member(offset=offsets[0], length=offsets[1]),
            text=Member(offset=offsets[2], length=offsets[3]),
            json=Member(offset=offsets[4], length=offsets[5]),
            features_tar=shard.features_tar,
            features=Member(offset=offsets[6], length=offsets[7]),
            label=-1 if caption < 0 else int(columns.label[row]),
            resize=(int(columns.resize_height[row]), int(columns.resize_width[row])),
            height=int(columns.height[row]),
            width=int(columns.width[row]),
            tokens=int(columns.tokens[row]),
            kind=int(self.kinds[row]),
            caption=caption,
            flip=bool(columns.flip[row]),
            visit=int(columns.visit[row]),
            cost=float(self.costs[row]),
            loss_weight=shard.loss_weight,
            mask=Member(offset=offsets[8], length=offsets[9]),
        )


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples that run together on one rank, without padding: `rows` of a step's table, with their total tokens and cost."""

    rows: Ints
    tokens: int
    cost: float
    table: StepTable | None

    @classmethod
    def empty(cls) -> Pack:
        return cls(rows=np.zeros(0, dtype=np.int64), tokens=0, cost=0.0, table=None)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> list[str]:
        return [] if self.table is None else self.table.keys(self.rows)

    @property
    def ids(self) -> list[str]:
        return [] if self.table is None else self.table.ids(self.rows)

    @property
    def corpora(self) -> list[int]:
        """Positions in the planner's list of sources."""
        return [] if self.table is None else [self.table.shards[shard].corpus for shard in self.table.columns.shard[self.rows].tolist()]

    @property
    def samples(self) -> tuple[PlannedSample, ...]:
        """Created on every access."""
        if self.table is None:
            return ()
        return tuple(self.table.sample(row, id=id) for row, id in zip(self.rows.tolist(), self.ids, strict=True))


@dataclass(frozen=True, slots=True)
class Step:
    """The packs of one optimizer step over all ranks, and the table of their samples. `tokens_per_pack` is the limit of each pack.

    The packs are ordered by shard group, with the same number for each of the `groups`.
    """

    index: int
    packs: tuple[Pack, ...]
    table: StepTable
    tokens_per_pack: int
    groups: int = 1

    @property
    def images(self) -> int:
        return len(self.table.columns)

    @property
    def tokens(self) -> int:
        return sum(pack.tokens for pack in self.packs)

    @property
    def cost(self) -> float:
        return sum(pack.cost for pack in self.packs)

    @property
    def fill(self) -> float:
        """Used share of the token capacity."""
        return self.tokens / (len(self.packs) * self.tokens_per_pack)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all samples in planned order, pack by pack."""
        return tuple(id for pack in self.packs for id in pack.ids)
