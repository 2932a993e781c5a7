"""What the size rule makes of a corpus: how many samples are trained at which sizes, and how many are left out for which reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.index import Corpus
from pipeline.resolution import LEFT_OUT_REASONS, SizeRule, target_sizes

# Aspect classes as width : height, by their upper bounds.
_ASPECT_BOUNDS = (1 / 3, 1 / 2, 3 / 4, 9 / 10, 10 / 9, 4 / 3, 2, 3)
_ASPECT_NAMES = ("< 1:3", "1:3", "1:2", "3:4", "1:1", "10:9", "4:3", "2:1", "> 3:1")


def take_account(corpora: Sequence[Corpus], *, rule: SizeRule) -> dict[str, Any]:
    """Count over all samples, one shard in memory at a time. Raises ValueError naming a sample that the features of its corpus lack.

    Returns `rows` (samples in the corpora) = `samples` (trained) + Σ `left_out` (by reason); `tokens_per_epoch`; and of those trained:
    `downscaled`, `cropped_pixels` (share of resized pixels that the crop cuts off), `tokens` (a histogram: "64" counts images of 64 to
    127 tokens) and `aspects` (a histogram of width : height; "4:3" counts those from there up to the next).
    """
    reasons = np.zeros(len(LEFT_OUT_REASONS), dtype=np.int64)
    by_size = np.zeros(64, dtype=np.int64)
    by_aspect = np.zeros(len(_ASPECT_NAMES), dtype=np.int64)
    tokens = downscaled = resized_pixels = target_pixels = 0
    for corpus in corpora:
        for shard in range(len(corpus.shards)):
            table = corpus.read(shard, columns=("key", "width", "height", "captions") if corpus.features else ("width", "height"))
            heights, widths = table.column("height").to_numpy(), table.column("width").to_numpy()
            targets = target_sizes(heights, widths=widths, rule=rule)
            reasons += np.bincount(targets.left_out, minlength=len(reasons))
            kept = targets.left_out == 0
            if corpus.features:
                corpus.locate_features(shard, table=table.filter(pa.array(kept)), heights=targets.height[kept], widths=targets.width[kept])
            tokens += int(targets.tokens[kept].sum())
            downscaled += int((targets.resize_height[kept] < heights[kept]).sum())
            resized_pixels += int((targets.resize_height * targets.resize_width)[kept].sum())
            target_pixels += int((targets.height * targets.width)[kept].sum())
            by_size += np.bincount(np.log2(targets.tokens[kept]).astype(np.int64), minlength=len(by_size))
            by_aspect += np.bincount(
                np.searchsorted(_ASPECT_BOUNDS, (targets.width / np.maximum(targets.height, 1))[kept], side="right"),
                minlength=len(by_aspect),
            )
    return {
        "rows": int(reasons.sum()),
        "samples": int(reasons[0]),
        "left_out": {reason: int(count) for reason, count in zip(LEFT_OUT_REASONS[1:], reasons[1:], strict=True) if count},
        "tokens_per_epoch": tokens,
        "downscaled": downscaled,
        "cropped_pixels": 1 - target_pixels / resized_pixels if resized_pixels else 0.0,
        "tokens": {str(2**power): int(count) for power, count in enumerate(by_size) if count},
        "aspects": {name: int(count) for name, count in zip(_ASPECT_NAMES, by_aspect, strict=True) if count},
    }
