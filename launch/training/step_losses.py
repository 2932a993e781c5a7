"""Adding up a step: losses by kind, images that failed, and losses that are not finite, over packs and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from launch.distributed.ranks import Ranks
from launch.training.metrics import KINDS
from pipeline.loading.loader import Batch
from tim.objective import Losses

MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Sums:
    """A step over all ranks. raw, raw_images: error sums and counts by kind of image; alignment: sum of distances from the teacher."""

    failed: int
    stop: bool
    raw: tuple[float, ...]
    raw_images: tuple[int, ...]
    alignment: float


@dataclass(slots=True)
class StepLosses:
    """One rank's packs of a step. Nothing is read back from the device before `sums`."""

    packs: list[tuple[Batch, Losses]] = field(default_factory=list)

    def add(self, batch: Batch, losses: Losses) -> None:
        self.packs.append((batch, losses._replace(loss=losses.loss.detach())))

    def sums(self, ranks: Ranks, *, stop: bool) -> Sums:
        """Add up over all ranks, in one message. `stop` is true on all ranks as soon as it is on one.

        Raises RuntimeError naming samples if a loss is not finite, on all ranks, before any weight has changed.
        """
        total = torch.zeros(4 + 2 * len(KINDS), dtype=torch.float64)
        suspects: list[str] = []
        total[0] = stop
        for batch, losses in self.packs:
            real = batch.weights > 0
            errors, misaligned = losses.raw.cpu().double(), losses.alignment.cpu().double()
            total[1] += sum(name != "" for name in batch.ids) - int(real.sum())
            for kind in range(len(KINDS)):
                chosen = real & (batch.kinds == kind)
                total[4 + kind] += errors[chosen].sum()
                total[4 + len(KINDS) + kind] += chosen.sum()
            total[3] += misaligned[real].sum()
            if not torch.isfinite(losses.loss):
                good = torch.isfinite(errors + misaligned).tolist()
                wrong = [name for name, fine in zip(batch.ids, good, strict=False) if not fine]
                suspects += wrong or batch.ids
        total[2] = len(suspects)
        total = ranks.sum(total)
        if total[2]:
            named = [name for names in ranks.gather(suspects) for name in names]
            ranks.run_on_rank0(lambda: _refuse(named))
        values = total.tolist()
        return Sums(
            stop=values[0] > 0,
            failed=round(values[1]),
            raw=tuple(values[4 : 4 + len(KINDS)]),
            raw_images=tuple(round(count) for count in values[4 + len(KINDS) :]),
            alignment=values[3],
        )


def _refuse(named: list[str]) -> None:
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    samples = ", ".join(named[:MAX_NAMED]) + more
    raise RuntimeError(f"the loss is not finite for {samples}: the step was not taken; look at these samples, or lower train.lr")
