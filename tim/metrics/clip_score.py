"""CLIP score: similarity of images and their prompts (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tim.metrics.extractors.base import ClipExtractor


def clip_scores(model: ClipExtractor, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """(B,): max(100 · cosine, 0) of each image with its prompt, as in torchmetrics; CLIPScore's paper has 2.5 in place of 100.

    Scores of different models cannot be compared: state the model. Raises ValueError if there is not one prompt per image.
    """
    if len(images) != len(prompts):
        raise ValueError(f"CLIP score: {len(images)} images, but {len(prompts)} prompts")
    return similarities(model(images), model.texts(prompts))


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """(B,) scores of embeddings of images (B, F) and of their prompts (B, F), for embeddings that are at hand already."""
    return 100 * F.cosine_similarity(images, texts, dim=1).clamp(min=0)
