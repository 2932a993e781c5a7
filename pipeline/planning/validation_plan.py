"""The images of a validation, in packs. They depend on the corpora, the sizes and a limit, not on ranks or the training plan's seed.

Shards are visited in an order by hash until they have given enough images, so that a large corpus is not read as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cost import TRANSITION, Floats, Ints, image_costs
from pipeline.packing.packing import NO_ROOM, assign_to_packs
from pipeline.planned_steps import Pack, SampleTable, Step, StepTable
from pipeline.planning.config import PlanConfig
from pipeline.randomness import hash_ids
from pipeline.streams.corpus_view import CorpusView, validation_draws
from pipeline.streams.mixture import Mixture
from pipeline.streams.sample_stream import DrawRule, ShardSubset


class ValidationPlan:
    """The packs of a validation for `pipeline.loading.loader.Loader`: one for each rank in each of `steps` steps, empty ones at the end.

    The packs are the same for any number of ranks. Every image has its first caption and is not mirrored.

    Args:
        sources: the held-out parts of corpora, or corpora that are not trained on.
        plan: limits of images and packs, with the stride.
        width: the network's width, for the cost of attention.
        images: use at most so many.
        ranks: their number.

    Raises ValueError if there are no images.
    """

    shuffle_tags = None

    def __init__(self, sources: Sequence[CorpusView], *, plan: PlanConfig, width: int, images: int, ranks: int) -> None:
        assert plan.stride is not None
        self.sources = tuple(sources)
        self.corpora = tuple(source.corpus for source in sources)
        self.plan = plan.model_copy(update={"packs_per_step": ranks, "schedule": (), "groups": 1})
        self.stride = plan.stride
        mixture = Mixture(
            sources,
            shares=(1,) * len(sources),
            rule=plan.size_rule,
            draw_rule=DrawRule(seed=0),
            window=1,
            part=ShardSubset(),
        )
        samples = self._choose(mixture, images=images)
        costs = image_costs(samples.tokens, kinds=np.full(len(samples), TRANSITION), gamma=plan.gamma, width=width)
        assigned = _in_packs(samples.tokens, costs=costs, tokens_per_pack=plan.tokens_per_pack)
        self._table = StepTable(columns=samples, kinds=np.full(len(samples), TRANSITION), costs=costs, shards=mixture.shards)
        self.packs = sorted(self._table.split(assigned, packs=int(assigned.max()) + 1), key=lambda pack: -pack.cost)
        self.steps = -(-len(self.packs) // ranks)
        self._step = 0

    @property
    def images(self) -> int:
        return len(self._table.columns)

    def next_step(self) -> Step:
        """The next pack of each rank; empty packs after the last."""
        ranks = self.plan.packs_per_step
        packs = self.packs[self._step * ranks : (self._step + 1) * ranks]
        packs = (*packs, *[Pack.empty()] * (ranks - len(packs)))
        self._step += 1
        return Step(index=self._step - 1, packs=packs, table=self._table, tokens_per_pack=self.plan.tokens_per_pack)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    def _choose(self, mixture: Mixture, *, images: int) -> SampleTable:
        """The first images by shard, then by draw."""
        shards = hash_ids([f"{shard.name}/{shard.shard}" for shard in mixture.shards])
        parts: list[SampleTable] = []
        missing = images
        for number in np.argsort(validation_draws(shards), kind="stable").tolist():
            samples = mixture.kept(number)
            in_order = np.argsort(validation_draws(samples.id_hash), kind="stable")
            parts.append(samples.take(in_order[:missing]))
            missing -= len(parts[-1])
            if not missing:
                break
        if missing == images:
            names, rows = ", ".join(source.name for source in self.sources), sum(corpus.count for corpus in self.corpora)
            raise ValueError(
                f"validation: none of the {rows} samples of {names} is selected: raise validation.share, or relax plan's limits"
            )
        return SampleTable.join(parts)


def _in_packs(tokens: Ints, *, costs: Floats, tokens_per_pack: int) -> Ints:
    """The pack of each image, (n,): as few packs of nearly equal cost as hold all images."""
    packs = -(-int(tokens.sum()) // tokens_per_pack)
    while True:
        urgency = np.zeros_like(tokens)
        assigned = assign_to_packs(tokens, costs=costs, urgency=urgency, packs=packs, tokens_per_pack=tokens_per_pack)
        if not (assigned == NO_ROOM).any():
            return assigned
        packs += 1
