"""Captions that are longer than a run's text encoder reads: what `tim plan`, `tim train` and `tim sample` say of them."""

from __future__ import annotations

from collections.abc import Sequence

from dataprep.report.caption_lengths import CaptionLengths, measure, sample_captions
from launch.config.schema import Config
from pipeline.planning.planner import Planner
from tim.text.tokenizers import Tokenizer


def caption_lengths(config: Config, planner: Planner) -> CaptionLengths | None:
    """Measured on a sample of the captions; None for models of classes, and where the tokenizer is not here: planning does without."""
    from tim.text import encoders

    words = config.text
    if config.condition != "text":
        return None
    try:
        tokenizer = encoders.tokenizer(words.kind, words.path, tokenizer_path=words.tokenizer, max_tokens=words.max_tokens)
    except ValueError:
        return None
    return measure(sample_captions(planner.corpora), tokenizer=tokenizer)


def cut_prompts(prompts: Sequence[str], *, tokenizer: Tokenizer) -> list[str]:
    """One remark for every prompt that is cut."""
    lengths = zip(prompts, tokenizer.lengths(prompts), strict=True)
    return [
        f"prompt {prompt[:40]!r}{'…' * (len(prompt) > 40)} is cut: the first {tokenizer.max_tokens} of its {length} tokens are read"
        for prompt, length in lengths
        if length > tokenizer.max_tokens
    ]
