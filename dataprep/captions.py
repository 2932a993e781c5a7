"""What a preparation demands of captions."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CaptionConfig(BaseModel):
    """`required`: reject a picture that has neither a caption nor a class. `max_characters`: longer captions are cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    required: bool = True
    max_characters: int = Field(default=4096, ge=1, le=1_000_000)
