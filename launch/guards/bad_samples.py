"""Samples that make the loss non-finite: found by running each alone, recorded in RUN/bad_samples.jsonl, and left out of their step.

{"step": 812, "id": "photos/0000001234", "reason": "the loss is nan"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.distributed.ranks import Ranks
from pipeline.loading.loader import Batch
from pipeline.storage.atomic import publish_text
from tim.objective import Losses

FILE = "bad_samples.jsonl"


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample of a rank's pack `batch` at `position` that makes the loss non-finite by itself."""

    batch: int
    position: int
    id: str
    reason: str


def find(
    batches: Sequence[Batch], suspects: Sequence[tuple[int, int]], *, loss_of: Callable[[Batch], Losses], patch_size: int, ranks: Ranks
) -> list[BadSample]:
    """Run each suspect of this rank (pack and position) alone, and return those whose loss is not finite. Must be called by all ranks.

    Every rank runs equally many packs, because ZeRO-3 communicates in each.
    """
    bad: list[BadSample] = []
    for number in range(max(ranks.gather(len(suspects)))):
        is_suspect = number < len(suspects)
        batch, position = suspects[number] if is_suspect else (0, 0)
        with torch.no_grad():
            loss = float(loss_of(one_sample(batches[batch], position, patch_size=patch_size)).loss)
        if is_suspect and not math.isfinite(loss):
            bad.append(BadSample(batch, position, batches[batch].ids[position], f"the loss is {loss:g}"))
    return bad


def one_sample(batch: Batch, position: int, *, patch_size: int) -> Batch:
    """A pack of one sample of a pack."""
    tokens = _token_counts(batch, patch_size)
    one = slice(position, position + 1)
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    values = {name: value[one] if isinstance(value, (list, Tensor)) and len(value) else value for name, value in values.items()}
    if batch.teacher is not None:
        values["teacher"] = batch.teacher.split(tokens)[position]
    return Batch(**{**values, "tokens": tokens[position]})


def blank(batch: Batch, positions: Collection[int], *, patch_size: int) -> Batch:
    """The pack with black images, empty captions and weight 0 at some positions. Sizes, times and noise stay."""
    if not positions:
        return batch

    def zeroed(values: list[Tensor] | None) -> list[Tensor] | None:
        return values and [torch.zeros_like(value) if place in positions else value for place, value in enumerate(values)]

    weights = batch.weights.clone()
    weights[list(positions)] = 0
    teacher = None if batch.teacher is None else torch.cat(zeroed(list(batch.teacher.split(_token_counts(batch, patch_size)))) or [])
    captions = ["" if place in positions else caption for place, caption in enumerate(batch.captions)]
    return replace(
        batch,
        images=zeroed(batch.images) or [],
        latents=zeroed(batch.latents),
        texts=zeroed(batch.texts),
        teacher=teacher,
        captions=captions,
        weights=weights,
    )


def record(run_dir: Path, found: Sequence[BadSample], *, step: int) -> None:
    """Add samples to the run's list."""
    with (run_dir / FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "id": each.id, "reason": each.reason}) + "\n" for each in found)


def forget_after(run_dir: Path, *, step: int) -> None:
    """Remove the entries of later steps, which a resumed run takes again."""
    path = run_dir / FILE
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        publish_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def _token_counts(batch: Batch, patch_size: int) -> list[int]:
    return [noise.shape[1] * noise.shape[2] // patch_size**2 for noise in batch.noise]
