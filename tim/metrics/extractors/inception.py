"""Features of Inception v3 as FID has them: the network, the resize and the weights of torch-fidelity."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tim.metrics.extractors.base import digest_of, file_digest, in_batches
from tim.pretrained.official import read_weights
from tim.pretrained.weight_files import one_line

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
_LAYER = "2048"  # pooled features before the classifier


class InceptionFeatures:
    """The 2048 pooled features of FID's Inception v3.

    The network resizes an image to 299 × 299 pixels without keeping its aspect ratio, and without a filter against aliasing: FID's own
    bilinear interpolation, which depends on the size of the image. Compare images of equal sizes.
    """

    kind = "inception"
    width = 2048
    preprocessing = "squashed to 299 × 299 pixels by FID's own bilinear resize"

    def __init__(self, file: str | Path, *, device: torch.device | str = "cpu", batch: int = 32) -> None:
        self.name = f"Inception v3 ({Path(file).name})"
        self._network = _network(Path(file)).to(device)
        self.digest = digest_of("inception", _LAYER, file_digest(Path(file)))
        self._device = torch.device(device)
        self._batch = batch

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 2048) float32 on the CPU. Images of the same size are batched."""
        features = torch.zeros(len(images), self.width)
        for size in dict.fromkeys(image.size for image in images):
            rows = [row for row, image in enumerate(images) if image.size == size]
            features[rows] = in_batches([images[row] for row in rows], self._encode, batch=self._batch, width=self.width)
        return features

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return self._network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device))[0]


def _network(file: Path) -> Any:
    """torch-fidelity's network with the weights of a file. Its constructor unpickles the file that it is given: it is given a copy with
    the tensors that were read."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("extractor inception needs torch-fidelity: pip install 'tim[fid]'") from None
    if not file.is_file():
        raise ValueError(f"extractor inception: {file}: no such file; bring {URL}")
    weights = read_weights(file)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, copy)
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", [_LAYER], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            raise ValueError(f"{file}: not the weights of FID's Inception v3 ({one_line(error)}); bring {URL}") from error
