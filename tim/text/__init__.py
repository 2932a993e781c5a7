"""Captions to features: tokenizers and text encoders."""

from tim.text.encoders import TEXT_ENCODERS, TextEncoder, make

__all__ = ["TEXT_ENCODERS", "TextEncoder", "make"]
