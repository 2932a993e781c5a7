"""Text in images: what a prompt asks for, how texts are compared, and real recognition of drawn text."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from tim.metrics import ocr
from tim.metrics.ocr import TextReader, quoted, text_score, text_scores


def drawn(text: str) -> Image.Image:
    image = Image.new("RGB", (360, 140), "white")
    ImageDraw.Draw(image).multiline_text((20, 15), text, font=ImageFont.load_default(44), fill="black")
    return image


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ('"one" above "two words"', "one\ntwo words"),
        ("a poster with “Grand Opening” on it", "Grand Opening"),
        ("ein Schild mit „Guten Tag“", "Guten Tag"),
        ("un panneau « Bonjour »", "Bonjour"),
        ("a shop called 'Joe's'", "Joe's"),
        ("a dog's bowl and the cat's bed", ""),
        ("‘Joe’s’ and the boys’ room", "Joe’s"),
        ("「営業中」", "営業中"),
        ('5" screen', ""),
        ("nothing", ""),
    ],
)
def test_quoted_parts_of_prompts(prompt: str, expected: str) -> None:
    assert quoted(prompt) == expected


def test_scores_of_texts() -> None:
    assert text_score("Open Daily", "OPEN DAILY") == (1.0, 1.0)
    assert text_score("OPENDAILY", "OPEN DAILY") == (0.0, 1.0)  # a lost space is no edit
    assert text_score("", "open") == (0.0, 0.0)
    assert text_score("OPFN now", "open, now!") == pytest.approx((0.5, 1 - 1 / 7))
    assert text_score("go", "go go") == pytest.approx((0.5, 0.5))
    assert text_score("kitten", "sitting") == pytest.approx((0.0, 1 - 3 / 7))
    with pytest.raises(ValueError, match="neither letters nor digits"):
        text_score("x", "?!")


@given(first=st.text("abc ", max_size=8), second=st.text("abc", min_size=1, max_size=8))
def test_properties_of_scores(first: str, second: str) -> None:
    score = text_score(first, second)
    assert 0 <= score.words <= 1
    assert 0 <= score.similarity <= 1
    assert (score.similarity == 1) == (first.replace(" ", "") == second)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the library has no release for it")
def test_drawn_text_is_read() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    reader = TextReader()
    images = [drawn("OPEN DAILY\n7 to 9"), drawn("CLOSED"), Image.new("RGB", (64, 48)), drawn("x")]
    prompts = ['a sign "OPEN DAILY" "7 to 9"', 'a sign "OPEN"', 'a sign "OPEN"', "a sign"]
    right, wrong, empty, none = text_scores(reader, images, prompts)
    assert right is not None
    assert right.words >= 0.8
    assert right.similarity >= 0.9
    assert wrong is not None
    assert (wrong.words, empty, none) == (0.0, (0.0, 0.0), None)


@pytest.mark.parametrize(("version", "said"), [((3, 12), r"pip install 'tim\[ocr\]'"), ((3, 13), r"not available for Python 3\.13")])
def test_without_the_library(version: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    monkeypatch.setattr(ocr.sys, "version_info", version)
    with pytest.raises(ValueError, match=said):
        TextReader()
