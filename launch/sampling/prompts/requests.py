"""The images that prompts ask for: the product of prompts, sizes, guidance scales, seeds and steps, or their pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from launch.sampling.files.settings import MAX_SEED
from launch.sampling.prompts.rows import MAX_COUNT, PromptRow

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """One image. index: number of its prompt, from 0; repeat: its number among the images of this prompt. None: the model's default.

    height and width in pixels.
    """

    index: int
    repeat: int
    row: PromptRow
    height: int
    width: int
    steps: int | None
    guidance: float | None
    seed: int

    @property
    def prompt(self) -> str | int:
        """A text, or a class of a class model."""
        return self.row.prompt

    @property
    def negative(self) -> str | None:
        """The negative prompt of the row; None: that of the command."""
        return self.row.negative


@dataclass(frozen=True, slots=True)
class _Axes:
    """The values that each prompt is drawn with."""

    sizes: Sequence[tuple[int, int]]
    steps: Sequence[int | None]
    guidances: Sequence[float | None]
    seeds: Sequence[int]
    count: int


def expand(
    prompts: Iterable[PromptRow],
    *,
    sizes: Sequence[tuple[int, int]],
    steps: Sequence[int | None] = (None,),
    guidances: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
    count: int = 1,
    zipped: bool = False,
) -> list[Request]:
    """The images of `prompts`, prompt by prompt; within one by size, guidance, seed and steps. No image comes twice.

    Args:
        sizes: (height, width) in pixels; may be empty if every row has its own.
        count: images for each seed s: s, s + 1, …
        zipped: the n-th prompt with the n-th size, steps, guidance and seed; lists of one value go with all.

    What a row has itself replaces the values of the command for this prompt.

    Raises:
        ValueError: no size for a prompt, lists of different lengths to zip, several seeds with a count, or a seed that is too large.
    """
    if count < 1:
        raise ValueError(f"--count {count}: expected at least 1")
    if len(seeds) > 1 and count > 1:
        raise ValueError(f"--count {count} and {len(seeds)} seeds: give one of them; --count N draws the seeds S, S + 1, … S + N - 1")
    if count > MAX_COUNT:
        raise ValueError(f"--count {count}: at most {MAX_COUNT:,} images of a prompt; give other seeds in a second command")
    axes = _Axes(sizes=sizes, steps=steps, guidances=guidances, seeds=seeds, count=count)
    pairs = _zipped(list(prompts), axes) if zipped else ((index, row, axes) for index, row in enumerate(prompts))
    found: dict[tuple[object, ...], Request] = {}
    repeats: dict[int, int] = {}
    for index, row, chosen in pairs:
        for height, width, guidance, seed, count_of_steps in _settings(row, chosen):
            key = (index, height, width, guidance, seed, count_of_steps)
            if key not in found:
                repeat = repeats[index] = repeats.get(index, -1) + 1
                found[key] = Request(index, repeat, row, height, width, count_of_steps, guidance, seed)
    return list(found.values())


def _zipped(rows: Sequence[PromptRow], axes: _Axes) -> Iterator[tuple[int, PromptRow, _Axes]]:
    """(number of the prompt, prompt, its only size, steps, guidance and seed) for each place in the lists."""
    lists = {"prompts": rows, "sizes": axes.sizes, "steps": axes.steps, "guidance scales": axes.guidances, "seeds": axes.seeds}
    long = {name: len(values) for name, values in lists.items() if len(values) > 1}
    if len(set(long.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in long.items())
        raise ValueError(f"--zip: {counts}: give lists of equal length, or of one value")
    for place in range(max(long.values(), default=1) if rows else 0):
        index = place if len(rows) > 1 else 0
        chosen = _Axes(
            sizes=_at(axes.sizes, place),
            steps=_at(axes.steps, place),
            guidances=_at(axes.guidances, place),
            seeds=_at(axes.seeds, place),
            count=axes.count,
        )
        yield index, rows[index], chosen


def _at(values: Sequence[T], place: int) -> Sequence[T]:
    return values[place : place + 1] if len(values) > 1 else values


def _settings(row: PromptRow, axes: _Axes) -> Iterator[tuple[int, int, float | None, int, int | None]]:
    """(height, width, guidance, seed, steps) of the images of one prompt."""
    sizes = axes.sizes if row.size is None else [row.size]
    if not sizes:
        raise ValueError(f"{row.place}: has no size, and there is no --size: give for example --size 512x512")
    guidances = axes.guidances if row.guidance is None else [row.guidance]
    steps = axes.steps if row.steps is None else [row.steps]
    count = axes.count if row.count is None else row.count
    firsts = axes.seeds if row.seed is None else [row.seed]
    if max(firsts) + count - 1 > MAX_SEED:
        raise ValueError(f"{row.place}: seed {max(firsts)} with a count of {count} exceeds the largest seed, {MAX_SEED}")
    seeds = [first + number for first in firsts for number in range(count)]
    for (height, width), guidance, seed, count_of_steps in product(sizes, guidances, seeds, steps):
        yield height, width, guidance, seed, count_of_steps
