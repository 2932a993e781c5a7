"""Copies of training images among generated ones, by nearest neighbours of features.

Similarity is the cosine of features after subtracting the mean of the training images, without which all images are alike to extractors
with positive features. Every matrix is worked on in blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tim.metrics.inputs import checked

BLOCK = 4096  # images a side of a block of similarities
SHARE = 0.001  # of unrelated images that count as copies
CALIBRATION = 10_000  # training images that the threshold is computed from
_EULER = 0.5772156649
DUPLICATE = 0.999  # similarity of the same image, encoded again


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest training image of each image: its index (M,) int64, and their similarity (M,) float32."""

    index: Tensor
    similarity: Tensor


@dataclass(frozen=True, slots=True)
class Copies:
    """Nearest training images, and which images are copies: is_copy (M,) bool, where the similarity is at least `threshold`.

    expected: number of unrelated images that the threshold is expected to count as copies.
    """

    nearest: Nearest
    is_copy: Tensor
    threshold: float
    expected: float


def nearest(generated: Tensor, training: Tensor, *, block: int = BLOCK) -> Nearest:
    """The nearest of the training images (N, F) for each generated one (M, F). Memory: `block`² similarities. Raises ValueError."""
    training, generated = checked(training, generated, least=1)
    mean = _mean(training)
    return _nearest(generated, training, mean=mean, own=None, block=block)


def copies(generated: Tensor, training: Tensor, *, share: float = SHARE, seed: int = 0, block: int = BLOCK) -> Copies:
    """Generated images (M, F) that are closer to a training image (N, F) than one in 1 / `share` new images would be.

    A new image from the distribution of the training images is as close to its nearest training image as a training image to its nearest
    other one. The threshold is therefore the (1 − share) quantile of the latter, over at most `CALIBRATION` random training images: of M
    unrelated images, share · M are expected above it. With fewer than 1 / share training images it is extrapolated: largest similarities
    have Gumbel's distribution, here of atanh(similarity), by its moments. Training images above `DUPLICATE` are duplicates of each other;
    they do not raise the threshold, which is never above that.

    The criterion is as good as the features: `pixels` finds copies of layout and colours only. Look at the pairs. Raises ValueError.
    """
    training, generated = checked(training, generated)
    mean = _mean(training)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(training), generator=generator)[:CALIBRATION].to(training.device)
    among = _nearest(training[rows], training, mean=mean, own=rows, block=block).similarity.sort().values
    threshold = min(_upper_quantile(among, share), DUPLICATE)
    found = _nearest(generated, training, mean=mean, own=None, block=block)
    return Copies(found, found.similarity >= threshold, threshold, share * len(generated))


def _upper_quantile(similarities: Tensor, share: float) -> float:
    """The similarity that a share of images like these (A,), in ascending order, is expected to reach."""
    above = int(share * (len(similarities) + 1))
    if above >= 1:
        return float(similarities[-above])
    bent = similarities.double().clamp(-DUPLICATE, DUPLICATE).atanh()
    scale = float(bent.std()) * math.sqrt(6) / math.pi
    extrapolated = float(bent.mean()) - scale * (_EULER + math.log(-math.log1p(-share)))
    return max(float(similarities[-1]), math.tanh(extrapolated))


def _mean(training: Tensor) -> Tensor:
    return training.mean(0, dtype=torch.float64).float()


def _nearest(images: Tensor, training: Tensor, *, mean: Tensor, own: Tensor | None, block: int) -> Nearest:
    """own: the images' own indices among the training images (A,), where they and their duplicates are left out."""
    similarity = images.new_full((len(images),), -1.0, dtype=torch.float32)
    index = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), block):
        part = slice(start, start + block)
        queries = _directions(images[part], mean)
        for first in range(0, len(training), block):
            cosines = queries @ _directions(training[first : first + block], mean).T
            if own is not None:
                columns = torch.arange(first, first + cosines.shape[1], device=own.device)
                cosines[(cosines >= DUPLICATE) | (own[part, None] == columns)] = -1.0
            best = cosines.max(dim=1)
            index[part] = torch.where(best.values > similarity[part], best.indices + first, index[part])
            similarity[part] = torch.maximum(similarity[part], best.values)
    return Nearest(index, similarity)


def _directions(features: Tensor, mean: Tensor) -> Tensor:
    return F.normalize(features.float() - mean, dim=1)
