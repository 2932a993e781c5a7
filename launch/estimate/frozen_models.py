"""Memory of the frozen models of a run: codec, text encoder, alignment teacher. Each rank holds them whole, in float32.

Sizes come from the headers of their weights if a path is given, else from the published models. A model whose outputs are cached is not
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.config.schema import Config
from launch.training.checks import cached_parts
from tim import codecs
from tim.codecs.autoencoder import BATCH_PIXELS
from tim.pretrained import weight_files
from tim.pretrained.headers import read_header
from tim.text import encoders
from tim.text.tokenizers import BytePairs

FULL = 4
# Parameters of the published models, for configurations without paths.
CODECS = {"sd-vae": 83.7e6, "kl": 83.8e6, "sd3-vae": 83.8e6, "flux-vae": 83.8e6, "flux2-vae": 84.1e6, "dc-ae": 312e6, "tiny": 2.4e6}
TEXTS = {"open_clip": 123.7e6, "hf": 1.0e9}  # ViT-L/14's text tower; Gemma 3 1B
TEACHERS = {"radio": 98.2e6, "dinov2": 86.6e6, "open_clip": 304e6}
UNLIMITED = 1e6  # GB
WORK_PER_TOKEN = 24  # float32 numbers per channel of a transformer's token, without gradient


@dataclass(frozen=True, slots=True)
class FrozenMemory:
    """weights: bytes by model; work: bytes of activations of the most expensive one; parameters: by model; notes: what is assumed."""

    weights: dict[str, float]
    work: float
    parameters: dict[str, float]
    notes: tuple[str, ...]


def frozen_memory(config: Config, *, cached: bool, tokens: int, images: float) -> FrozenMemory:
    """Memory for packs of so many tokens and images. cached: take latents, texts and teacher's tokens as cached in feature shards."""
    parts = {"latents", "captions", "teacher"} if cached else cached_parts(config)
    counts: dict[str, float] = {}
    notes: list[str] = []
    work = [0.0]
    if "latents" not in parts and config.codec.kind != "pixel":
        path = config.codec.path
        counts["codec"] = _count(path, CODECS[config.codec.kind], lambda: codecs.location(config.codec.kind, path), "codec.path", notes)
        work.append(_codec_work(config, tokens=tokens))
    if "captions" not in parts and config.condition == "text":
        text = config.text
        width = config.network.params.cap_feat_dim or 0
        if text.kind == "lookup":
            counts["text encoder"] = BytePairs(max_tokens=text.max_tokens).size * width
        else:
            counts["text encoder"] = _count(
                text.path, TEXTS[text.kind], lambda: encoders.location(text.kind, text.path), "text.path", notes
            )
            work.append(FULL * WORK_PER_TOKEN * width * min(encoders.BATCH_TOKENS, images * text.max_tokens))
    if (teacher := config.objective.alignment) is not None and "teacher" not in parts:
        path = teacher.path
        counts["teacher"] = _count(
            None if path is None else str(path),
            TEACHERS[teacher.kind],
            lambda: weight_files.locate(str(path)),
            "objective.alignment.path",
            notes,
        )
        work.append(FULL * WORK_PER_TOKEN * config.network.params.z_dim * tokens)
    return FrozenMemory({name: FULL * count for name, count in counts.items()}, max(work), counts, tuple(notes))


def _codec_work(config: Config, *, tokens: int) -> float:
    """Activations of the codec: of a batch of images, or of the largest one alone. A hub path counts as the published architecture."""
    assert config.plan.stride is not None
    path = config.codec.path
    is_local = path is not None and not path.startswith(weight_files.HUB)
    limit = UNLIMITED if config.codec.memory_gb is None else config.codec.memory_gb
    codec = codecs.without_weights(config.codec.kind, path if is_local else None, memory_gb=limit)
    pixels = min(tokens * config.plan.stride**2, max(BATCH_PIXELS, config.plan.max_tokens * config.plan.stride**2))
    side = max(1, round(math.sqrt(pixels) / codec.factor)) * codec.factor
    return codec.plan_tiling(side, side, "encode").bytes


def _count(path: str | None, published: float, locate: Callable[[], weight_files.Location], key: str, notes: list[str]) -> float:
    """Number of parameters in the weights at a path, from their headers; else of the published model."""
    if path is None or path.startswith(weight_files.HUB):
        notes.append(f"{key}: not a local path, taken as {published / 1e6:,.0f}M parameters")
        return published
    if Path(path).is_file() and Path(path).suffix != weight_files.SAFE:
        return Path(path).stat().st_size / FULL
    return _elements(weight_files.files(locate()))


def _elements(files: Iterable[Path]) -> float:
    """Numbers in the weights among some files."""
    total = 0.0
    for file in files:
        if file.suffix == weight_files.SAFE:
            total += sum(tensor.numel() for tensor in read_header(file).values())
        elif file.suffix == weight_files.PICKLE:
            total += file.stat().st_size / FULL
    return total
