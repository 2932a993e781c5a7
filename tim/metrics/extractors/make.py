"""Make an extractor from a text, as given on the command line."""

from __future__ import annotations

import torch

from tim.metrics.extractors.base import ClipExtractor, Extractor
from tim.metrics.extractors.inception import InceptionFeatures
from tim.metrics.extractors.open_clip_model import OpenClipFeatures
from tim.metrics.extractors.pixels import PixelFeatures
from tim.metrics.extractors.transformers_model import TransformersClip, transformers_extractor

FORMS = "pixels, inception=FILE, open_clip=FOLDER, open_clip=ARCHITECTURE:FILE or hf=FOLDER"


def make_extractor(text: str, *, device: torch.device | str, batch: int = 32) -> Extractor:
    """The extractor that `text` names, in one of the forms of this package's table. Raises ValueError.

    batch: images per forward of its network.
    """
    check_form(text)
    kind, _, path = text.partition("=")
    if kind == "inception":
        return InceptionFeatures(path, device=device, batch=batch)
    if kind == "open_clip":
        return OpenClipFeatures(path, device=device, batch=batch)
    if kind == "hf":
        return transformers_extractor(path, device=device, batch=batch)
    return PixelFeatures()


def check_form(text: str) -> None:
    """Raise ValueError if `text` has none of the forms of `make_extractor`. Whether its file is there is not checked."""
    kind, _, path = text.partition("=")
    if text != "pixels" and not (kind in ("inception", "open_clip", "hf") and path):
        raise ValueError(f"extractor {text!r}: expected {FORMS}")


def as_clip(extractor: Extractor) -> ClipExtractor:
    """The extractor, if its network embeds texts, too. Raises ValueError."""
    if isinstance(extractor, (OpenClipFeatures, TransformersClip)):
        return extractor
    raise ValueError(f"CLIP score needs a model of images and texts, not {extractor.name}: give open_clip=FOLDER or hf=FOLDER of a CLIP")
