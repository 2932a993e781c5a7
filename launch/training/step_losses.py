"""Sum the losses of a step over packs and ranks: losses by kind, failed images, and images whose loss is not finite."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from launch.distributed.ranks import Ranks
from pipeline.cost import KIND_NAMES
from pipeline.loading.loader import Batch
from tim.objective import Losses


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of a step over all ranks, where every loss is finite.

    failed: images without weight; repeated: packs whose derivative was repeated in float32; raw, raw_images: error sums and counts by
    kind; alignment: sum of distances from the teacher. suspects: this rank's images whose loss is not finite, as pack and position;
    all_suspects: their number on all ranks.
    """

    failed: int
    repeated: int
    raw: tuple[float, ...]
    raw_images: tuple[int, ...]
    alignment: float
    suspects: list[tuple[int, int]]
    all_suspects: int


@dataclass(slots=True)
class StepLosses:
    """Losses of one rank's packs of a step. No device synchronisation before `sums`."""

    packs: list[tuple[Batch, Losses]] = field(default_factory=list)

    def add(self, batch: Batch, losses: Losses) -> None:
        self.packs.append((batch, losses._replace(loss=losses.loss.detach())))

    def sums(self, ranks: Ranks) -> Sums:
        """Sum over all ranks with one all-reduce."""
        kinds = len(KIND_NAMES)
        total = torch.zeros(4 + 2 * kinds, dtype=torch.float64)
        suspects: list[tuple[int, int]] = []
        for number, (batch, losses) in enumerate(self.packs):
            real = batch.weights > 0
            errors, misaligned = losses.raw.cpu().double(), losses.alignment.cpu().double()
            total[0] += sum(name != "" for name in batch.ids) - int(real.sum())
            for kind in range(kinds):
                chosen = real & (batch.kinds == kind)
                total[4 + kind] += errors[chosen].sum()
                total[4 + kinds + kind] += chosen.sum()
            total[3] += losses.repeated
            total[2] += misaligned[real].sum()
            if not torch.isfinite(losses.loss):
                bad = ~torch.isfinite(errors + misaligned) & real
                suspects += [(number, position) for position in (bad if bad.any() else real).nonzero()[:, 0].tolist()]
        total[1] = len(suspects)
        values = ranks.sum(total).tolist()
        return Sums(
            failed=round(values[0]),
            repeated=round(values[3]),
            raw=tuple(values[4 : 4 + kinds]),
            raw_images=tuple(round(count) for count in values[4 + kinds :]),
            alignment=values[2],
            suspects=suspects,
            all_suspects=round(values[1]),
        )
