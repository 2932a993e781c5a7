"""Features of prompts from a disk cache, and from a text encoder that is loaded only for prompts that are not in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tim.disk_cache import DiskCache, key
from tim.pretrained import weight_files
from tim.text import encoders
from tim.text.encoders import TextEncoder, TowerEncoder
from tim.text.tokenizers import Tokenizer

LIBRARIES = {"hf": ("torch", "transformers", "tokenizers"), "open_clip": ("torch", "open_clip_torch")}  # whose versions change features


class PromptEncoder:
    """The text encoder of a model, given the section `text` of its spec.

    The weights are read at the first prompt that is not in the cache, and checked as in `encoders.make`. `width` is the feature width that
    the network needs; encoder `lookup` requires it and uses no cache.
    """

    def __init__(
        self,
        text: Mapping[str, Any],
        *,
        width: int | None = None,
        device: torch.device | str = "cpu",
        cache: DiskCache | None = None,
    ) -> None:
        """text: {kind, path, tokenizer, max_tokens, precision}, the last two optional. Raises ValueError for an encoder that is missing."""
        self.kind: str = text["kind"]
        self.path: str | None = text.get("path")
        self.tokenizer_path: str | None = text.get("tokenizer")
        self.max_tokens = int(text.get("max_tokens", 77))
        self.precision: str = text.get("precision", "fp32")
        self.device = torch.device(device)
        self._cache = cache
        self._width = width
        self._encoder: TextEncoder | None = None
        encoders.weights_folder(self.kind, self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The encoder's tokenizer, loaded without the weights. Raises ValueError if there is no usable one."""
        return encoders.tokenizer(self.kind, self.path, tokenizer_path=self.tokenizer_path, max_tokens=self.max_tokens)

    @cached_property
    def width(self) -> int:
        """Feature width, from the encoder's config if it was not given. Raises ValueError."""
        return encoders.width(self.kind, self.path) if self._width is None else self._width

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory, on the device or on the host."""
        return self._encoder is not None

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 features (M, F) per caption on the device, truncated to `max_tokens` tokens.

        In bf16 each caption is encoded alone, because rounding in a batch would change its features visibly. Raises ValueError like
        `encoders.make` and `TextEncoder.encode`.
        """
        distinct = [*dict.fromkeys(captions)]
        features = {caption: found for caption in distinct if (found := self._cached(caption)) is not None}
        missing = [caption for caption in distinct if caption not in features]
        for caption, found in self._encoded(missing):
            features[caption] = found
            if self._usable_cache is not None:
                self._usable_cache.write(self._name(caption), {"features": found})
        return [features[caption] for caption in captions]

    def is_known_to_fit(self, caption: str) -> bool:
        """Whether the header of features in the cache has fewer than `max_tokens` tokens, so that the caption is not truncated."""
        shape = None if self._usable_cache is None else self._usable_cache.shape(self._name(caption), "features")
        return shape is not None and shape[0] < self.max_tokens

    def to(self, device: torch.device | str) -> None:
        """Encode on another device from now on. Loaded weights are moved there at the next prompt that is not in the cache."""
        self.device = torch.device(device)
        if not isinstance(self._encoder, TowerEncoder):
            self._encoder = None

    def offload(self) -> None:
        """Free the memory of the weights: on an accelerator by moving them to the host, on the CPU by dropping them."""
        if isinstance(self._encoder, TowerEncoder) and self.device.type != "cpu":
            self._encoder.to("cpu")
        else:
            self._encoder = None

    def _encoded(self, captions: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
        if not captions:
            return []
        if self._encoder is None:
            self._encoder = encoders.make(
                self.kind,
                self.path,
                tokenizer_path=self.tokenizer_path,
                width=self._width,
                max_tokens=self.max_tokens,
                device=self.device,
                precision=self.precision,
            )
        elif isinstance(self._encoder, TowerEncoder):
            self._encoder.to(self.device)
        encoder = self._encoder
        if self.precision == "bf16":
            return ((caption, encoder.encode([caption])[0]) for caption in captions)
        return zip(captions, encoder.encode(captions), strict=True)

    @cached_property
    def _usable_cache(self) -> DiskCache | None:
        """None also if the cache has no folder: then there is no use in the digest of the weights."""
        return None if self.kind == "lookup" or self._cache is None or not self._cache.make_folder() else self._cache

    def _cached(self, caption: str) -> Tensor | None:
        """Features from the cache. Those of a wrong width are left to the loaded encoder, which raises the error."""
        found = None if self._usable_cache is None else self._usable_cache.read(self._name(caption))
        if found is None or self._width not in (None, found["features"].shape[1]):
            return None
        return found["features"].to(self.device)

    def _name(self, caption: str) -> str:
        return f"text-{key(*self._identity, self.device.type, caption)}"

    @cached_property
    def _identity(self) -> tuple[str, ...]:
        """What features depend on besides the caption: weights, tokenizer, settings and versions."""
        assert self._cache is not None
        assert self.path is not None
        parts = encoders.PARTS if self.kind == "hf" else ()
        weights = weight_files.model_digest(self.path, parts=parts, of_file=self._cache.file_digest)
        folder = encoders.tokenizer_location(self.kind, self.path, tokenizer_path=self.tokenizer_path)
        tokenizer = "" if folder is None else weight_files.digest(folder, weights=False)
        settings = (str(self.max_tokens), self.precision)
        return (self.kind, weights, tokenizer, *settings, *(_version(library) for library in LIBRARIES[self.kind]))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
