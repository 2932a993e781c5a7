"""From a stream of samples to steps of packs, by metadata alone: which images a step has, how they are drawn and how they are packed.

A step takes what the last one left over, then samples from the stream until its packs are nearly full; gives each its kind by hash
order; spreads them over the packs by cost; and fills what room is left with small images from further down the stream. What finds no
room is carried to the next step, never dropped. Nothing here knows of ranks: `pipeline.dealing` does, after the fact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.account import take_account
from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION, Floats, Ints, image_costs
from pipeline.draws import Hashes
from pipeline.index import Corpus
from pipeline.mixture import Mixture, mixture_shares
from pipeline.packing import NO_ROOM, assign, even_out, fill_holes
from pipeline.plan import PlanConfig
from pipeline.source import Source
from pipeline.steps import Columns, Pack, PlannedSample, Step, StepTable
from pipeline.stream import DrawRule
from pipeline.tags import TagShuffle

__all__ = ["CONSISTENCY", "DIFFUSION", "TRANSITION", "Pack", "PlanConfig", "PlannedSample", "Planner", "Step"]

FORMAT = 2
_PATIENCE = 2  # a sample left over so many times is packed before others, the longest waiting first
_MOST_CARRIED = 1000  # samples that may be left over, so that a state stays small
_LOOK_AHEAD = 2  # samples a pack, those left over included, that are looked at to fill what room is left


class Planner:
    """The endless, seeded, resumable sequence of steps over one or more corpora.

    Args:
        corpora: what to train on; what a corpus has of further settings (weight, repeats, cap, where, exclude) stands in a `Source`.
        plan: the plan section, with its stride.
        seed: every draw of the plan follows from it.
        width: the network's width, for the cost of attention.
        diffusion_share, consistency_share: shares of images with r = t and with r = 0; the rest has r < t.
        caption_dropout: share of images whose caption or class is dropped.
        caption_weights: relative weights of a sample's 1st, 2nd, … caption; further ones weigh as much as the last.
        shuffle_tags: how captions are shuffled that are lists of tags.

    Raises ValueError for an impossible plan, in one line.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus | Source],
        *,
        plan: PlanConfig,
        seed: int,
        width: int,
        diffusion_share: float,
        consistency_share: float,
        caption_dropout: float = 0.0,
        caption_weights: Sequence[float] = (1.0,),
        shuffle_tags: TagShuffle | None = None,
    ) -> None:
        self.sources = tuple(corpus if isinstance(corpus, Source) else Source(corpus) for corpus in corpora)
        self.corpora = tuple(source.corpus for source in self.sources)
        names = [corpus.name for corpus in self.corpora]
        if not any(corpus.count for corpus in self.corpora):
            raise ValueError("there is nothing to plan: " + (f"corpus {names[0]} has no samples" if names else "no corpus is given"))
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two corpora are named '{twice}': give one of them another name, ids of samples begin with it")
        if plan.stride is None:
            raise ValueError("plan.stride is not known: it is the codec's pixels per latent cell times the network's patch size")
        if min(diffusion_share, consistency_share) < 0 or diffusion_share + consistency_share > 1:
            raise ValueError(
                f"diffusion_share {diffusion_share} and consistency_share {consistency_share} must be at least 0 and at most 1 together"
            )
        without_features = [corpus.name for corpus in self.corpora if corpus.features is None]
        if 0 < len(without_features) < len(names):
            raise ValueError(f"corpus {without_features[0]} has no features and another has: give them for all corpora or for none")
        if shuffle_tags is not None and not without_features:
            raise ValueError("text.shuffle_tags: the captions in the corpus's features are encoded as they are: leave one of them out")
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout {caption_dropout} is not a share between 0 and 1")
        if not caption_weights or min(caption_weights) < 0 or max(caption_weights) == 0:
            raise ValueError(f"caption_weights {list(caption_weights)} must be at least 0, and one of them above")
        self.plan = plan
        self.stride = plan.stride
        self.seed = seed
        self.width = width
        self.shuffle_tags = shuffle_tags
        self._shares = (diffusion_share, consistency_share)
        self._accounts: dict[int, dict[str, Any]] = {}
        self._stages = {first: (plan.at(first), self._mixture_shares(first)) for first in (0, *(stage.step for stage in plan.schedule))}
        self._now, shares = self._stages[0]
        for corpus in self.corpora:
            corpus.check_features(rules=[now.size_rule for now, _ in self._stages.values()], flips=plan.flip > 0)
        self._mixture = Mixture(
            self.sources,
            shares=shares,
            rule=self._now.size_rule,
            draw_rule=DrawRule(seed=seed, caption_dropout=caption_dropout, caption_weights=tuple(caption_weights), flip=plan.flip),
            window=plan.window,
        )
        self._step = 0
        self._carried: Columns | None = None
        self._waited = np.zeros(0, dtype=np.int64)
        self._inputs: dict[str, Any] = {
            "corpora": [source.identity for source in self.sources],
            "seed": seed,
            "width": width,
            "diffusion_share": diffusion_share,
            "consistency_share": consistency_share,
            "caption_dropout": caption_dropout,
            "caption_weights": list(caption_weights),
            "shuffle_tags": None if shuffle_tags is None else asdict(shuffle_tags),
            **{f"plan.{key}": value for key, value in plan.model_dump(mode="json").items()},
        }
        self.plan_hash = hashlib.sha256(json.dumps([FORMAT, self._inputs], sort_keys=True).encode()).hexdigest()

    def next_step(self) -> Step:
        """Plan one step more. Raises ValueError if a table cannot be read, or if the plan leaves every sample of a corpus out."""
        if self._step in self._stages and self._step:
            self._enter(self._step)
            self._carry(self._carried_places())
        before = self._mixture.state_dict()
        wanted = max(1, int(self._capacity * (1 - self._slack)))
        while True:
            samples, waited, assigned = self._filled(wanted)
            placed = assigned != NO_ROOM
            left = np.flatnonzero(~placed)
            too_many = left[_MOST_CARRIED:]
            if not len(too_many):
                break
            wanted -= int(samples.tokens[too_many].sum())  # images that fit badly: begin again with fewer of them
            self._mixture.load_state_dict(before)
        self._carried, self._waited = (samples.take(left), waited[left] + 1) if len(left) else (None, waited[left])
        step = self._make_step(samples.take(np.flatnonzero(placed)) if len(left) else samples, assigned=assigned[placed])
        self._step += 1
        return step

    def state_dict(self) -> dict[str, Any]:
        """Where the plan stands, before its next step: JSON-able, small, the same on every rank."""
        return {
            "format": FORMAT,
            "plan_hash": self.plan_hash,
            "inputs": self._inputs,
            "step": self._step,
            "sources": self._mixture.state_dict(),
            "carried": self._carried_places().tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError if it is of another plan, naming what differs."""
        if state.get("format") != FORMAT:
            raise ValueError(f"the saved plan is of format {state.get('format')!r}, this version of tim reads format {FORMAT}")
        if state["plan_hash"] != self.plan_hash:
            saved = state["inputs"]
            differing = [key for key in sorted({*saved, *self._inputs}) if saved.get(key) != self._inputs.get(key)]
            changes = ", ".join(f"{key} was {saved.get(key)!r} and is {self._inputs.get(key)!r}" for key in differing)
            raise ValueError(f"the saved state is of another plan: {changes}; go on with what was saved, or start a new run")
        self._step = state["step"]
        self._enter(max(self._step - 1, 0))
        self._mixture.load_state_dict(state["sources"])
        self._carry(np.asarray(state["carried"], dtype=np.int64).reshape(-1, 4))

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The schedule: from which step on which limits hold, and the corpora's shares of the images."""
        return [
            {
                "step": first,
                "max_tokens": plan.max_tokens,
                "packs_per_step": plan.packs_per_step,
                "shares": {corpus.name: share / sum(shares) for corpus, share in zip(self.corpora, shares, strict=True)},
            }
            for first, (plan, shares) in self._stages.items()
        ]

    @property
    def account(self) -> dict[str, Any]:
        """What the plan makes of every sample (`pipeline.account`), in its present stage. Reads all sizes of the corpora once."""
        return self._account(self._now)

    def _account(self, plan: PlanConfig) -> dict[str, Any]:
        if plan.max_tokens not in self._accounts:
            self._accounts[plan.max_tokens] = take_account(self.sources, rule=plan.size_rule)
        return self._accounts[plan.max_tokens]

    def _mixture_shares(self, step: int) -> tuple[int, ...]:
        def samples() -> list[int]:
            return [corpus["samples"] for corpus in self._account(self.plan.at(0))["corpora"]]

        return mixture_shares(self.sources, scheduled=self.plan.weights_at(step), samples=samples)

    def _enter(self, step: int) -> None:
        """Plan as the schedule says for `step`."""
        self._now, shares = self._stages[max(first for first in self._stages if first <= step)]
        self._mixture.turn(shares=shares, rule=self._now.size_rule)

    def _carried_places(self) -> Ints:
        """(n, 4): shard, row, visit of what was left over, and how often."""
        if self._carried is None:
            return np.zeros((0, 4), dtype=np.int64)
        return np.stack([self._carried.place, self._carried.row, self._carried.visit, self._waited], axis=1)

    def _carry(self, places: Ints) -> None:
        """Have samples left over, except those that the size rule of this stage leaves out."""
        self._carried, found = self._mixture.find(places=places[:, 0], rows=places[:, 1], visits=places[:, 2])
        self._waited = places[found, 3]

    @property
    def _capacity(self) -> int:
        return self._now.packs_per_step * self._now.tokens_per_pack

    @property
    def _slack(self) -> float:
        """The share of token room that is not filled at first, so that packs can be balanced by cost.

        Where one image can fill a good part of a pack, cost balance needs more freedom, and an unfilled token costs nothing under
        variable-length attention (measured: DESIGN's four size mixes keep 94 to 99 % of 64 ranks busy at 0.94, 1 to 6 % fewer at 0.985).
        """
        return 0.02 if self._now.max_tokens * 4 <= self.plan.tokens_per_pack else 0.06

    def _filled(self, wanted: int) -> tuple[Columns, Ints, Ints]:
        """Samples of at least `wanted` tokens and those looked at to fill room: samples, how often each was left over, their packs."""
        samples, waited = self._core(wanted)
        assigned = self._balanced(samples, waited=waited)
        room = self._capacity - int(samples.tokens[assigned != NO_ROOM].sum())
        if room > self._capacity * self._slack:
            samples, assigned = self._with_fillers(samples, assigned=assigned)
            waited = np.concatenate([waited, np.zeros(len(samples) - len(waited), dtype=np.int64)])
        return samples, waited, assigned

    def _core(self, wanted: int) -> tuple[Columns, Ints]:
        """What was left over, then the stream, until there are `wanted` tokens: samples, and how often each was left over."""
        parts = [] if self._carried is None else [self._carried]
        missing = wanted - sum(int(part.tokens.sum()) for part in parts)
        if missing > 0:
            parts.append(self._mixture.take(tokens=missing))
        samples = Columns.join(parts)
        waited = np.zeros(len(samples), dtype=np.int64)
        waited[: len(self._waited)] = self._waited
        return samples, waited

    def _balanced(self, samples: Columns, *, waited: Ints) -> Ints:
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

    def _with_fillers(self, samples: Columns, *, assigned: Ints) -> tuple[Columns, Ints]:
        """Fill the room that is left with what was left over and with samples further down the stream: all samples, their packs."""
        placed = assigned != NO_ROOM
        used = np.bincount(assigned[placed], weights=samples.tokens[placed], minlength=self._now.packs_per_step)
        missing = _LOOK_AHEAD * self._now.packs_per_step * (int(samples.tokens.mean()) + 1) - int(samples.tokens[~placed].sum())
        packs = assigned.copy()
        most = _MOST_CARRIED - int((~placed).sum())
        if missing > 0 and most > 0:
            ahead = self._mixture.take(tokens=missing, most=most)
            samples = Columns.join([samples, ahead])
            packs = np.concatenate([packs, np.full(len(ahead), NO_ROOM)])
        unplaced = np.flatnonzero(packs == NO_ROOM)
        packs[unplaced] = fill_holes(samples.tokens[unplaced], room=self.plan.tokens_per_pack - used.astype(np.int64))
        return samples, packs

    def _assign(self, samples: Columns, *, rows: Ints, urgency: Ints) -> Ints:
        tokens = samples.tokens[rows]
        costs = self._costs(tokens, kinds=self._kinds(samples.kind_draw[rows]))
        return assign(tokens, costs=costs, urgency=urgency, packs=self._now.packs_per_step, tokens_per_pack=self.plan.tokens_per_pack)

    def _kinds(self, kind_draws: Hashes) -> Ints:
        """In the order of their draws the first round(share · n) have r = t, the next r = 0, the rest r < t."""
        count = len(kind_draws)
        in_order = np.argsort(kind_draws, kind="stable")
        diffusion = int(self._shares[0] * count + 0.5)
        consistency = min(int(self._shares[1] * count + 0.5), count - diffusion)
        kinds = np.full(count, TRANSITION)
        kinds[in_order[: diffusion + consistency]] = CONSISTENCY
        kinds[in_order[:diffusion]] = DIFFUSION
        return kinds

    def _costs(self, tokens: Ints, *, kinds: Ints) -> Floats:
        return image_costs(tokens, kinds=kinds, gamma=self.plan.gamma, width=self.width, factors=self.plan.cost_factors)

    def _make_step(self, samples: Columns, *, assigned: Ints) -> Step:
        kinds = self._kinds(samples.kind_draw)
        costs = self._costs(samples.tokens, kinds=kinds)
        assigned = even_out(
            assigned,
            tokens=samples.tokens,
            costs=costs,
            packs=self._now.packs_per_step,
            tokens_per_pack=self.plan.tokens_per_pack,
        )
        table = StepTable(columns=samples, kinds=kinds, costs=costs, places=self._mixture.places)
        packs = table.split(assigned, packs=self._now.packs_per_step)
        return Step(index=self._step, packs=packs, table=table, tokens_per_pack=self.plan.tokens_per_pack)
