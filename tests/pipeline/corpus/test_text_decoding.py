"""Decoding of texts: byte order marks, stated encodings, and the position of what cannot be decoded."""

from __future__ import annotations

import codecs
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.captions import MAX_TEXT_BYTES
from pipeline.corpus.text_decoding import UndecodableText, check_encoding, decode_text, find_undecodable, open_text

MARKED = [("utf-8-sig", ""), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-32", "")]


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not text.startswith("\ufeff")))
def test_byte_order_marks_win_over_the_stated_encoding(text: str) -> None:
    for codec, mark in MARKED:
        payload = (mark or b"") + text.encode(codec)
        if text[:1] != "\0":  # two NULs behind the mark of UTF-16 are the mark of UTF-32
            assert decode_text(payload) == decode_text(payload, encoding="cp1252") == text
            assert open_text(io.BytesIO(payload))[0].read() == text
    assert decode_text(text.encode()) == text


@pytest.mark.parametrize(
    ("payload", "encoding", "message"),
    [
        (b"caf\xe9", "", r"^not UTF-8 at byte 3 \(0xe9\); .*columns\.encoding="),
        (codecs.BOM_UTF8 + b"ab\xff", "", r"^not UTF-8 at byte 5 \(0xff\)"),
        (b"ab\x81", "cp1252", r"^not CP1252 at byte 2 \(0x81\)$"),
        (codecs.BOM_UTF16_LE + b"a\0b", "", r"^not UTF-16-LE at byte 4"),
    ],
)
def test_the_first_byte_that_cannot_be_decoded_is_named(payload: bytes, encoding: str, message: str) -> None:
    with pytest.raises(UndecodableText, match=message):
        decode_text(payload, encoding=encoding)


@settings(max_examples=100)
@given(st.binary(max_size=40))
def test_both_ways_of_decoding_agree(payload: bytes) -> None:
    text, codec = open_text(io.BytesIO(payload))
    read = text.read()
    try:
        assert decode_text(payload) == read
        assert not find_undecodable(read, codec=codec, is_stated=False)
    except UndecodableText:
        assert find_undecodable(read, codec=codec, is_stated=False)


def test_a_text_cut_within_a_character_is_no_damage() -> None:
    payload = b"a" + "é".encode() * (MAX_TEXT_BYTES // 2)
    assert payload[MAX_TEXT_BYTES - 1] == 0xC3
    assert decode_text(payload[:MAX_TEXT_BYTES]).endswith("éé")
    with pytest.raises(UndecodableText):
        decode_text(b"a\xc3")


def test_only_text_encodings_are_encodings() -> None:
    assert check_encoding("shift_jis") == "shift_jis"
    for name in ("utf8000", "base64", "hex", "rot13", ""):
        with pytest.raises(ValueError, match="is not an encoding of text"):
            check_encoding(name)
