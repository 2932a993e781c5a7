"""Tokenizers: captions to token ids, cut to the encoder's length, and how long they are uncut.

A tokenizer without a vocabulary is refused: transformers makes one of special tokens alone where the files are missing, and it reads
every caption alike.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tim.pretrained import weight_files
from tim.pretrained.weight_files import HUB, in_words
from tim.text.byte_pairs import simple_tokenizer

KEY = "text.tokenizer"
PARTS = ("tokenizer",)  # sub-folders of a pipeline that hold a tokenizer
ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # text_encoder_2 has tokenizer_2 beside it
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json", "*.model", "*.tiktoken")
_WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")  # they read bytes or characters
_USUAL = ("tokenizer.json", "vocab.txt", "vocab.json and merges.txt", "spiece.model", "tokenizer.model")
_SAMPLES = 8
log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Captions to token ids, at most `max_tokens` each."""

    max_tokens: int

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of every caption, cut."""
        ...

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of every caption before it is cut; more than `max_tokens` are not read."""
        ...

    def samples(self) -> list[str]:
        """A few words of its vocabulary."""
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
        pairs, most = self._pairs, self.max_tokens - 2
        return [[pairs.sot_token_id, *pairs.encode(caption)[:most], pairs.eot_token_id] for caption in captions]

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(self._pairs.encode(caption)) + 2 for caption in captions]

    def samples(self) -> list[str]:
        return []


class PretrainedTokenizer:
    """A tokenizer of transformers, from a folder. Raises ValueError where it has none that can be used, naming the files it lacks."""

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._found = _load(folder)
        words = self.samples()
        if len(words) < 2 or len({tuple(ids) for ids in self._ids(words)}) < 2:
            raise _unusable(folder, "it knows no words, special tokens alone", self._found)

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        return self._ids(captions, truncation=True, max_length=self.max_tokens)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._ids(captions, verbose=False)]

    def samples(self) -> list[str]:
        special = set(self._found.all_special_tokens)
        vocabulary = sorted((number, token) for token, number in self._found.get_vocab().items() if token not in special)
        step = max(1, len(vocabulary) // (2 * _SAMPLES))
        words = [self._found.convert_tokens_to_string([token]).strip() for _, token in vocabulary[::step]]
        return [*dict.fromkeys(word for word in words if word and "\ufffd" not in word)][: 4 * _SAMPLES]

    def _ids(self, captions: Sequence[str], **settings: Any) -> list[list[int]]:
        return [list(ids) for ids in self._found(list(captions), **settings)["input_ids"]] if captions else []


def tokenizer_folder(encoder: weight_files.Location, *, path: str | Path, tokenizer: str | Path | None) -> Path:
    """The folder of a text encoder's tokenizer: the one that is named; else the encoder's own, or where that has no vocabulary the one
    beside it in a pipeline.

    encoder: where the encoder is; path: how that was written. Raises ValueError where the named folder is none.
    """
    if tokenizer is not None:
        try:
            return weight_files.local_folder(tokenizer, parts=PARTS)
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error
    folder = encoder.folder
    if _has_vocabulary(folder) or not folder.name.startswith(ENCODER):
        return folder
    beside = folder.name.replace(ENCODER, TOKENIZER, 1)
    if str(path).startswith(HUB):
        owner, name = str(path).removeprefix(HUB).split("/")[:2]
        found = weight_files.local_folder(f"{HUB}{owner}/{name}/{beside}")
    else:
        found = folder.resolve().parent / beside
    if not _has_vocabulary(found):
        return folder
    log.info("%s has no tokenizer: the one beside it is taken, %s", folder, found)
    return found


def transformers_library() -> Any:
    """The library. Raises ValueError where it is not installed."""
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("text encoder hf needs transformers: pip install 'tim[latent]'") from None
    return transformers


def _load(folder: Path) -> Any:
    transformers = transformers_library()
    if not _has_vocabulary(folder):
        raise _unusable(folder, "there is no vocabulary in it", _class_of(folder, transformers))
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise what the Rust library raises, a plain Exception
        raise _unusable(folder, in_words(error).partition(": (1)")[0], _class_of(folder, transformers)) from error


def _has_vocabulary(folder: Path) -> bool:
    if any(file.is_file() for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        return True
    try:
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and str(described.get("tokenizer_class")).removesuffix("Fast") in _WITHOUT_VOCABULARY


def _class_of(folder: Path, transformers: Any) -> Any:
    """The class of tokenizers that the model in a folder has; None where transformers knows none for it."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found = transformers.TOKENIZER_MAPPING[type(config)]
    except (OSError, ValueError, KeyError):
        return None
    return next((each for each in found if each is not None), None) if isinstance(found, tuple) else found


def _unusable(folder: Path, why: str, kind: Any) -> ValueError:
    """The error for a folder without a tokenizer. kind: its tokenizer or the class of it, which says the files it is made of."""
    named = [str(name) for name in (getattr(kind, "vocab_files_names", None) or {}).values()]
    alone = [name for name in named if name not in ("vocab.json", "merges.txt")]
    pairs = ["vocab.json and merges.txt"] if "merges.txt" in named else []
    files = [*dict.fromkeys(["tokenizer.json", *alone, *pairs])] if named else [*_USUAL]
    present = [name for name in _files(files) if (folder / name).is_file()]
    missing = " or ".join(files) if not present else f"a readable {' or '.join(present)}"
    return ValueError(
        f"{folder}: has no usable tokenizer ({why}): missing {missing}; "
        f"name the folder that has them as {KEY} (a pipeline keeps {TOKENIZER}/ beside {ENCODER}/)"
    )


def _files(alternatives: Sequence[str]) -> list[str]:
    return [name for each in alternatives for name in each.split(" and ")]
