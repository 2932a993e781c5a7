"""Estimate how many captions exceed the limit of a text encoder, from a sample of a corpus's tables. No image is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.corpus.corpus import Corpus

if TYPE_CHECKING:  # torch is slow to import, and the workers of `tim prepare` import this file without it
    from tim.text.tokenizers import Tokenizer

SAMPLED = 2000  # captions
USUAL_TOKENS = 77  # the default of text.max_tokens
_MAX_SHARDS = 16  # sampled, evenly spaced


@dataclass(frozen=True, slots=True)
class CaptionLengths:
    """Of `sampled` captions, `cut` exceed `max_tokens`; the longest has `longest` tokens."""

    sampled: int
    cut: int
    longest: int
    max_tokens: int

    def __str__(self) -> str:
        counted = f"{self.cut} of {self.sampled} sampled captions"
        return f"{counted} are longer than text.max_tokens {self.max_tokens} and are cut; the longest has {self.longest} tokens"


def sample_captions(corpora: Sequence[Corpus], *, most: int = SAMPLED) -> list[str]:
    """All captions of about `most` rows, evenly spaced in evenly spaced shards."""
    captions: list[str] = []
    for corpus in corpora:
        shards = range(0, len(corpus.shards), -(-len(corpus.shards) // _MAX_SHARDS) or 1)
        rows = max(1, most // (len(corpora) * max(1, len(shards))))
        for shard in shards:
            column = corpus.read(shard, columns=("captions",)).column("captions")
            step = max(1, len(column) // rows)
            captions += [caption for each in column[::step].to_pylist() for caption in each or []]
    return captions


def measure(captions: Sequence[str], *, tokenizer: Tokenizer) -> CaptionLengths:
    """Count the captions that `tokenizer` cuts."""
    lengths = tokenizer.lengths(captions)
    cut = sum(length > tokenizer.max_tokens for length in lengths)
    return CaptionLengths(sampled=len(lengths), cut=cut, longest=max(lengths, default=0), max_tokens=tokenizer.max_tokens)


def beyond_usual(captions: Sequence[str]) -> int:
    """Number of captions with more than `USUAL_TOKENS` CLIP tokens. A token has at least one byte, so short captions are skipped."""
    long = [caption for caption in captions if len(caption.encode()) > USUAL_TOKENS - 2]
    if not long:
        return 0
    from tim.text.tokenizers import BytePairs

    return measure(long, tokenizer=BytePairs(max_tokens=USUAL_TOKENS)).cut
