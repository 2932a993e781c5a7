"""Warnings about captions that exceed the text encoder's token limit."""

from __future__ import annotations

from dataprep.report.caption_lengths import CaptionLengths, measure, sample_captions
from launch.config.schema import Config
from pipeline.planning.planner import Planner


def caption_lengths(config: Config, planner: Planner) -> CaptionLengths | None:
    """Measure caption lengths on a sample. None for class models, or if the tokenizer is not available: planning does not need it."""
    from tim.text import encoders

    text = config.text
    if config.condition != "text":
        return None
    try:
        tokenizer = encoders.tokenizer(text.kind, text.path, tokenizer_path=text.tokenizer, max_tokens=text.max_tokens)
    except ValueError:
        return None
    return measure(sample_captions(planner.corpora), tokenizer=tokenizer)
