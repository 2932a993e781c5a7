"""Captions: markup and addresses taken out, languages told apart, several kept in their order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataprep.examine.captions import CaptionConfig, check_languages, prepare_captions
from dataprep.prepare import PrepareConfig, prepare
from tests.dataprep.helpers import photo, row_of, write_folder

ENGLISH, GERMAN = "two dogs are playing in the snow", "zwei Hunde spielen zusammen im Schnee"


def texts(*captions: str, **config: object) -> list[str]:
    return prepare_captions(captions, extra={}, config=CaptionConfig.model_validate(config)).texts


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("<p>A <b>red</b> fox &amp; a hen</p>", "A red fox & a hen"),
        ("before<script>if (a<b) run()</script> after", "before after"),
        ("a<style type='x'>p{}</STYLE >b", "a b"),
        ("x<!-- a < b --> y", "x y"),
        ("5 < 6 and 7 > 3, I <3 it", "5 < 6 and 7 > 3, I <3 it"),
        ("caf&eacute; &#9749; &lt;b&gt;", "café ☕ <b>"),
        ("<script>never ends", ""),
        ("plain", "plain"),
    ],
)
def test_markup_is_taken_out(caption: str, clean: str) -> None:
    assert texts(caption, strip_html=True) == ([clean] if clean else [])
    assert texts(caption) == [caption]


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("a fox https://x.org/a?b=1&c=(2) in snow", "a fox in snow"),
        ("see www.example.com/page now", "see now"),
        ("s3://bucket/key", ""),
        ("ratio 3:4 // and so on", "ratio 3:4 // and so on"),
    ],
)
def test_addresses_are_taken_out(caption: str, clean: str) -> None:
    assert texts(caption, strip_urls=True) == ([clean] if clean else [])


def test_each_line_is_a_caption_where_that_is_asked_for() -> None:
    assert texts("a fox\n\n a hen \r\na fox", "snow", per_line=True) == ["a fox", "a hen", "snow"]
    assert texts("a fox\n\n a hen \r\na fox", "snow") == ["a fox a hen a fox", "snow"]


@given(st.lists(st.text(), max_size=4), st.booleans(), st.booleans(), st.integers(1, 30), st.integers(1, 3))
def test_what_is_left_is_clean_in_order_and_within_limits(captions: list[str], html: bool, urls: bool, most: int, count: int) -> None:
    found = texts(*captions, strip_html=html, strip_urls=urls, max_characters=most, max_count=count)
    assert len(found) <= count
    assert len(set(found)) == len(found)
    assert all(0 < len(text) <= most and text == " ".join(text.split()) for text in found)
    assert texts(*found, max_characters=most) == found


@pytest.mark.parametrize("piece", ["<", "<script>", "<!--", "<a ", "a://", "&", "&#", "</script", "abcdefghij"])
def test_hostile_captions_cost_no_more_than_their_length(piece: str) -> None:
    hostile = piece * (65_000 // len(piece)) + "://"
    assert len(texts(hostile, strip_html=True, strip_urls=True)) <= 1  # a quadratic reading would run into the suite's time limit


def test_captions_in_other_languages_are_left_out() -> None:
    config = CaptionConfig(languages=("en",))
    found = prepare_captions([GERMAN, ENGLISH], extra={}, config=config)
    assert (found.texts, found.language, found.rejection) == ([ENGLISH], "en", None)
    refused = prepare_captions([GERMAN], extra={}, config=config)
    assert (refused.texts, refused.rejection) == ([], ("filter:language", "captions in de, captions.languages=en"))
    assert prepare_captions([], extra={}, config=config).rejection is None


@pytest.mark.parametrize(
    "caption", ["a photo of a koala", "a photo of a Komodo dragon", "a photo of an electric fan", "Sunset over the harbour"]
)
def test_short_captions_are_not_left_out_for_an_odd_word(caption: str) -> None:
    assert prepare_captions([caption], extra={}, config=CaptionConfig(languages=("en",))).texts == [caption]
    sure = CaptionConfig(languages=("de",), min_language_probability=0.9)
    assert prepare_captions([caption], extra={}, config=sure).rejection is not None


def test_a_column_may_say_the_language() -> None:
    config = CaptionConfig(languages=("de",), language_column="lang")
    assert prepare_captions(["x", "y"], extra={"lang": "de-AT"}, config=config).texts == ["x", "y"]
    assert prepare_captions(["x"], extra={"lang": "en"}, config=config).rejection is not None
    assert prepare_captions(["x"], extra={}, config=config).rejection == ("filter:language", "captions in unknown, captions.languages=de")


def test_languages_that_nothing_here_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'english' is not a two-letter code"):
        check_languages(CaptionConfig(languages=("english",)))
    with pytest.raises(ValueError, match="xx cannot be detected"):
        check_languages(CaptionConfig(languages=("en", "xx")))
    from dataprep.examine.captions import _identifier

    _identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match=r"^[^\n]*tim\[language\][^\n]*language_column[^\n]*$"):
        check_languages(CaptionConfig(languages=("en",)))
    check_languages(CaptionConfig(languages=("en",), language_column="lang"))
    check_languages(CaptionConfig())


def test_in_a_corpus(tmp_path: Path) -> None:
    files = {f"{number}.jpg": photo(number) for number in range(3)}
    captions = [[GERMAN, f"<b>{ENGLISH}</b>"], [GERMAN], ["a red fox is sleeping under a tree", ENGLISH, "the old mill at the river bank"]]
    rows = [{"file_name": name, "captions": several} for name, several in zip(files, captions, strict=True)]
    folder = write_folder(tmp_path / "f", files, rows=rows)
    config = PrepareConfig.model_validate({"captions": {"languages": ["en"], "strip_html": True, "max_count": 2}})
    counts = prepare([str(folder)], out=tmp_path / "C", config=config)
    assert (counts.kept, counts.rejected) == (2, {"filter:language": 1})
    first, last = row_of(tmp_path / "C", "0.jpg"), row_of(tmp_path / "C", "2.jpg")
    assert (first["captions"], first["caption_language"]) == ([ENGLISH], "en")
    assert last["captions"] == captions[2][:2]
