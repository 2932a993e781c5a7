"""The live view of a codec (`tim.sampling.live_view`), fitted to the first images that are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dataprep.features.encoders import Encoders, View

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 64


def fit_live_view(views: Sequence[View], features: Sequence[Mapping[str, Tensor]], *, encoders: Encoders) -> dict[str, Any] | None:
    """Fit to at most 64 images and to the synthetic ones, which have the colours that a corpus may lack.

    features: the tensors of each view, as `Encoders.images` returns them. None without images, and for the pixel codec, whose latent is
    the image.
    """
    from pipeline.features.tensors import latent_name
    from tim.codecs import PixelCodec
    from tim.sampling.live_view import fit, synthetic_images

    if not views or encoders.codec is None or isinstance(encoders.codec, PixelCodec):
        return None
    chosen = range(0, len(views), -(-len(views) // IMAGES))
    latents = [features[i][latent_name(views[i].crop, flipped=views[i].flipped)] for i in chosen]
    synthetic = synthetic_images(encoders.codec)
    view = fit([*latents, *encoders.codec.encode(synthetic).means], [*(views[i].pixels for i in chosen), *synthetic])
    return view.to_json()


def remember_live_view(content: Mapping[str, Any] | None, *, section: Mapping[str, Any] | None) -> None:
    """Store a fitted live view in the user's cache, where sampling finds it. section: {kind, path} of its codec."""
    from tim.disk_cache import DiskCache
    from tim.sampling.live_view import LiveView, remember

    cache = DiskCache.default()
    if content is not None and section is not None and cache is not None:
        remember(LiveView.from_json(content), section, cache=cache)
