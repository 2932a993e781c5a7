"""Warnings about prompts that exceed the text encoder's token limit."""

from __future__ import annotations

from collections.abc import Sequence

from tim.text.prompt_encoder import PromptEncoder


def cut_prompts(prompts: Sequence[str], *, encoder: PromptEncoder) -> list[str]:
    """One warning per prompt that is truncated. The tokenizer, which takes long to load, is used only if cached features do not tell."""
    uncertain = [prompt for prompt in prompts if not encoder.is_known_to_fit(prompt)]
    if not uncertain:
        return []
    tokenizer = encoder.tokenizer
    lengths = zip(uncertain, tokenizer.lengths(uncertain), strict=True)
    return [
        f"prompt {prompt[:40]!r}{'…' * (len(prompt) > 40)} is truncated: its first {tokenizer.max_tokens} of {length} tokens are used"
        for prompt, length in lengths
        if length > tokenizer.max_tokens
    ]
