"""Captions as training reads them: one line of composed Unicode, no control characters, bounded length."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

MAX_TEXT_BYTES = 1 << 20  # of a text or JSON file beside an image that are read


def clean_captions(texts: Iterable[str], *, max_characters: int = MAX_TEXT_BYTES) -> tuple[list[str], bool]:
    """Normalise captions, drop empty and repeated ones, keep their order: the captions, and whether one of them had to be cut."""
    captions: list[str] = []
    was_cut = False
    for text in texts:
        caption, cut = normalise(text, max_characters=max_characters)
        was_cut |= cut
        if caption and caption not in captions:
            captions.append(caption)
    return captions, was_cut


def normalise(text: str, *, max_characters: int = MAX_TEXT_BYTES) -> tuple[str, bool]:
    """NFC, control characters removed, white space runs → one space, cut at `max_characters`: the caption, and whether it was cut."""
    bounded = text[: 16 * max_characters]  # a caption of gigabytes must not cost gigabytes of work
    caption = " ".join(bounded.split())
    if not (caption.isascii() and caption.isprintable()):
        kept = "".join(character for character in bounded if character.isspace() or not _is_control(character))
        caption = " ".join(unicodedata.normalize("NFC", kept).split())
    return caption[:max_characters].rstrip(), len(caption) > max_characters or len(text) > len(bounded)


def _is_control(character: str) -> bool:
    """Cc: controls. Cs: lone surrogates, which UTF-8 cannot hold. U+FEFF: a byte order mark gone astray."""
    return character == "\ufeff" or (not character.isprintable() and unicodedata.category(character) in ("Cc", "Cs"))
