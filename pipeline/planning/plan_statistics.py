"""Statistics of a plan's samples: how many are used at which sizes, and how many are left out for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.size_rule import LEFT_OUT_REASONS, SizeRule
from pipeline.streams.corpus_view import CorpusView, integers

# Aspect classes as width : height, by their upper bounds.
_ASPECT_BOUNDS = (1 / 3, 1 / 2, 3 / 4, 9 / 10, 10 / 9, 4 / 3, 2, 3)
_ASPECT_NAMES = ("< 1:3", "1:3", "1:2", "3:4", "1:1", "10:9", "4:3", "2:1", "> 3:1")


def count_samples(sources: Sequence[CorpusView], *, rule: SizeRule) -> dict[str, Any]:
    """Count over all samples, with one shard in memory at a time. Raises ValueError naming a sample without features.

    Returns `rows` (samples in the corpora) = `samples` (used per epoch) + Σ `left_out` (by reason), the same per source in `corpora`, and
    `tokens_per_epoch`; and over the samples that pass the rules, before caps: `downscaled`, `cropped_pixels` (share of resized pixels
    removed by the crop), `tokens` (a histogram: "64" counts images of 64 to 127 tokens) and `aspects` (a histogram of width : height;
    "4:3" counts images from 4:3 up to the next class).
    """
    by_size = np.zeros(64, dtype=np.int64)
    by_aspect = np.zeros(len(_ASPECT_NAMES), dtype=np.int64)
    tokens_per_epoch = downscaled = resized_pixels = target_pixels = 0
    corpora = []
    for source in sources:
        reasons = np.zeros(len(LEFT_OUT_REASONS), dtype=np.int64)
        tokens = 0
        for shard in range(len(source.corpus.shards)):
            table, targets = source.select(shard, rule=rule, columns=("key", "captions") if source.corpus.features else ())
            reasons += np.bincount(targets.left_out, minlength=len(reasons))
            kept = targets.left_out == 0
            if source.corpus.features:
                source.corpus.locate_features(shard, table=table.filter(pa.array(kept)), crops=targets.crops[kept])
            tokens += int(targets.tokens[kept].sum())
            downscaled += int((targets.resize_height[kept] < integers(table, "height")[kept]).sum())
            resized_pixels += int((targets.resize_height * targets.resize_width)[kept].sum())
            target_pixels += int((targets.height * targets.width)[kept].sum())
            by_size += np.bincount(np.log2(targets.tokens[kept]).astype(np.int64), minlength=len(by_size))
            by_aspect += np.bincount(
                np.searchsorted(_ASPECT_BOUNDS, (targets.width / np.maximum(targets.height, 1))[kept], side="right"),
                minlength=len(by_aspect),
            )
        passed = int(reasons[0])
        samples = passed if source.cap is None else min(passed, source.cap)
        counts_by_reason = [*zip(LEFT_OUT_REASONS[1:], reasons[1:].tolist(), strict=True), ("cap", passed - samples)]
        left_out = {reason: count for reason, count in counts_by_reason if count}
        tokens_per_epoch += tokens * samples // max(passed, 1)
        corpora.append({"name": source.name, "rows": int(reasons.sum()), "samples": samples, "left_out": left_out})
    return {
        "rows": sum(each["rows"] for each in corpora),
        "samples": sum(each["samples"] for each in corpora),
        "left_out": dict(sum((Counter(each["left_out"]) for each in corpora), Counter())),
        "corpora": corpora,
        "tokens_per_epoch": tokens_per_epoch,
        "downscaled": downscaled,
        "cropped_pixels": 1 - target_pixels / resized_pixels if resized_pixels else 0.0,
        "tokens": {str(2**power): int(count) for power, count in enumerate(by_size) if count},
        "aspects": {name: int(count) for name, count in zip(_ASPECT_NAMES, by_aspect, strict=True) if count},
    }
