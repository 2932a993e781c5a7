"""Generated images that are nearly training images."""

from __future__ import annotations

from typing import Any

from launch.evaluation.job import Evaluated
from tim.metrics.memorised import copies

SHOWN = 8  # examples


def memorised(evaluated: Evaluated) -> dict[str, Any] | None:
    """Which images of the most steps are closer to an image of the corpus than new images would be, as plain JSON.

    By the features of the first extractor. None without training images to look at.
    """
    training = evaluated.training
    if len(training) < 2 or not evaluated.scorers.extractors:
        return None
    setting = max(evaluated.settings, key=lambda each: each.steps)
    name = evaluated.scorers.extractors[0].name
    found = copies(evaluated.generated(setting).features[name], evaluated.real().features[name])
    rows = found.is_copy.nonzero().flatten().tolist()
    closest = sorted(rows, key=lambda row: -float(found.nearest.similarity[row]))[:SHOWN]
    return {
        **setting._asdict(),
        "features": name,
        "training_images": len(training),
        "images": len(found.is_copy),
        "threshold": found.threshold,
        "copies": len(rows),
        "expected": found.expected,
        "examples": [
            {
                "image": row,
                "sample": evaluated.samples[row].id,
                "nearest": training[int(found.nearest.index[row])].id,
                "similarity": float(found.nearest.similarity[row]),
            }
            for row in closest
        ],
    }


def memorised_line(found: dict[str, Any]) -> str:
    """The result in one line."""
    chance = f"{found['expected']:.2g} expected by chance; {found['features']}, similarity of at least {found['threshold']:.4g}"
    looked = f"of {found['images']} images in {found['steps']} steps, among {found['training_images']} images of the corpus"
    return f"Memorised: {found['copies']} near copies {looked} ({chance})."
