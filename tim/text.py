"""Text encoders: captions to feature sequences of their own lengths, never padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LookupEncoder:
    """open_clip's byte-pair tokens, each looked up in a frozen table that is drawn from a fixed seed; positions are added.

    No weights, no download: enough for a network to learn a small vocabulary. Features have unit variance; the empty caption is
    its start and end token.
    """

    SEED = 0
    POSITION_SCALE = 0.5

    def __init__(self, *, width: int, max_tokens: int = 77, device: torch.device | str = "cpu") -> None:
        from open_clip import SimpleTokenizer

        if max_tokens < 2:
            raise ValueError(f"text.max_tokens {max_tokens}: the start and end tokens alone are 2")
        self.width = width
        self.max_tokens = max_tokens
        self._tokenizer = SimpleTokenizer()
        generator = torch.Generator().manual_seed(self.SEED)
        self._table = torch.randn(self._tokenizer.vocab_size, width, generator=generator).to(device)
        self._positions = (self.POSITION_SCALE * torch.randn(max_tokens, width, generator=generator)).to(device)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (M, F) of every caption; tokens beyond `max_tokens` are cut off, the end token stays."""
        features = []
        for caption in captions:
            words = self._tokenizer.encode(caption)[: self.max_tokens - 2]
            tokens = torch.tensor([self._tokenizer.sot_token_id, *words, self._tokenizer.eot_token_id], device=self._table.device)
            features.append(self._table[tokens] + self._positions[: len(tokens)])
        return features


TEXT_ENCODERS = {"lookup": LookupEncoder}
TextEncoder = LookupEncoder


def make(kind: str, *, width: int, max_tokens: int = 77, device: torch.device | str = "cpu") -> TextEncoder:
    """A text encoder by name, with features of the given width. Raises ValueError for an unknown one."""
    if kind not in TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {kind!r}: choose one of {', '.join(TEXT_ENCODERS)}")
    return TEXT_ENCODERS[kind](width=width, max_tokens=max_tokens, device=device)
