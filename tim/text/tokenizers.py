"""Tokenizers: captions to token ids, truncated to the encoder's length, and their untruncated lengths.

A tokenizer without a vocabulary is rejected: if files are missing, transformers builds one with special tokens only, for which all
captions are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tim.pretrained import hub, weight_files
from tim.pretrained.weight_files import HUB, one_line
from tim.text.byte_pairs import simple_tokenizer

KEY = "text.tokenizer"
PARTS = ("tokenizer",)  # sub-folders of a diffusers pipeline with a tokenizer
ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # text_encoder_2 goes with tokenizer_2
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json", "*.model", "*.tiktoken")
_WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # they read bytes or characters
_USUAL = ("tokenizer.json", "vocab.txt", "vocab.json and merges.txt", "spiece.model", "tokenizer.model")
_SAMPLES = 8
log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Captions to token ids, at most `max_tokens` each."""

    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids per caption, truncated."""
        ...

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens per caption before truncation to `max_tokens`."""
        ...

    def samples(self) -> list[str]:
        """A few words of the vocabulary."""
        ...


class BytePairs:
    """CLIP's tokens, between a start and an end token."""

    def __init__(self, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._pairs = simple_tokenizer()

    @property
    def size(self) -> int:
        return self._pairs.vocab_size

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        pairs, limit = self._pairs, self.max_tokens - 2
        return [[pairs.sot_token_id, *pairs.encode(caption)[:limit], pairs.eot_token_id] for caption in captions]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(self._pairs.encode(caption)) + 2 for caption in captions]

    def samples(self) -> list[str]:
        return []


class PretrainedTokenizer:
    """A transformers tokenizer from a folder. Raises ValueError naming the missing files if there is no usable one."""

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer = _load(folder)
        words = self.samples()
        if len(words) < 2 or len({tuple(ids) for ids in self._ids(words)}) < 2:
            raise _unusable(folder, "it has special tokens only", self._tokenizer)

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        return self._ids(captions, truncation=True, max_length=self.max_tokens)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._ids(captions, verbose=False)]

    def samples(self) -> list[str]:
        special = set(self._tokenizer.all_special_tokens)
        vocabulary = sorted((number, token) for token, number in self._tokenizer.get_vocab().items() if token not in special)
        step = max(1, len(vocabulary) // (2 * _SAMPLES))
        words = [self._tokenizer.convert_tokens_to_string([token]).strip() for _, token in vocabulary[::step]]
        return [*dict.fromkeys(word for word in words if word and "\ufffd" not in word)][: 4 * _SAMPLES]

    def _ids(self, captions: Sequence[str], **settings: Any) -> list[list[int]]:
        return [list(ids) for ids in self._tokenizer(list(captions), **settings)["input_ids"]] if captions else []


def tokenizer_folder(encoder: weight_files.Location, *, path: str | Path, tokenizer: str | Path | None) -> Path:
    """The folder of a text encoder's tokenizer: `tokenizer` if given, else the encoder's own, or if that has no vocabulary, the sibling
    tokenizer folder of a pipeline.

    encoder: the encoder's location; path: the encoder's path as configured. Raises ValueError if `tokenizer` is not a folder.
    """
    if tokenizer is not None:
        try:
            return weight_files.local_folder(tokenizer, parts=PARTS)
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error
    folder = encoder.folder
    if _has_vocabulary(folder) or not folder.name.startswith(ENCODER):
        return folder
    sibling = folder.name.replace(ENCODER, TOKENIZER, 1)
    if str(path).startswith(HUB):
        address = hub.parse(str(path))
        above = address.inside.rpartition("/")[0]
        found = weight_files.local_folder(str(address._replace(inside=f"{above}/{sibling}" if above else sibling)))
    else:
        found = folder.resolve().parent / sibling
    if not _has_vocabulary(found):
        return folder
    log.info("%s has no tokenizer, using %s", folder, found)
    return found


def transformers_library() -> Any:
    """The transformers module. Raises ValueError if it is not installed."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("text encoder hf needs transformers: pip install 'tim[latent]'") from None
    return transformers


def _load(folder: Path) -> Any:
    transformers = transformers_library()
    if not _has_vocabulary(folder):
        raise _unusable(folder, "it has no vocabulary", _class_of(folder, transformers))
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise what the Rust library raises, a plain Exception
        raise _unusable(folder, one_line(error).partition(": (1)")[0], _class_of(folder, transformers)) from error


def _has_vocabulary(folder: Path) -> bool:
    if any(file.is_file() for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("tokenizer_class")).removesuffix("Fast") in _WITHOUT_VOCABULARY


def _class_of(folder: Path, transformers: Any) -> Any:
    """The tokenizer class of the model in a folder, None if transformers has none."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found = transformers.TOKENIZER_MAPPING[type(config)]
    except (OSError, ValueError, KeyError):
        return None
    return next((each for each in found if each is not None), None) if isinstance(found, tuple) else found


def _unusable(folder: Path, why: str, kind: Any) -> ValueError:
    """The error for a folder without a usable tokenizer. kind: its tokenizer or tokenizer class, which knows its files."""
    named = [str(name) for name in (getattr(kind, "vocab_files_names", None) or {}).values()]
    alone = [name for name in named if name not in ("vocab.json", "merges.txt")]
    pairs = ["vocab.json and merges.txt"] if "merges.txt" in named else []
    files = [*dict.fromkeys(["tokenizer.json", *alone, *pairs])] if named else [*_USUAL]
    present = [name for name in _files(files) if (folder / name).is_file()]
    missing = " or ".join(files) if not present else f"a readable {' or '.join(present)}"
    return ValueError(
        f"{folder}: has no usable tokenizer ({why}): missing {missing}; "
        f"set {KEY} to the folder that has them (in a pipeline, {TOKENIZER}/ is next to {ENCODER}/)"
    )


def _files(alternatives: Sequence[str]) -> list[str]:
    return [name for each in alternatives for name in each.split(" and ")]
