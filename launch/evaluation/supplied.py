"""Distances between features that were computed elsewhere, without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from launch.evaluation.bins import ALL
from launch.evaluation.options import LEAST_IMAGES
from launch.evaluation.results.report import FORMAT
from launch.evaluation.results.rows import Row, warnings_of
from launch.evaluation.results.tables import screen_table
from launch.evaluation.scorers import SCORES, check_names, distances_of
from pipeline.digests import file_digest
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import publish_text
from tim.metrics.intervals import distance_interval

NAME = "supplied"  # in place of an extractor's name


def compare_features(
    real: Path, generated: Path, *, metrics: Sequence[str], resamples: int, out: Path, report: Progress = no_progress
) -> tuple[str, dict[str, Any]]:
    """Compute distances between two files of features, and write eval.json. Returns the text for the screen, and the JSON.

    metrics: names; the usual ones for any features if empty. Raises ValueError for a file without features, for features that do not fit
    each other, and for a metric of images.
    """
    check_names(metrics)
    for name in metrics:
        if name in SCORES:
            raise ValueError(f"--metrics {name}: is measured on images, not on features")
    features = read_features(real, option="--real-features"), read_features(generated, option="--generated-features")
    if features[0].shape[1] != features[1].shape[1]:
        widths = " and ".join(str(each.shape[1]) for each in features)
        raise ValueError(f"--real-features {real}, --generated-features {generated}: rows of {widths} values; use one extractor for both")
    rows, distances = [], distances_of(None, metrics)
    for done, metric in enumerate(distances):
        report("metrics", done, len(distances), note=metric.title)
        found = distance_interval(metric, *features, resamples=resamples)
        rows.append(Row(metric.name, NAME, None, None, ALL, found.value, found.low, found.high, found.images, metric.better))
    report("metrics", len(distances), len(distances))
    warnings = warnings_of(rows, bins={ALL: np.arange(len(features[1]))}, real_images=len(features[0]))
    data = {
        "format": FORMAT,
        "model": None,
        "corpus": None,
        **{name: {"path": str(path), "digest": file_digest(path)} for name, path in (("real", real), ("generated", generated))},
        "images": len(features[1]),
        "machine": {"tim": version("tim"), "torch": version("torch")},
        "max_pixels": None,
        "seed": None,
        "resamples": resamples,
        "steps": [],
        "guidance": [],
        "features": {},
        "extractors": {},
        "clip": None,
        "rows": [asdict(row) for row in rows],
        "reference": [],
        "warnings": warnings,
        "summary": None,
        "verdicts": [],
        "memorised": None,
    }
    out.mkdir(parents=True, exist_ok=True)
    publish_text(out / "eval.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    title = f"{generated}: {len(features[1])} images against {len(features[0])} real ones, with 95 % intervals"
    return "\n".join([screen_table(rows, title=title), "", *(f"warning: {line}" for line in warnings), str(out / "eval.json")]), data


def read_features(path: Path, *, option: str) -> Tensor:
    """Features (N, F) of an .npy file, or of the one matrix in a .safetensors file. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        if path.suffix == ".npy":
            features = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            matrices = [tensor for tensor in load_file(path).values() if tensor.ndim == 2]
            if len(matrices) != 1:
                raise ValueError(f"it has {len(matrices)} matrices, not one")
            features = matrices[0]
    except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{option} {path}: not features of images ({error}); give an .npy or .safetensors file with a matrix") from error
    if features.ndim != 2 or math.prod(features.shape) == 0 or not features.is_floating_point():
        kind = f"{features.dtype} {tuple(features.shape)}".replace("torch.", "")
        raise ValueError(f"{option} {path}: is {kind}; expected a matrix of floats, a row for each image")
    if len(features) < LEAST_IMAGES:
        raise ValueError(f"{option} {path}: has {len(features)} rows; an interval needs at least {LEAST_IMAGES} images")
    wrong = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
    if len(wrong):
        raise ValueError(f"{option} {path}: {len(wrong)} of {len(features)} rows are not finite, the first is row {int(wrong[0])}")
    return features.to(torch.promote_types(features.dtype, torch.float32))
