"""Captions that are lists of tags: their order says nothing, so it is drawn anew every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TagShuffle:
    """Which captions are shuffled and how: a `share` of them, at the `separator`, the first `keep` tags staying where they are."""

    share: float = 1.0
    separator: str = ", "
    keep: int = 0

    def apply(self, caption: str, *, generator: np.random.Generator) -> str:
        """The caption with its tags in another order; blanks around them do not count, and empty ones are dropped."""
        drawn = generator.integers(0, 2**64, 1 + len(caption), dtype=np.uint64)
        if drawn[0] >= self.share * 2.0**64:
            return caption
        tags = [tag.strip() for tag in caption.split(self.separator.strip() or self.separator)]
        tags = [tag for tag in tags if tag]
        order = np.argsort(drawn[1 : 1 + len(tags[self.keep :])], kind="stable")
        return self.separator.join([*tags[: self.keep], *(tags[self.keep + i] for i in order.tolist())])
