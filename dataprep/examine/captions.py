"""What becomes of the captions of an input: cleaned, those in other languages left out, in their order of preference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import unescape
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.corpus.captions import clean_captions
from pipeline.corpus.record_fields import Value

LANGUAGE = "caption_language"
_URL = re.compile(r"(?:\b[a-z][a-z0-9+.-]{1,9}://|\bwww\.)[^\s<>\"']+", re.IGNORECASE)
_TAG = re.compile(r"/?[a-z]|!", re.IGNORECASE)  # what follows a < that begins one
_UNSEEN = re.compile(r"(script|style)\b|!--", re.IGNORECASE)  # and one whose content is not for readers
_ROOM = 16  # times `max_characters` are looked at: what is left of markup is short


class CaptionConfig(BaseModel):
    """`required`: reject an image that has neither a caption nor a class. `max_characters`: longer captions are cut.

    `per_line`: each line of a caption text is a caption of its own; without it, line ends are white space.
    `max_count`: of several captions, at most so many are kept, the preferred ones. `strip_html`: markup is taken out, and character
    references are read. `strip_urls`: addresses are taken out. `languages`: two-letter codes (ISO 639-1); captions in others are left out,
    and an image that has none in these is rejected. `language_column`: the column of the source that states the language of its captions;
    without it, each caption's is detected, and it counts as one in `languages` if they have `min_language_probability` together. (0.05
    was chosen on 411 short English captions, of which it leaves out one, and 72 in twelve other languages, of which it lets none in.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    required: bool = True
    per_line: bool = False
    max_characters: int = Field(default=4096, ge=1, le=1_000_000)
    max_count: int | None = Field(default=None, ge=1)
    strip_html: bool = False
    strip_urls: bool = False
    languages: tuple[str, ...] = ()
    language_column: str | None = Field(default=None, min_length=1)
    min_language_probability: float = Field(default=0.05, gt=0, le=1)

    @property
    def detects(self) -> bool:
        """Whether languages are detected, for no column states them."""
        return bool(self.languages) and self.language_column is None


@dataclass(frozen=True, slots=True)
class Captions:
    """Clean captions in order of preference; whether one was cut; the language of the first, if it was detected; and why none is left, if
    that is for their languages."""

    texts: list[str]
    was_cut: bool
    language: str = ""
    rejection: tuple[str, str] | None = None


def prepare_captions(texts: Sequence[str], *, extra: Mapping[str, Value], config: CaptionConfig) -> Captions:
    """Clean the captions of an input, whose further columns are `extra`, and choose among them."""
    if config.per_line:
        texts = [line for text in texts for line in text.splitlines()]
    if config.strip_html or config.strip_urls:
        texts = [_without_markup(text[: _ROOM * config.max_characters], config=config) for text in texts]
    clean, was_cut = clean_captions(texts, max_characters=config.max_characters)
    if not config.languages or not clean:
        return Captions(clean[: config.max_count], was_cut)
    if config.language_column is not None:
        stated = str(extra.get(config.language_column) or "").strip()
        spoken = [re.split(r"[-_]", stated.lower())[0]] * len(clean)
    else:
        spoken = [_detect(text, config=config) for text in clean]
    kept = [(text, language) for text, language in zip(clean, spoken, strict=True) if language in config.languages]
    if not kept:
        found = ", ".join(dict.fromkeys(language or "unknown" for language in spoken))
        return Captions([], was_cut, rejection=("filter:language", f"captions in {found}, captions.languages={','.join(config.languages)}"))
    language = kept[0][1] if config.language_column is None else ""
    return Captions([text for text, _ in kept[: config.max_count]], was_cut, language=language)


def check_languages(config: CaptionConfig) -> None:
    """Raises ValueError if languages are asked for that nothing here can tell, in one line that says what to do."""
    odd = next((code for code in config.languages if not re.fullmatch(r"[a-z]{2}", code)), None)
    if odd is not None:
        raise ValueError(f"captions.languages: {odd!r} is not a two-letter code such as en")
    if config.detects:
        unknown = sorted({*config.languages} - {*_identifier().nb_classes})
        if unknown:
            raise ValueError(f"captions.languages: {', '.join(unknown)} cannot be detected; name a captions.language_column that states it")


def _detect(text: str, *, config: CaptionConfig) -> str:
    """The likeliest of the languages that are asked for, if they are likely enough, or else the likeliest of all: a two-letter code."""
    ranked = [(str(code), float(probability)) for code, probability in _identifier().rank(text)]
    wanted = [(code, probability) for code, probability in ranked if code in config.languages]
    is_likely = sum(probability for _, probability in wanted) >= config.min_language_probability
    return (wanted if is_likely else ranked)[0][0]


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("captions.languages: needs py3langid (pip install 'tim[language]'), or a captions.language_column") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([code for code in identifier.nb_classes if len(code) == 2])  # pidgins and the like draw English captions
    return identifier


def _without_markup(text: str, *, config: CaptionConfig) -> str:
    if config.strip_html and ("<" in text or "&" in text):
        text = unescape(_without_tags(text))
    return _URL.sub(" ", text) if config.strip_urls else text


def _without_tags(text: str) -> str:
    """Every part of the text is looked at once, whatever it is made of."""
    first, *parts = text.split("<")
    kept = [first]
    ending = ""  # of what is left out as a whole
    for part in parts:
        if ending == "-->":
            _, end, rest = part.partition("-->")
            ending = "" if end else "-->"
        elif ending:
            is_end = part[: len(ending)].lower() == ending
            ending, rest = ("", part.partition(">")[2]) if is_end else (ending, "")
        elif unseen := _UNSEEN.match(part):
            if unseen[1]:
                ending, rest = f"/{unseen[1].lower()}", ""
            else:
                _, end, rest = part.partition("-->")
                ending = "" if end else "-->"
        elif _TAG.match(part) and ">" in part:
            rest = part.partition(">")[2]
        else:
            kept.append(f"<{part}")
            continue
        kept.append(f" {rest}")
    return "".join(kept)
