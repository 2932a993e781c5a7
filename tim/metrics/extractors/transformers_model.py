"""Embeddings of a model of transformers: CLIP, SigLIP, DINOv2 and others with an image processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tim.metrics.extractors.base import digest_of, file_digest, in_batches
from tim.pretrained import weight_files
from tim.pretrained.weight_files import Location, one_line

KINDS = {"dinov2_with_registers": "dinov2"}  # by model type, where they differ


class TransformersFeatures:
    """Embeddings of an image, not normalised: the projected ones of a CLIP or SigLIP, the class token of DINOv2 after its last norm, or
    what another model pools.

    path: a folder of `save_pretrained`, a weights file in one, or hf://OWNER/NAME. No code that comes with a model is run. Images are
    resized to the network's square without keeping their aspect ratio and without a crop, so that all of a wide image is seen. Raises
    ValueError.
    """

    def __init__(self, path: str, *, device: torch.device | str = "cpu", batch: int = 32) -> None:
        source = weight_files.locate(path)
        self._network: Any = _network(source).to(device).eval().requires_grad_(False)
        self._processor: Any = _processor(source)
        self._device = torch.device(device)
        self._batch = batch
        side = _side(self._processor, folder=source.folder)
        self._size = {"height": side, "width": side}
        model_type: str = self._network.config.model_type
        self.kind = KINDS.get(model_type, model_type)
        self.name = f"{model_type} ({source.folder.name})"
        self.preprocessing = f"squashed to {side} × {side} pixels"
        self.digest = digest_of("hf", self.preprocessing, weight_files.model_digest(path, of_file=file_digest), _settings(source))
        self.width = self._encode([Image.new("RGB", (side, side))]).shape[1]

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return in_batches(images, self._encode, batch=self._batch, width=self.width)

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
        colours = [image.convert("RGB") for image in images]
        inputs = self._processor(images=colours, size=self._size, do_center_crop=False, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._device)
        embed = getattr(self._network, "get_image_features", self._network)
        return _pooled(embed(pixel_values=pixels), named=self.name)


class TransformersClip(TransformersFeatures):
    """A model of transformers that embeds texts, too."""

    def __init__(self, path: str, *, device: torch.device | str = "cpu", batch: int = 32) -> None:
        super().__init__(path, device=device, batch=batch)
        folder = weight_files.locate(path).folder
        try:
            self._tokenizer: Any = _library().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files raise what the Rust library raises, a plain Exception
            raise ValueError(f"{folder}: has no usable tokenizer ({one_line(error)})") from error
        self._max_tokens = int(self._network.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, F) of texts, not normalised, on the CPU. Padded to the full length, as SigLIP was trained."""
        parts = []
        for start in range(0, len(texts), self._batch):
            part = list(texts[start : start + self._batch])
            tokens = self._tokenizer(part, padding="max_length", truncation=True, max_length=self._max_tokens, return_tensors="pt")
            parts.append(_pooled(self._network.get_text_features(**tokens.to(self._device)), named=self.name).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.width)


def transformers_extractor(path: str, *, device: torch.device | str, batch: int) -> TransformersFeatures:
    """The extractor of a folder, one that embeds texts if the model does. Raises ValueError."""
    source = weight_files.locate(path)
    try:
        config = _library().AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source.folder}: not a model that transformers reads ({one_line(error)})") from error
    kind = TransformersClip if hasattr(config, "text_config") else TransformersFeatures
    return kind(path, device=device, batch=batch)


def _library() -> Any:
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("extractor hf needs transformers: pip install 'tim[latent]'") from None
    return transformers


def _network(source: Location) -> Any:
    """The model with all of its weights, in float32."""
    try:
        with weight_files.loadable(source, stem="model", pickle_stem="pytorch_model") as (folder, arguments):
            options = {**arguments, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
            network, info = _library().AutoModel.from_pretrained(folder, **options)
    except weight_files.FAILURES as error:
        raise weight_files.failure(source, error, library="transformers") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{source.folder}: its weights lack {missing[0]}: weights and config are of different models")
    return network


def _processor(source: Location) -> Any:
    if not (source.folder / "preprocessor_config.json").is_file():
        raise ValueError(f"{source.folder}: has no preprocessor_config.json, which says how images are normalised")
    try:
        return _library().AutoImageProcessor.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source.folder}: its image processor cannot be loaded ({one_line(error)})") from error


def _settings(source: Location) -> str:
    return file_digest(source.folder / "preprocessor_config.json")


def _side(processor: Any, *, folder: Path) -> int:
    """Side of the square that the network was trained on: of the crop if there is one."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    side = size if isinstance(size, int) else (dict(size).get("height") or dict(size).get("shortest_edge"))
    if not isinstance(side, int):
        raise ValueError(f"{folder}/preprocessor_config.json: has neither crop_size nor size of a square")
    return side


def _pooled(output: Any, *, named: str) -> Tensor:
    """(B, F). get_image_features returns a tensor in transformers 4, an output with `pooler_output` in 5."""
    pooled = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if pooled is None:
        raise ValueError(f"extractor hf: {named} has no pooled output: use a CLIP, SigLIP or DINOv2")
    return pooled.flatten(1)
