"""Embeddings of a CLIP of open_clip, of images and of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tim.metrics.extractors.base import digest_of, file_digest, in_batches
from tim.pretrained import weight_files
from tim.pretrained.weight_files import one_line

_CONFIG, _FILE = "open_clip_config.json", "open_clip_model.safetensors"


class OpenClipFeatures:
    """Embeddings of an image, not normalised.

    model: a folder with open_clip_config.json and weights, or ARCHITECTURE:FILE, where open_clip knows the architecture (ViT-B-32).
    Images are resized to the network's square without keeping their aspect ratio, so that all of a wide image is seen; square images are
    processed as by open_clip itself. Raises ValueError.
    """

    def __init__(self, model: str, *, device: torch.device | str = "cpu", batch: int = 32) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        name, file = _resolve(model)
        try:
            network: Any = open_clip.create_model(name, pretrained=None if file is None else str(file), require_pretrained=True)
            self._tokenize: Any = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip and the readers of weights raise many types
            raise ValueError(f"extractor open_clip={model}: cannot be loaded ({one_line(error)})") from error
        self._network = network.to(device).eval().requires_grad_(False)
        facts = replace(PreprocessCfg(**network.visual.preprocess_cfg), resize_mode="squash")
        self._transform: Any = image_transform_v2(facts, is_train=False)
        self._device = torch.device(device)
        self._batch = batch
        side = facts.size if isinstance(facts.size, int) else facts.size[0]
        self.kind = "clip" if getattr(network, "logit_bias", None) is None else "siglip"
        self.name = f"open_clip {Path(name.removeprefix('local-dir:')).name}"
        self.preprocessing = f"squashed to {side} × {side} pixels ({facts.interpolation})"
        weights = weight_files.digest(model, of_file=file_digest) if file is None else file_digest(file)
        self.digest = digest_of("open_clip", "" if file is None else name, weights, str(sorted(asdict(facts).items())))
        self.width = self.texts([""]).shape[1]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return in_batches(images, self._encode, batch=self._batch, width=self.width)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, F) of texts, not normalised, on the CPU."""
        return torch.cat([
            self._network.encode_text(self._tokenize(list(texts[start : start + self._batch])).to(self._device)).float().cpu()
            for start in range(0, len(texts), self._batch)
        ])  # fmt: skip

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self._transform(image.convert("RGB")) for image in images])
        return self._network.encode_image(pixels.to(self._device))


def _resolve(model: str) -> tuple[str, Path | None]:
    """open_clip's name of a model, and the file with its weights if they are not in a folder with its config."""
    import open_clip

    if Path(model).is_dir():
        if not (Path(model) / _CONFIG).is_file() or not list(Path(model).glob("open_clip*model*")):
            raise ValueError(f"extractor open_clip={model}: not an open_clip folder: it needs {_CONFIG} and {_FILE}")
        return f"local-dir:{model}", None
    name, separator, file = model.partition(":")
    if not separator:
        raise ValueError(f"extractor open_clip={model}: no such folder; give a folder with {_CONFIG} and {_FILE}, or ARCHITECTURE:FILE")
    if name not in open_clip.list_models():
        raise ValueError(f"extractor open_clip={model}: {name} is not an architecture of open_clip, such as ViT-B-32")
    if not Path(file).is_file():
        raise ValueError(f"extractor open_clip={model}: {file}: no such file with weights of {name}")
    return name, Path(file)
