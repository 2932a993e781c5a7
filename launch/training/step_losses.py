"""Sum the losses of a step over packs and ranks: losses by kind, failed images, and detection of non-finite losses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from launch.distributed.ranks import Ranks
from pipeline.cost import KIND_NAMES
from pipeline.loading.loader import Batch
from tim.objective import Losses

MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of a step over all ranks. raw, raw_images: error sums and counts by kind; alignment: sum of distances from the teacher."""

    failed: int
    stop: bool
    raw: tuple[float, ...]
    raw_images: tuple[int, ...]
    alignment: float


@dataclass(slots=True)
class StepLosses:
    """Losses of one rank's packs of a step. No device synchronisation before `sums`."""

    packs: list[tuple[Batch, Losses]] = field(default_factory=list)

    def add(self, batch: Batch, losses: Losses) -> None:
        self.packs.append((batch, losses._replace(loss=losses.loss.detach())))

    def sums(self, ranks: Ranks, *, stop: bool) -> Sums:
        """Sum over all ranks with one all-reduce. `stop` becomes true on all ranks if it is true on one.

        Raises RuntimeError on all ranks, naming the samples, if a loss is not finite. No weight has changed then.
        """
        total = torch.zeros(4 + 2 * len(KIND_NAMES), dtype=torch.float64)
        suspects: list[str] = []
        total[0] = stop
        for batch, losses in self.packs:
            real = batch.weights > 0
            errors, misaligned = losses.raw.cpu().double(), losses.alignment.cpu().double()
            total[1] += sum(name != "" for name in batch.ids) - int(real.sum())
            for kind in range(len(KIND_NAMES)):
                chosen = real & (batch.kinds == kind)
                total[4 + kind] += errors[chosen].sum()
                total[4 + len(KIND_NAMES) + kind] += chosen.sum()
            total[3] += misaligned[real].sum()
            if not torch.isfinite(losses.loss):
                finite = torch.isfinite(errors + misaligned).tolist()
                bad = [name for name, is_finite in zip(batch.ids, finite, strict=False) if not is_finite]
                suspects += bad or batch.ids
        total[2] = len(suspects)
        total = ranks.sum(total)
        if total[2]:
            named = [name for names in ranks.gather(suspects) for name in names]
            ranks.run_on_rank0(lambda: _raise_not_finite(named))
        values = total.tolist()
        return Sums(
            stop=values[0] > 0,
            failed=round(values[1]),
            raw=tuple(values[4 : 4 + len(KIND_NAMES)]),
            raw_images=tuple(round(count) for count in values[4 + len(KIND_NAMES) :]),
            alignment=values[3],
        )


def _raise_not_finite(named: list[str]) -> None:
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    samples = ", ".join(named[:MAX_NAMED]) + more
    raise RuntimeError(f"the loss is not finite for {samples}: the step was skipped; inspect these samples, or lower train.lr")
