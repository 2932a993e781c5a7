"""Shuffle captions that are lists of tags, differently on every visit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TagShuffle:
    """Shuffle a `share` of the captions, split at `separator`; the first `keep` tags stay in place."""

    share: float = 1.0
    separator: str = ", "
    keep: int = 0

    def apply(self, caption: str, *, generator: np.random.Generator) -> str:
        """The caption with shuffled tags, stripped of blanks and without empty ones."""
        drawn = generator.integers(0, 2**64, 1 + len(caption), dtype=np.uint64)
        if drawn[0] >= self.share * 2.0**64:
            return caption
        tags = [tag.strip() for tag in caption.split(self.separator.strip() or self.separator)]
        tags = [tag for tag in tags if tag]
        order = np.argsort(drawn[1 : 1 + len(tags[self.keep :])], kind="stable")
        return self.separator.join([*tags[: self.keep], *(tags[self.keep + i] for i in order.tolist())])
