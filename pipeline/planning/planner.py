"""Plan steps of packs from the metadata of corpora: checks a plan, follows its schedule and keeps its state.

`pipeline.planning.shard_group` selects and packs the images of a step, from all shards or, with `plan.groups`, from each group of shards.
The plan does not depend on ranks: `pipeline.packing.rank_assignment` assigns packs to ranks afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.tags import TagShuffle
from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION
from pipeline.digests import json_digest
from pipeline.planned_steps import Pack, PlannedSample, SampleTable, Step, StepTable
from pipeline.planning.config import PlanConfig
from pipeline.planning.plan_changes import PlanChange, PlanChangedError, counts_of, loss_weight_changes, loss_weights_of, plan_changes
from pipeline.planning.plan_statistics import count_samples
from pipeline.planning.shard_group import ShardGroup
from pipeline.streams.corpus_view import CorpusView
from pipeline.streams.mixture import Mixture, mixture_shares
from pipeline.streams.sample_stream import DrawRule, ShardSubset

__all__ = ["CONSISTENCY", "DIFFUSION", "TRANSITION", "Pack", "PlanConfig", "PlannedSample", "Planner", "Step"]

FORMAT = 3


class _Stage(NamedTuple):
    """Settings from a step on. shares: of the corpora, integers; kind_shares: of images with r = t and with r = 0."""

    plan: PlanConfig
    shares: tuple[int, ...]
    kind_shares: tuple[float, float]


class Planner:
    """The endless, seeded, resumable sequence of steps over one or more corpora.

    Args:
        corpora: the training data; a `CorpusView` adds weight, repeats, cap, where, exclude and loss_weight to a corpus.
        plan: the plan section, with its stride.
        seed: determines every draw of the plan.
        width: the network's width, for the cost of attention.
        diffusion_share, consistency_share: initial shares of images with r = t and with r = 0; the rest has r < t.
        caption_dropout: share of images whose caption or class is dropped.
        caption_weights: relative weights of a sample's 1st, 2nd, … caption; the last weight applies to all further captions.
        shuffle_tags: how to shuffle captions that are lists of tags.

    Raises ValueError, in one line, for an invalid plan.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus | CorpusView],
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
        self.sources = tuple(corpus if isinstance(corpus, CorpusView) else CorpusView(corpus) for corpus in corpora)
        self.corpora = tuple(source.corpus for source in self.sources)
        _check_corpora(self.corpora, shuffle_tags=shuffle_tags)
        _check_groups(self.sources, groups=plan.groups)
        if plan.stride is None:
            raise ValueError("plan.stride is not set: it is the codec's pixels per latent cell times the network's patch size")
        draw_rule = DrawRule(seed=seed, caption_dropout=caption_dropout, caption_weights=tuple(caption_weights), flip=plan.flip)
        _check_draws(draw_rule)
        self.plan = plan
        self.stride = plan.stride
        self.seed = seed
        self.width = width
        self.shuffle_tags = shuffle_tags

        self._counts: dict[int, dict[str, Any]] = {}
        self._stages = self._schedule(first_kinds=(diffusion_share, consistency_share))
        _check_kinds(self._stages)
        for corpus in self.corpora:
            corpus.check_features(rules=[stage.plan.size_rule for stage in self._stages.values()], flips=plan.flip > 0)

        self._plan = self._stages[0].plan
        self._groups = [self._group(number, stage=self._stages[0], draw_rule=draw_rule) for number in range(plan.groups)]
        self.shards = self._groups[0].shards
        self._step = 0

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
        self.plan_hash = json_digest([FORMAT, self._inputs])

    def next_step(self) -> Step:
        """Plan the next step. Raises ValueError if a table cannot be read, or if the plan leaves out every sample of a corpus."""
        if self._step in self._stages and self._step:
            self._enter(self._step)
        packed = [group.next_packs() for group in self._groups]
        packs = self._plan.packs_per_step
        table = StepTable(
            columns=SampleTable.join([each.samples for each in packed]),
            kinds=np.concatenate([each.kinds for each in packed]),
            costs=np.concatenate([each.costs for each in packed]),
            shards=self.shards,
        )
        assigned = np.concatenate([each.packs + number * packs // len(packed) for number, each in enumerate(packed)])
        step = Step(
            index=self._step,
            packs=table.split(assigned, packs=packs),
            table=table,
            tokens_per_pack=self.plan.tokens_per_pack,
            groups=len(packed),
        )
        self._step += 1
        return step

    def state_dict(self) -> dict[str, Any]:
        """State before the next step: JSON-serialisable, small, the same on every rank."""
        return {
            "format": FORMAT,
            "plan_hash": self.plan_hash,
            "inputs": self._inputs,
            "counts": counts_of(self.sources),
            "loss_weights": loss_weights_of(self.sources),
            "step": self._step,
            "groups": [group.state_dict() for group in self._groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises PlanChangedError, a ValueError, listing the differences if it is of another plan."""
        changes = self.changes_since(state)
        if changes:
            raise PlanChangedError(changes)
        self._step = state["step"]
        self._enter(max(self._step - 1, 0))
        for group, saved in zip(self._groups, state["groups"], strict=True):
            group.load_state_dict(saved)

    def replan(self, state: dict[str, Any]) -> None:
        """Start this plan at the step of another plan's `state`. Depends only on that state and this plan's inputs.

        Every corpus starts a new epoch, with visits above the largest of the other plan, so that none of its draws (hash of seed, purpose,
        visit, id) is repeated. Samples that it carried over are planned like any other. Raises ValueError if `state` has another format.
        """
        self._check_format(state)
        epoch = 1 + max(source["epoch"] for group in state["groups"] for source in group["sources"])
        self._step = state["step"]
        for group in self._groups:
            group.begin(epoch)
        self._enter(max(self._step - 1, 0))

    def changes_since(self, state: dict[str, Any]) -> list[PlanChange]:
        """Differences between this plan's inputs and those of a saved plan. Raises ValueError if `state` has another format."""
        self._check_format(state)
        if state["plan_hash"] == self.plan_hash:
            return []
        return plan_changes(state, inputs=self._inputs, sources=self.sources)

    def loss_weights_since(self, state: Mapping[str, Any]) -> list[PlanChange]:
        """Differences between the loss weights of corpora and those in a saved state. The plan is the same with any of them."""
        return loss_weight_changes(state, sources=self.sources)

    @staticmethod
    def _check_format(state: dict[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise ValueError(f"the saved plan has format {state.get('format')!r}, this version of tim reads format {FORMAT}")

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The schedule: first step, limits, and shares of corpora and of kinds (r = t, r = 0) of each stage."""
        return [
            {
                "step": first,
                "max_tokens": plan.max_tokens,
                "packs_per_step": plan.packs_per_step,
                "shares": {corpus.name: share / sum(shares) for corpus, share in zip(self.corpora, shares, strict=True)},
                "diffusion_share": kind_shares[0],
                "consistency_share": kind_shares[1],
            }
            for first, (plan, shares, kind_shares) in self._stages.items()
        ]

    @property
    def sample_counts(self) -> dict[str, Any]:
        """Counts over all samples in the current stage (`pipeline.planning.plan_statistics`). Reads all sizes of the corpora once."""
        return self._count_samples(self._plan)

    def _count_samples(self, plan: PlanConfig) -> dict[str, Any]:
        if plan.max_tokens not in self._counts:
            self._counts[plan.max_tokens] = count_samples(self.sources, rule=plan.size_rule)
        return self._counts[plan.max_tokens]

    def _schedule(self, *, first_kinds: tuple[float, float]) -> dict[int, _Stage]:
        """The stages by their first steps."""
        plan = self.plan
        return {
            first: _Stage(plan.at(first), self._mixture_shares(first), plan.kind_shares_at(first, first=first_kinds))
            for first in (0, *(stage.step for stage in plan.schedule))
        }

    def _mixture_shares(self, step: int) -> tuple[int, ...]:
        def samples() -> list[int]:
            return [corpus["samples"] for corpus in self._count_samples(self.plan.at(0))["corpora"]]

        return mixture_shares(self.sources, scheduled=self.plan.weights_at(step), samples=samples)

    def _group(self, number: int, *, stage: _Stage, draw_rule: DrawRule) -> ShardGroup:
        mixture = Mixture(
            self.sources,
            shares=stage.shares,
            rule=stage.plan.size_rule,
            draw_rule=draw_rule,
            window=self.plan.window,
            part=ShardSubset(number, of=self.plan.groups),
        )
        return ShardGroup(mixture, plan=stage.plan, width=self.width, kind_shares=stage.kind_shares)

    def _enter(self, step: int) -> None:
        """Switch to the stage of `step`."""
        self._plan, shares, kind_shares = self._stages[max(first for first in self._stages if first <= step)]
        for group in self._groups:
            group.enter(self._plan, shares=shares, kind_shares=kind_shares)


def _check_groups(sources: Sequence[CorpusView], *, groups: int) -> None:
    """Raise ValueError unless every group has packs in every step, and shards of every corpus."""
    for source in sources:
        for unit, count in (("shards", len(source.corpus.shards)), ("samples by its cap", source.cap)):
            if groups > 1 and count is not None and count < groups:
                raise ValueError(f"corpus {source.name} has {count} {unit}, fewer than plan.groups {groups}: lower plan.groups")


def _check_draws(rule: DrawRule) -> None:
    if not 0 <= rule.caption_dropout <= 1:
        raise ValueError(f"caption_dropout {rule.caption_dropout} is not a share between 0 and 1")
    if not rule.caption_weights or min(rule.caption_weights) < 0 or max(rule.caption_weights) == 0:
        raise ValueError(f"caption_weights {list(rule.caption_weights)} must be at least 0, and at least one above 0")


def _check_kinds(stages: Mapping[int, _Stage]) -> None:
    """Raise ValueError for invalid shares of kinds."""
    for first, (_, _, (diffusion, consistency)) in stages.items():
        if min(diffusion, consistency) < 0 or diffusion + consistency > 1 + 1e-9:
            prefix = f"plan.schedule: from step {first} on " if first else ""
            raise ValueError(
                f"{prefix}diffusion_share {diffusion:g} and consistency_share {consistency:g} must be at least 0, and their sum at most 1"
            )


def _check_corpora(corpora: Sequence[Corpus], *, shuffle_tags: TagShuffle | None) -> None:
    """Raise ValueError for corpora that cannot be combined."""
    names = [corpus.name for corpus in corpora]
    if not any(corpus.count for corpus in corpora):
        raise ValueError("there is nothing to plan: " + (f"corpus {names[0]} has no samples" if names else "no corpus is given"))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two corpora are named '{twice}': rename one, because sample ids start with the name")
    parts = {corpus.name: () if corpus.features is None else corpus.features.parts for corpus in corpora}
    without_features = next((corpus.name for corpus in corpora if corpus.features is None), None)
    if without_features is not None and any(corpus.features is not None for corpus in corpora):
        raise ValueError(f"corpus {without_features} has no features and another has: give features for all corpora or for none")
    different = next((name for name in names if parts[name] != parts[names[0]]), None)
    if different is not None:
        contents = " and ".join(f"those of corpus {name} have {', '.join(parts[name])}" for name in (names[0], different))
        raise ValueError(f"features of different kinds: {contents}; encode the same parts for both")
    if shuffle_tags is not None and "captions" in parts[names[0]]:
        raise ValueError("text.shuffle_tags: cached caption features cannot be shuffled: remove shuffle_tags or the features")
