from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.captions import clean_captions, normalise


@given(st.text(alphabet=st.characters(), max_size=200))
def test_what_comes_out_is_one_clean_line(text: str) -> None:
    caption, was_cut = normalise(text, max_characters=50)
    caption.encode("utf-8")
    assert caption == caption.strip()
    assert "  " not in caption
    assert len(caption) <= 50
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in caption)
    assert normalise(caption, max_characters=50)[0] in (caption, unicodedata.normalize("NFC", caption)[:50])
    assert was_cut or len(text) <= 50 or len(caption) < len(text)


def test_names_survive_and_debris_does_not() -> None:
    assert normalise("\ufeff Cafe\u0301\t☕\r\n 一张照片\x00!", max_characters=99) == ("Café ☕ 一张照片!", False)
    assert normalise("👩‍👩‍👧 family", max_characters=99) == ("👩‍👩‍👧 family", False)
    assert normalise("lone \ud800 half", max_characters=99) == ("lone half", False)
    assert normalise("word " * 10_000, max_characters=4096) == (("word " * 1000)[:4096].rstrip(), True)


def test_order_is_kept_and_repeats_are_not() -> None:
    assert clean_captions(["b", " a ", "", "b", "\t", "c"], max_characters=9) == (["b", "a", "c"], False)
    assert clean_captions(["1234567890"], max_characters=9) == (["123456789"], True)
