"""Accuracy of text in images, read by optical character recognition (RapidOCR with PP-OCRv4, whose weights come with the package).

The text that an image should show is the quoted part of its prompt: a sign that says "OPEN DAILY".
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

_QUOTES = re.compile(
    r"\"([^\"]+)\"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)|‘((?:[^’]|(?<=\w)’(?=\w))+)’(?!\w)"
)


class TextScore(NamedTuple):
    """words: share of the expected words that were read; similarity: 1 − edit distance / length of the longer text. Both in [0, 1]."""

    words: float
    similarity: float


class TextReader:
    """Reads text in images. Raises ValueError if the library is not installed, or not available for this version of Python."""

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            if sys.version_info >= (3, 13):
                raise ValueError("OCR accuracy needs rapidocr-onnxruntime, which is not available for Python 3.13: use 3.12") from None
            raise ValueError("OCR accuracy needs rapidocr-onnxruntime: pip install 'tim[ocr]'") from None
        self._read: Any = RapidOCR()

    def __call__(self, image: Image.Image) -> str:
        """The text of an image, line by line from the top; "" if there is none."""
        import numpy as np

        lines, _ = self._read(np.asarray(image.convert("RGB"))[:, :, ::-1])  # BGR
        return "\n".join(text for _, text, _ in lines or [])


def quoted(prompt: str) -> str:
    """The quoted parts of a prompt, one a line; "" if it has none. An apostrophe within a word is not a quote."""
    return "\n".join("".join(found).strip() for found in _QUOTES.findall(prompt))


def text_score(read: str, expected: str) -> TextScore:
    """Compare texts without regard to case, width, punctuation and space: expected words among those read, and the edit distance.

    Word accuracy as the recall of words, and normalised edit distance as in AnyText (arXiv 2311.03054). Raises ValueError for an
    expected text without letters or digits.
    """
    wanted, found = _words(expected), _words(read)
    if not wanted:
        raise ValueError(f"expected text {expected!r} has neither letters nor digits")
    matched = Counter(wanted) & Counter(found)
    first, second = "".join(found), "".join(wanted)
    return TextScore(matched.total() / len(wanted), 1 - _edit_distance(first, second) / max(len(first), len(second)))


def text_scores(reader: TextReader, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[TextScore | None]:
    """Scores of images whose prompts have quoted text, None for the others."""
    scores: list[TextScore | None] = []
    for image, prompt in zip(images, prompts, strict=True):
        expected = quoted(prompt)
        scores.append(text_score(reader(image), expected) if _words(expected) else None)
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]
