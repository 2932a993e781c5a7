"""Bins of an evaluation's samples by size and by aspect ratio.

Size: thirds of the samples by number of tokens, so that every bin has images. Aspect ratio: width / height below 4:5, up to 5:4, above.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from launch.evaluation.samples import Sample
from pipeline.cost import Ints

ALL = "all"
SIZE, ASPECT = "size", "aspect"  # first words of the names of bins
_BORDERS = (4 / 5, 5 / 4)
_ASPECTS = ("aspect below 4:5", "aspect 4:5 to 5:4", "aspect above 5:4")


def bins_of(samples: Sequence[Sample]) -> dict[str, Ints]:
    """Positions of the samples by name of bin: all, then by size, then by aspect ratio. A division into one bin only is left out."""
    tokens = np.array([sample.tokens for sample in samples])
    aspects = np.array([sample.width / sample.height for sample in samples])
    by_size = _by_size(tokens)
    number = np.searchsorted(_BORDERS, aspects, side="left") + (aspects == _BORDERS[0])
    by_aspect = {name: np.flatnonzero(number == k) for k, name in enumerate(_ASPECTS) if (number == k).any()}
    found = {ALL: np.arange(len(samples))}
    for division in (by_size, by_aspect):
        if len(division) > 1:
            found |= division
    return found


def _by_size(tokens: Ints) -> dict[str, Ints]:
    cuts = np.unique(np.quantile(tokens, [1 / 3, 2 / 3], method="higher"))
    number = np.searchsorted(cuts, tokens, side="right")
    parts = [np.flatnonzero(number == k) for k in range(len(cuts) + 1)]
    return {_size_name(tokens[part]): part for part in parts if len(part)}


def _size_name(tokens: Ints) -> str:
    least, most = int(tokens.min()), int(tokens.max())
    return f"size {least if least == most else f'{least}-{most}'} tokens"
