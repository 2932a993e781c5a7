"""Warnings about prompts that exceed the text encoder's token limit."""

from __future__ import annotations

from collections.abc import Sequence

from tim.text.tokenizers import Tokenizer


def cut_prompts(prompts: Sequence[str], *, tokenizer: Tokenizer) -> list[str]:
    """One warning per prompt that is truncated."""
    lengths = zip(prompts, tokenizer.lengths(prompts), strict=True)
    return [
        f"prompt {prompt[:40]!r}{'…' * (len(prompt) > 40)} is truncated: its first {tokenizer.max_tokens} of {length} tokens are used"
        for prompt, length in lengths
        if length > tokenizer.max_tokens
    ]
