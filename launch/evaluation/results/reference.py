"""The same numbers of real images, to compare those of generated images with.

A score, such as the CLIP score, is that of the real images themselves. A distance is that of as many other real images of the corpus, which
a model that draws as the corpus is would have on average, but for the captions: its images have those of the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from launch.evaluation.bins import ALL
from launch.evaluation.results.rows import LEAST_IN_BIN, Row, better_of
from launch.evaluation.store import Measured
from pipeline.cost import Ints
from tim.metrics.distances import Metric
from tim.metrics.intervals import Estimate, distance_interval, mean_interval


def reference_rows(
    real: Measured, *, count: int, distances: Mapping[str, Sequence[Metric]], bins: Mapping[str, Ints], resamples: int
) -> list[Row]:
    """Rows without steps and guidance. real: of the corpus's images, of which the first `count` belong to generated ones.

    Distances are of all images only, and are left out if there are no `count` other images.
    """
    rows = []
    if len(next(iter(real.features.values()), ())) >= 2 * count:
        for extractor, metrics in distances.items():
            images = real.features[extractor][: 2 * count].split(count)
            rows += [_row(metric.name, extractor, ALL, distance_interval(metric, *images, resamples=resamples)) for metric in metrics]
    for bin, positions in bins.items():
        if bin != ALL and len(positions) < LEAST_IN_BIN:
            continue
        for name, values in real.scores.items():
            scores = values[torch.from_numpy(positions)]
            scores = scores[~scores.isnan()]
            if len(scores) > 1:
                rows.append(_row(name, "", bin, mean_interval(scores)))
    return rows


def _row(metric: str, features: str, bin: str, found: Estimate) -> Row:
    return Row(metric, features, None, None, bin, found.value, found.low, found.high, found.images, better_of(metric))
