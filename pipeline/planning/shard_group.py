"""The packs that a step takes from one group of shards: which images they have, how they are drawn and how they are packed.

A group takes what the last step left over, then samples from its stream until its packs are nearly full; gives each its kind by hash
order; spreads them over the packs by cost; and fills what room is left with small images from further down the stream. What finds no
room is carried to the next step, never dropped. A plan has one group of all shards, or one for each part of a cluster (`plan.groups`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION, Floats, Ints, image_costs
from pipeline.packing.packing import NO_ROOM, assign_to_packs, even_out, fill_holes
from pipeline.planning.config import PlanConfig
from pipeline.randomness import Hashes
from pipeline.steps import SampleTable
from pipeline.streams.mixture import Mixture

_PATIENCE = 2  # a sample left over so many times is packed before others, the longest waiting first
_MAX_CARRIED = 1000  # samples that all groups together may leave over, so that a state stays small
_LOOK_AHEAD = 2  # samples a pack, those left over included, that are looked at to fill what room is left


class Packed(NamedTuple):
    """The n images of a group's packs: their kinds, costs and packs, each (n,)."""

    samples: SampleTable
    kinds: Ints
    costs: Floats
    packs: Ints


class ShardGroup:
    """The endless sequence of one group's packs.

    Args:
        mixture: its samples.
        plan: the plan section as it stands in the first step.
        width: the network's width, for the cost of attention.
        kind_shares: shares of images with r = t and with r = 0.
    """

    def __init__(self, mixture: Mixture, *, plan: PlanConfig, width: int, kind_shares: tuple[float, float]) -> None:
        self.places = mixture.places
        self._mixture = mixture
        self._now = plan
        self._width = width
        self._kind_shares = kind_shares
        self._carried: SampleTable | None = None
        self._waited = np.zeros(0, dtype=np.int64)

    def next_packs(self) -> Packed:
        """The images of the group's packs of one step more."""
        before = self._mixture.state_dict()
        wanted = max(1, int(self._capacity * (1 - self._slack)))
        while True:
            samples, waited, assigned = self._filled(wanted)
            placed = assigned != NO_ROOM
            left = np.flatnonzero(~placed)
            too_many = left[self._most_carried :]
            if not len(too_many):
                break
            wanted -= int(samples.tokens[too_many].sum())  # images that fit badly: begin again with fewer of them
            self._mixture.load_state_dict(before)
        self._carried, self._waited = (samples.take(left), waited[left] + 1) if len(left) else (None, waited[left])
        return self._evened(samples.take(np.flatnonzero(placed)) if len(left) else samples, assigned=assigned[placed])

    def enter(self, plan: PlanConfig, *, shares: Sequence[int], kind_shares: tuple[float, float]) -> None:
        """Go on by the plan of another stage, with other shares of the sources and of the kinds."""
        self._now = plan
        self._kind_shares = kind_shares
        self._mixture.turn(shares=shares, rule=plan.size_rule)
        self._carry(self._carried_places())

    def state_dict(self) -> dict[str, Any]:
        """Where the sources stand, and what is carried: shard, row, visit of each sample, and how often it was left over."""
        return {"sources": self._mixture.state_dict(), "carried": self._carried_places().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mixture.load_state_dict(state["sources"])
        self._carry(np.asarray(state["carried"], dtype=np.int64).reshape(-1, 4))

    def begin(self, epoch: int) -> None:
        """Start at the beginning of an epoch of every source, with nothing left over."""
        self._mixture.begin(epoch)
        self._carried, self._waited = None, np.zeros(0, dtype=np.int64)

    def _carried_places(self) -> Ints:
        """(n, 4), as in the state."""
        if self._carried is None:
            return np.zeros((0, 4), dtype=np.int64)
        return np.stack([self._carried.place, self._carried.row, self._carried.visit, self._waited], axis=1)

    def _carry(self, places: Ints) -> None:
        """Have samples left over, except those that the size rule of this stage leaves out."""
        self._carried, found = self._mixture.find(places=places[:, 0], rows=places[:, 1], visits=places[:, 2])
        self._waited = places[found, 3]

    @property
    def _packs(self) -> int:
        return self._now.packs_per_step // self._now.groups

    @property
    def _capacity(self) -> int:
        return self._packs * self._now.tokens_per_pack

    @property
    def _most_carried(self) -> int:
        return _MAX_CARRIED // self._now.groups

    @property
    def _slack(self) -> float:
        """The share of token room that is not filled at first, so that packs can be balanced by cost.

        Where one image can fill a good part of a pack, cost balance needs more freedom, and an unfilled token costs nothing under
        variable-length attention (docs/benchmarks.md: 94 to 99 % of 64 ranks are busy at 0.94, 1 to 6 % fewer at 0.985).
        """
        return 0.02 if self._now.max_tokens * 4 <= self._now.tokens_per_pack else 0.06

    def _filled(self, wanted: int) -> tuple[SampleTable, Ints, Ints]:
        """Samples of at least `wanted` tokens and those looked at to fill room: samples, how often each was left over, their packs."""
        samples, waited = self._core(wanted)
        assigned = self._balanced(samples, waited=waited)
        room = self._capacity - int(samples.tokens[assigned != NO_ROOM].sum())
        if room > self._capacity * self._slack:
            samples, assigned = self._with_fillers(samples, assigned=assigned)
            waited = np.concatenate([waited, np.zeros(len(samples) - len(waited), dtype=np.int64)])
        return samples, waited, assigned

    def _core(self, wanted: int) -> tuple[SampleTable, Ints]:
        """What was left over, then the stream, until there are `wanted` tokens: samples, and how often each was left over."""
        parts = [] if self._carried is None else [self._carried]
        missing = wanted - sum(int(part.tokens.sum()) for part in parts)
        if missing > 0:
            parts.append(self._mixture.take(tokens=missing))
        samples = SampleTable.join(parts)
        waited = np.zeros(len(samples), dtype=np.int64)
        waited[: len(self._waited)] = self._waited
        return samples, waited

    def _balanced(self, samples: SampleTable, *, waited: Ints) -> Ints:
        """The packs of samples spread by cost, `NO_ROOM` for those that have to wait.

        Kinds depend on how many images a step has, costs on kinds, and what fits on costs: repeated until everything fits.
        """
        kept = np.arange(len(samples))
        while True:
            assigned = self._assign(samples, rows=kept, urgency=np.where(waited >= _PATIENCE, waited, 0)[kept])
            fits = assigned != NO_ROOM
            if fits.all():
                packs = np.full(len(samples), NO_ROOM)
                packs[kept] = assigned
                return packs
            kept = kept[fits]

    def _with_fillers(self, samples: SampleTable, *, assigned: Ints) -> tuple[SampleTable, Ints]:
        """Fill the room that is left with what was left over and with samples further down the stream: all samples, their packs."""
        placed = assigned != NO_ROOM
        used = np.bincount(assigned[placed], weights=samples.tokens[placed], minlength=self._packs)
        missing = _LOOK_AHEAD * self._packs * (int(samples.tokens.mean()) + 1) - int(samples.tokens[~placed].sum())
        packs = assigned.copy()
        most = self._most_carried - int((~placed).sum())
        if missing > 0 and most > 0:
            ahead = self._mixture.take(tokens=missing, most=most)
            samples = SampleTable.join([samples, ahead])
            packs = np.concatenate([packs, np.full(len(ahead), NO_ROOM)])
        unplaced = np.flatnonzero(packs == NO_ROOM)
        packs[unplaced] = fill_holes(samples.tokens[unplaced], room=self._now.tokens_per_pack - used.astype(np.int64))
        return samples, packs

    def _assign(self, samples: SampleTable, *, rows: Ints, urgency: Ints) -> Ints:
        tokens = samples.tokens[rows]
        costs = self._costs(tokens, kinds=self._kinds(samples.kind_draw[rows]))
        return assign_to_packs(tokens, costs=costs, urgency=urgency, packs=self._packs, tokens_per_pack=self._now.tokens_per_pack)

    def _kinds(self, kind_draws: Hashes) -> Ints:
        """In the order of their draws the first round(share · n) have r = t, the next r = 0, the rest r < t."""
        count = len(kind_draws)
        in_order = np.argsort(kind_draws, kind="stable")
        diffusion = int(self._kind_shares[0] * count + 0.5)
        consistency = min(int(self._kind_shares[1] * count + 0.5), count - diffusion)
        kinds = np.full(count, TRANSITION)
        kinds[in_order[: diffusion + consistency]] = CONSISTENCY
        kinds[in_order[:diffusion]] = DIFFUSION
        return kinds

    def _costs(self, tokens: Ints, *, kinds: Ints) -> Floats:
        return image_costs(tokens, kinds=kinds, gamma=self._now.gamma, width=self._width, factors=self._now.cost_factors)

    def _evened(self, samples: SampleTable, *, assigned: Ints) -> Packed:
        kinds = self._kinds(samples.kind_draw)
        costs = self._costs(samples.tokens, kinds=kinds)
        packs = even_out(assigned, tokens=samples.tokens, costs=costs, packs=self._packs, tokens_per_pack=self._now.tokens_per_pack)
        return Packed(samples=samples, kinds=kinds, costs=costs, packs=packs)
