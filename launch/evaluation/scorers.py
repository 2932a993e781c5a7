"""What is measured of images: features by extractor, and scores of each image against its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dataprep.synthetic import figures, read_figure
from tim.metrics.clip_score import similarities
from tim.metrics.distances import METRICS, Metric
from tim.metrics.extractors.base import ClipExtractor, Extractor
from tim.metrics.extractors.make import as_clip, make_extractor
from tim.metrics.ocr import TextReader, quoted, text_scores

SCORES: Mapping[str, str] = {
    "accuracy": "figures as in the prompt",
    "clip_score": "CLIP score",
    "ocr": "words of the prompt's quoted text",
    "ocr_similarity": "similarity to the prompt's quoted text",
}
"""Scores of an image, by name: their titles. Higher is better."""
GENERAL = ("frechet", "kernel", "sliced", "precision", "recall")  # for features that have no distances of their own
_SHARED = ("precision", "recall")
_FORMS = {"inception": "inception=FILE", "clip": "open_clip=FOLDER", "dinov2": "hf=FOLDER"}
_FIGURES = {figure.caption: figure for figure in figures()}


@dataclass(frozen=True, slots=True)
class Scorers:
    """extractors: of features; distances: metrics by the name of the extractor whose features they compare; scores: names of `SCORES`."""

    extractors: tuple[Extractor, ...]
    distances: Mapping[str, tuple[Metric, ...]]
    scores: tuple[str, ...]
    clip: ClipExtractor | None
    reader: TextReader | None

    @property
    def identity(self) -> list[str]:
        """All that features and scores depend on."""
        names = [f"{extractor.name} {extractor.digest}" for extractor in self.extractors]
        return [*names, *self.scores, *([self.clip.digest] if self.clip is not None else [])]

    def features(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """(B, F) float32 by the name of the extractor."""
        return {extractor.name: extractor(images) for extractor in self.extractors}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str | int], *, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B,) float64 by the name of the score; NaN for an image that has none. features: those of the images."""
        texts = [str(prompt) for prompt in prompts]
        found: dict[str, Tensor] = {}
        if "accuracy" in self.scores:
            matches = [read_figure(image) == _FIGURES[text] for image, text in zip(images, texts, strict=True)]
            found["accuracy"] = torch.tensor(matches, dtype=torch.float64)
        if self.clip is not None:
            embeddings = features[self.clip.name] if self.clip.name in features else self.clip(images)
            found["clip_score"] = similarities(embeddings, self.clip.texts(texts)).double()
        if self.reader is not None:
            read = text_scores(self.reader, images, texts)
            found["ocr"] = _tensor([None if each is None else each.words for each in read])
            found["ocr_similarity"] = _tensor([None if each is None else each.similarity for each in read])
        return {name: found[name] for name in self.scores}


def make_scorers(
    prompts: Sequence[str | int], *, features: Sequence[str], metrics: Sequence[str], clip: str | None, device: torch.device
) -> Scorers:
    """The scorers for the prompts of an evaluation. features, clip: texts of `make_extractor`; metrics: names, all that fit if empty.

    Raises ValueError for an unknown metric, and for one that lacks its extractor, its library or its prompts.
    """
    extractors = tuple(make_extractor(text, device=device) for text in dict.fromkeys(features))
    names = [extractor.name for extractor in extractors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--features {' and '.join(features)}: two are named {twice}; give them one after the other, with another --out")
    check_names(metrics)
    scores = _scores(prompts, metrics=metrics, has_clip=clip is not None)
    distances = {extractor.name: distances_of(extractor.kind, metrics) for extractor in extractors}
    for name in metrics:
        metric = METRICS.get(name)
        if metric is not None and not any(metric in each for each in distances.values()):
            assert metric.features is not None
            raise ValueError(
                f"--metrics {name}: {metric.title} needs features of {metric.features}: give --features {_FORMS[metric.features]}"
            )
    model = None
    if clip is not None and "clip_score" in scores:
        by_text = dict(zip(dict.fromkeys(features), extractors, strict=True))
        model = as_clip(by_text[clip] if clip in by_text else make_extractor(clip, device=device))
    return Scorers(extractors, distances, scores, model, TextReader() if {"ocr", "ocr_similarity"} & set(scores) else None)


def check_names(metrics: Sequence[str]) -> None:
    """Raise ValueError for an unknown metric."""
    known = [*METRICS, *SCORES]
    for name in metrics:
        if name not in known:
            raise ValueError(f"--metrics {name}: unknown; choose from {', '.join(known)}")


def distances_of(kind: str | None, metrics: Sequence[str]) -> tuple[Metric, ...]:
    """The distances for features of a kind: those of `metrics` that fit, or the usual ones. None: of any kind, as the user says."""
    if metrics:
        return tuple(METRICS[name] for name in metrics if name in METRICS and (kind is None or METRICS[name].features in (None, kind)))
    own = tuple(metric for metric in METRICS.values() if kind is not None and metric.features == kind)
    return (*own, *(METRICS[name] for name in _SHARED)) if own else tuple(METRICS[name] for name in GENERAL)


def _scores(prompts: Sequence[str | int], *, metrics: Sequence[str], has_clip: bool) -> tuple[str, ...]:
    """The scores that are asked for, or that the prompts allow. Raises ValueError for one that they do not."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    lacking = {
        "accuracy": None if texts and all(text in _FIGURES for text in texts) else "needs the captions of tim demo's corpus",
        "clip_score": "needs prompts, not classes" if not texts else None if has_clip else f"needs a model: give --clip {_FORMS['clip']}",
    }
    quotes = sum(1 for text in texts if quoted(text))
    problem = None if quotes > 1 else "only one prompt has quoted text, an interval needs two" if quotes else "no prompt has quoted text"
    lacking["ocr"] = lacking["ocr_similarity"] = problem
    for name in metrics:
        if problem := lacking.get(name):
            raise ValueError(f"--metrics {name}: {problem}")
    return tuple(name for name in SCORES if (name in metrics if metrics else lacking[name] is None and _is_installed(name)))


def _is_installed(score: str) -> bool:
    """Whether a score's library is there; only OCR has one that may be missing."""
    from importlib.util import find_spec

    return not score.startswith("ocr") or find_spec("rapidocr_onnxruntime") is not None


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
