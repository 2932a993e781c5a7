"""Normalise captions: one line of composed Unicode, no control characters, bounded length."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

MAX_TEXT_BYTES = 1 << 20  # limit for a text or JSON file of a sample


def clean_captions(texts: Iterable[str], *, max_characters: int = MAX_TEXT_BYTES) -> tuple[list[str], bool]:
    """Normalise captions and drop empty and repeated ones. Returns the captions in order, and whether one was truncated."""
    captions: list[str] = []
    any_truncated = False
    for text in texts:
        caption, truncated = normalise(text, max_characters=max_characters)
        any_truncated |= truncated
        if caption and caption not in captions:
            captions.append(caption)
    return captions, any_truncated


def normalise(text: str, *, max_characters: int = MAX_TEXT_BYTES) -> tuple[str, bool]:
    """NFC, no control characters, single spaces, at most `max_characters`. Returns the caption, and whether it was truncated."""
    bounded = text[: 16 * max_characters]  # bounds the work for captions of gigabytes
    caption = " ".join(bounded.split())
    if not (caption.isascii() and caption.isprintable()):
        kept = "".join(character for character in bounded if character.isspace() or not _is_control(character))
        caption = " ".join(unicodedata.normalize("NFC", kept).split())
    return caption[:max_characters].rstrip(), len(caption) > max_characters or len(text) > len(bounded)


def _is_control(character: str) -> bool:
    """Cc: controls. Cs: lone surrogates, which UTF-8 cannot hold. U+FEFF: a stray byte order mark."""
    return character == "\ufeff" or (not character.isprintable() and unicodedata.category(character) in ("Cc", "Cs"))
