"""Clean the captions of an input, and select those in the wanted languages, in order of preference."""

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
_TAG = re.compile(r"/?[a-z]|!", re.IGNORECASE)  # what follows the < of a tag
_HIDDEN = re.compile(r"(script|style)\b|!--", re.IGNORECASE)  # and of a tag whose content is not shown
_ROOM = 16  # times `max_characters` are read: text without its markup is short


class CaptionConfig(BaseModel):
    """`required`: reject an image that has neither a caption nor a class. `max_characters`: longer captions are cut.

    `per_line`: each line of a caption text is a separate caption; by default line ends are white space. `max_count`: keep at most this many
    captions, the preferred ones. `strip_html`: remove markup and decode character references. `strip_urls`: remove URLs. `languages`:
    two-letter codes (ISO 639-1); captions in other languages are left out, and an image without a caption in these is rejected.
    `language_column`: the column of the source with the language of its captions. Without it, languages are detected: a caption counts as
    one in `languages` if their probabilities sum to `min_language_probability`. (0.05 was chosen on 411 short English captions, of which
    it leaves out one, and 72 in twelve other languages, of which it accepts none.)
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
        """Whether languages are detected because no column states them."""
        return bool(self.languages) and self.language_column is None


@dataclass(frozen=True, slots=True)
class Captions:
    """Clean captions in order of preference; whether one was cut; the language of the first, if detected; (reason, detail) if all were
    rejected for their languages."""

    texts: list[str]
    was_cut: bool
    language: str = ""
    rejection: tuple[str, str] | None = None


def prepare_captions(texts: Sequence[str], *, extra: Mapping[str, Value], config: CaptionConfig) -> Captions:
    """Clean and select the captions of an input whose extra columns are `extra`."""
    if config.per_line:
        texts = [line for text in texts for line in text.splitlines()]
    if config.strip_html or config.strip_urls:
        texts = [_without_markup(text[: _ROOM * config.max_characters], config=config) for text in texts]
    clean, was_cut = clean_captions(texts, max_characters=config.max_characters)
    if not config.languages or not clean:
        return Captions(clean[: config.max_count], was_cut)
    if config.language_column is not None:
        stated = str(extra.get(config.language_column) or "").strip()
        languages = [re.split(r"[-_]", stated.lower())[0]] * len(clean)
    else:
        languages = [_detect(text, config=config) for text in clean]
    kept = [(text, language) for text, language in zip(clean, languages, strict=True) if language in config.languages]
    if not kept:
        found = ", ".join(dict.fromkeys(language or "unknown" for language in languages))
        return Captions([], was_cut, rejection=("filter:language", f"captions in {found}, captions.languages={','.join(config.languages)}"))
    language = kept[0][1] if config.language_column is None else ""
    return Captions([text for text, _ in kept[: config.max_count]], was_cut, language=language)


def check_languages(config: CaptionConfig) -> None:
    """Raises ValueError if a language in the config cannot be detected."""
    invalid = next((code for code in config.languages if not re.fullmatch(r"[a-z]{2}", code)), None)
    if invalid is not None:
        raise ValueError(f"captions.languages: {invalid!r} is not a two-letter code such as en")
    if config.detects:
        unknown = sorted({*config.languages} - {*_identifier().nb_classes})
        if unknown:
            raise ValueError(f"captions.languages: {', '.join(unknown)} cannot be detected; name a captions.language_column that states it")


def _detect(text: str, *, config: CaptionConfig) -> str:
    """The two-letter code of the most probable wanted language, if these are probable enough, else of the most probable language."""
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
    # without three-letter codes: short English captions are mistaken for pidgins and the like
    identifier.set_languages([code for code in identifier.nb_classes if len(code) == 2])
    return identifier


def _without_markup(text: str, *, config: CaptionConfig) -> str:
    if config.strip_html and ("<" in text or "&" in text):
        text = unescape(_without_tags(text))
    return _URL.sub(" ", text) if config.strip_urls else text


def _without_tags(text: str) -> str:
    """Linear time for any text."""
    first, *parts = text.split("<")
    kept = [first]
    ending = ""  # of an element that is removed with its content
    for part in parts:
        if ending == "-->":
            _, end, rest = part.partition("-->")
            ending = "" if end else "-->"
        elif ending:
            is_end = part[: len(ending)].lower() == ending
            ending, rest = ("", part.partition(">")[2]) if is_end else (ending, "")
        elif hidden := _HIDDEN.match(part):
            if hidden[1]:
                ending, rest = f"/{hidden[1].lower()}", ""
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
