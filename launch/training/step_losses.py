"""Sum the losses of a step over packs and ranks: by kind, time and size; failed images, and images whose loss is not finite."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from launch.distributed.ranks import Ranks
from launch.training.measuring.bins import BINNED, binned, size_bins, time_bins
from launch.training.measuring.image_facts import ImageFacts
from pipeline.cost import KIND_NAMES, Floats
from pipeline.loading.loader import Batch
from tim.objective import Losses
from tim.packed import Condition, PackedText

_KINDS = len(KIND_NAMES)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of a step over all ranks, where every loss is finite.

    failed: images without weight; repeated: packs whose derivative was repeated in float32; raw, raw_images: error sums and counts by
    kind; binned: by time and size (`launch.training.measuring.bins`); alignment: sum of distances from the teacher; flops: of the planned
    images; waited: the longest wait of a rank. suspects: this rank's images whose loss is not finite, as pack and position;
    all_suspects: their number on all ranks.
    """

    failed: int
    repeated: int
    raw: tuple[float, ...]
    raw_images: tuple[int, ...]
    alignment: float
    suspects: list[tuple[int, int]]
    all_suspects: int
    binned: tuple[float, ...] = (0.0,) * BINNED
    flops: float = 0.0
    waited: float = 0.0


@dataclass(slots=True)
class StepLosses:
    """Losses of one rank's packs of a step. No device synchronisation before `sums`, and one there."""

    facts: ImageFacts
    packs: list[tuple[Batch, Losses]] = field(default_factory=list)
    text: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, batch: Batch, losses: Losses, condition: Condition | None = None) -> None:
        self.packs.append((batch, losses._replace(loss=losses.loss.detach())))
        self.text.append(condition.segments.lengths if isinstance(condition, PackedText) else ())

    def sums(self, ranks: Ranks, *, waited: float = 0.0) -> Sums:
        """Sum over all ranks with one all-reduce. waited: this rank's seconds for the step's data."""
        batches = [batch for batch, _ in self.packs]
        errors, misaligned, totals = self._on_host()
        real = torch.cat([batch.weights for batch in batches]).numpy() > 0
        kinds = torch.cat([batch.kinds for batch in batches]).numpy()[real]
        suspects = self._suspects(np.isfinite(errors + misaligned), real=real, totals=totals)
        waits = np.zeros(ranks.size)
        waits[ranks.rank] = waited
        parts = [
            [sum(id != "" for batch in batches for id in batch.ids) - real.sum()],
            [sum(losses.repeated for _, losses in self.packs), len(suspects), misaligned[real].sum()],
            [self.facts.flops(batches, text=self.text)],
            np.bincount(kinds, weights=errors[real], minlength=_KINDS),
            np.bincount(kinds, minlength=_KINDS),
            binned(errors[real], times=time_bins(self.facts.times(batches)[real]), sizes=size_bins(self.facts.tokens(batches))[real]),
            waits,
        ]
        values = ranks.sum(torch.from_numpy(np.concatenate(parts, dtype=np.float64))).tolist()
        failed, repeated, all_suspects, alignment, flops, *rest = values
        return Sums(
            failed=round(failed),
            repeated=round(repeated),
            raw=tuple(rest[:_KINDS]),
            raw_images=tuple(round(count) for count in rest[_KINDS : 2 * _KINDS]),
            alignment=alignment,
            suspects=suspects,
            all_suspects=round(all_suspects),
            binned=tuple(rest[2 * _KINDS : 2 * _KINDS + BINNED]),
            flops=flops,
            waited=max(rest[2 * _KINDS + BINNED :]),
        )

    def _on_host(self) -> tuple[Floats, Floats, Floats]:
        """Errors and distances from the teacher by image, and losses by pack, in one copy from the device."""
        losses = [of_pack for _, of_pack in self.packs]
        parts = [*(each.raw for each in losses), *(each.alignment for each in losses), torch.stack([each.loss for each in losses])]
        values = torch.cat([part.float() for part in parts]).cpu().double().numpy()
        images = (len(values) - len(losses)) // 2
        return values[:images], values[images : 2 * images], values[2 * images :]

    def _suspects(self, finite: NDArray[np.bool_], *, real: NDArray[np.bool_], totals: Floats) -> list[tuple[int, int]]:
        """Images with weight of the packs whose loss is not finite: those whose own loss is not, or all if every one is."""
        suspects: list[tuple[int, int]] = []
        first = 0
        for number, (batch, _) in enumerate(self.packs):
            images = slice(first, first + len(batch.ids))
            first = images.stop
            if not np.isfinite(totals[number]):
                bad = ~finite[images] & real[images]
                suspects += [(number, position) for position in np.flatnonzero(bad if bad.any() else real[images]).tolist()]
        return suspects
