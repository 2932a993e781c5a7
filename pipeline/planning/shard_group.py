"""Select and pack the images of a step from one group of shards.

A group takes the samples carried over from the last step, then samples from its stream until its packs are nearly full; assigns kinds by
hash order; distributes the images over the packs by cost; and fills the remaining room with small images from further down the stream.
Images without room are carried to the next step, never dropped. A plan has one group of all shards, or several (`plan.groups`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION, Floats, Ints, image_costs
from pipeline.packing.packing import NO_ROOM, assign_to_packs, even_out, fill_holes
from pipeline.planned_steps import SampleTable
from pipeline.planning.config import PlanConfig
from pipeline.randomness import Hashes
from pipeline.streams.mixture import Mixture

_PATIENCE = 2  # samples carried over this often are packed before others, the longest waiting first
_MAX_CARRIED = 1000  # limit of carried samples over all groups, so that the state stays small
_LOOK_AHEAD = 2  # candidates per pack for the remaining room, unplaced samples included


class Packed(NamedTuple):
    """The n images of a group's packs: their kinds, costs and packs, each (n,)."""

    samples: SampleTable
    kinds: Ints
    costs: Floats
    packs: Ints


class ShardGroup:
    """The endless sequence of one group's packs.

    Args:
        mixture: the group's samples.
        plan: the plan section in the first step.
        width: the network's width, for the cost of attention.
        kind_shares: shares of images with r = t and with r = 0.
    """

    def __init__(self, mixture: Mixture, *, plan: PlanConfig, width: int, kind_shares: tuple[float, float]) -> None:
        self.shards = mixture.shards
        self._mixture = mixture
        self._plan = plan
        self._width = width
        self._kind_shares = kind_shares
        self._carried: SampleTable | None = None
        self._waited = np.zeros(0, dtype=np.int64)

    def next_packs(self) -> Packed:
        """The images of the group's packs in the next step."""
        before = self._mixture.state_dict()
        wanted = max(1, int(self._capacity * (1 - self._slack)))
        while True:
            samples, waited, assigned = self._fill_packs(wanted)
            placed = assigned != NO_ROOM
            left = np.flatnonzero(~placed)
            too_many = left[self._max_carried :]
            if not len(too_many):
                break
            wanted -= int(samples.tokens[too_many].sum())  # too many images do not fit: retry with fewer
            self._mixture.load_state_dict(before)
        self._carried, self._waited = (samples.take(left), waited[left] + 1) if len(left) else (None, waited[left])
        return self._even_out(samples.take(np.flatnonzero(placed)) if len(left) else samples, assigned=assigned[placed])

    def enter(self, plan: PlanConfig, *, shares: Sequence[int], kind_shares: tuple[float, float]) -> None:
        """Switch to another stage, with its shares of sources and kinds."""
        self._plan = plan
        self._kind_shares = kind_shares
        self._mixture.change(shares=shares, rule=plan.size_rule)
        self._carry(self._carried_rows())

    def state_dict(self) -> dict[str, Any]:
        """Positions of the sources, and carried samples: shard, row, visit, and how often each was carried over."""
        return {"sources": self._mixture.state_dict(), "carried": self._carried_rows().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mixture.load_state_dict(state["sources"])
        self._carry(np.asarray(state["carried"], dtype=np.int64).reshape(-1, 4))

    def begin(self, epoch: int) -> None:
        """Start at the beginning of an epoch of every source, without carried samples."""
        self._mixture.begin(epoch)
        self._carried, self._waited = None, np.zeros(0, dtype=np.int64)

    def _carried_rows(self) -> Ints:
        """(n, 4), as in the state."""
        if self._carried is None:
            return np.zeros((0, 4), dtype=np.int64)
        return np.stack([self._carried.shard, self._carried.row, self._carried.visit, self._waited], axis=1)

    def _carry(self, carried: Ints) -> None:
        """Restore carried samples, except those that the size rule of this stage leaves out."""
        self._carried, kept = self._mixture.find(shards=carried[:, 0], rows=carried[:, 1], visits=carried[:, 2])
        self._waited = carried[kept, 3]

    @property
    def _packs(self) -> int:
        return self._plan.packs_per_step // self._plan.groups

    @property
    def _capacity(self) -> int:
        return self._packs * self._plan.tokens_per_pack

    @property
    def _max_carried(self) -> int:
        return _MAX_CARRIED // self._plan.groups

    @property
    def _slack(self) -> float:
        """Share of the token capacity that is not filled at first, so that packs can be balanced by cost.

        If one image can fill a large part of a pack, balancing needs more freedom, and an unfilled token costs nothing under
        variable-length attention (docs/benchmarks.md: 94 to 99 % of 64 ranks are busy at 0.94, 1 to 6 % fewer at 0.985).
        """
        return 0.02 if self._plan.max_tokens * 4 <= self._plan.tokens_per_pack else 0.06

    def _fill_packs(self, wanted: int) -> tuple[SampleTable, Ints, Ints]:
        """Samples of at least `wanted` tokens plus fillers: samples, how often each was carried over, their packs."""
        samples, waited = self._take(wanted)
        assigned = self._balance(samples, waited=waited)
        room = self._capacity - int(samples.tokens[assigned != NO_ROOM].sum())
        if room > self._capacity * self._slack:
            samples, assigned = self._with_fillers(samples, assigned=assigned)
            waited = np.concatenate([waited, np.zeros(len(samples) - len(waited), dtype=np.int64)])
        return samples, waited, assigned

    def _take(self, wanted: int) -> tuple[SampleTable, Ints]:
        """Carried samples, then the stream, up to `wanted` tokens: samples, and how often each was carried over."""
        parts = [] if self._carried is None else [self._carried]
        missing = wanted - sum(int(part.tokens.sum()) for part in parts)
        if missing > 0:
            parts.append(self._mixture.take(tokens=missing))
        samples = SampleTable.join(parts)
        waited = np.zeros(len(samples), dtype=np.int64)
        waited[: len(self._waited)] = self._waited
        return samples, waited

    def _balance(self, samples: SampleTable, *, waited: Ints) -> Ints:
        """Assign samples to packs by cost, `NO_ROOM` for those that have to wait.

        Kinds depend on the number of images in a step, costs on kinds, and what fits on costs: repeated until everything fits.
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
        """Fill the remaining room with unplaced samples and with samples further down the stream: all samples, their packs."""
        placed = assigned != NO_ROOM
        used = np.bincount(assigned[placed], weights=samples.tokens[placed], minlength=self._packs)
        missing = _LOOK_AHEAD * self._packs * (int(samples.tokens.mean()) + 1) - int(samples.tokens[~placed].sum())
        packs = assigned.copy()
        limit = self._max_carried - int((~placed).sum())
        if missing > 0 and limit > 0:
            ahead = self._mixture.take(tokens=missing, limit=limit)
            samples = SampleTable.join([samples, ahead])
            packs = np.concatenate([packs, np.full(len(ahead), NO_ROOM)])
        unplaced = np.flatnonzero(packs == NO_ROOM)
        packs[unplaced] = fill_holes(samples.tokens[unplaced], room=self._plan.tokens_per_pack - used.astype(np.int64))
        return samples, packs

    def _assign(self, samples: SampleTable, *, rows: Ints, urgency: Ints) -> Ints:
        tokens = samples.tokens[rows]
        costs = self._costs(tokens, kinds=self._kinds(samples.kind_draw[rows]))
        return assign_to_packs(tokens, costs=costs, urgency=urgency, packs=self._packs, tokens_per_pack=self._plan.tokens_per_pack)

    def _kinds(self, kind_draws: Hashes) -> Ints:
        """Kinds by order of the draws: the first round(share · n) get r = t, the next r = 0, the rest r < t."""
        count = len(kind_draws)
        in_order = np.argsort(kind_draws, kind="stable")
        diffusion = int(self._kind_shares[0] * count + 0.5)
        consistency = min(int(self._kind_shares[1] * count + 0.5), count - diffusion)
        kinds = np.full(count, TRANSITION)
        kinds[in_order[: diffusion + consistency]] = CONSISTENCY
        kinds[in_order[:diffusion]] = DIFFUSION
        return kinds

    def _costs(self, tokens: Ints, *, kinds: Ints) -> Floats:
        return image_costs(tokens, kinds=kinds, gamma=self._plan.gamma, width=self._width, factors=self._plan.cost_factors)

    def _even_out(self, samples: SampleTable, *, assigned: Ints) -> Packed:
        kinds = self._kinds(samples.kind_draw)
        costs = self._costs(samples.tokens, kinds=kinds)
        packs = even_out(assigned, tokens=samples.tokens, costs=costs, packs=self._packs, tokens_per_pack=self._plan.tokens_per_pack)
        return Packed(samples=samples, kinds=kinds, costs=costs, packs=packs)
