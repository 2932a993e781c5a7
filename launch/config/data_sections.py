"""Sections about data: corpora, codec, text encoder, loader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from launch.config.section import Section, Share
from launch.config.yaml_file import ConfigConflict
from pipeline.corpus.row_filter import Where
from pipeline.planning.config import Weight
from tim.kinds import CodecKind, Precision, TextKind


class CorpusConfig(Section):
    path: str
    """A corpus folder, as `tim prepare` writes it, or its URL: s3://…, gs://…, https://…, hf://…"""
    name: str | None = None
    """What its samples' ids start with; default: the name in its manifest."""
    features: Annotated[Path, Field(strict=False)] | None = None
    """A folder of precomputed latents and text features of it, read in place of its images and captions."""
    weight: Weight | None = None
    """Its share of all images, relative to the weights of the other corpora; null: every image is seen equally often. To know how many
    there are of each, the tables of several corpora without weights are read once at the start."""
    repeats: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often it is gone through while a corpus with repeats 1 is gone through once."""
    cap: int | None = Field(default=None, ge=1)
    """At most so many of its images in each epoch of it, other ones every time."""
    where: str | None = None
    """Only images for whose row in the corpus's tables this is true: 'clip >= 0.28 and width*height > 5e5'."""
    exclude: Annotated[Path, Field(strict=False)] | None = None
    """A parquet file; images whose key is in its column `key` are left out."""

    @model_validator(mode="after")
    def _check(self) -> CorpusConfig:
        if self.weight is not None and self.repeats != 1:
            raise ConfigConflict("repeats", "weight and repeats both say how much of the corpus is seen: give one of them")
        if self.where is not None:
            try:
                Where(self.where)
            except ValueError as error:
                raise ConfigConflict("where", str(error)) from None
        return self


def as_corpora(value: Any) -> Any:
    """`corpus: PATH` is short for a list of one."""
    items = value if isinstance(value, list) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class CodecConfig(Section):
    kind: CodecKind = "pixel"
    """How images become latents; `pixel` is the image itself, the others are autoencoders of diffusers (`tim/codecs.py`)."""
    path: str | None = None
    """Their weights: a folder that diffusers reads, one file of weights in it, a pipeline, or hf://OWNER/NAME[/FOLDER]. Planning needs
    those of `kl` and `tiny` only."""

    @model_validator(mode="after")
    def _check(self) -> CodecConfig:
        if self.kind == "pixel" and self.path is not None:
            raise ConfigConflict("path", "pixel needs no weights: leave it out, or give another kind")
        return self


class TagsConfig(Section):
    """For captions that are lists of tags: they are put in another order every time."""

    share: Share = 1.0
    """Share of images whose tags are shuffled."""
    separator: str = Field(default=", ", min_length=1)
    """What stands between tags; blanks around it do not count."""
    keep: int = Field(default=0, ge=0)
    """So many tags stay in front."""


class TextConfig(Section):
    kind: TextKind = "lookup"
    """How captions become features; `lookup` is a frozen table of random embeddings, `open_clip` the text tower of a CLIP, `hf` a text
    encoder or language model of transformers (`tim/text/encoders.py`)."""
    path: str | None = None
    """The weights of the latter two: a folder, one file of weights in it, a pipeline, or hf://OWNER/NAME[/FOLDER]."""
    tokenizer: str | None = None
    """The folder of the tokenizer of `hf`, likewise; null: that of path, or in a pipeline the one beside it."""
    precision: Precision = "fp32"
    """Of the text encoder; bf16: autocast."""
    max_tokens: int = Field(default=77, ge=2, le=4096)
    """Longer captions are cut."""
    caption_dropout: Share = 0.1
    """Share of images trained with the empty caption, for guidance."""
    caption_weights: tuple[Weight, ...] = (1.0,)
    """Relative weights of an image's 1st, 2nd, … caption, of which one is drawn every time; further ones weigh as much as the last."""
    shuffle_tags: TagsConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.kind == "lookup" and self.path is not None:
            raise ConfigConflict("path", "lookup needs no weights: leave it out, or give another kind")
        if self.kind != "hf" and self.tokenizer is not None:
            raise ConfigConflict("tokenizer", f"{self.kind} has CLIP's tokenizer: leave it out, or use kind hf")
        if not any(self.caption_weights):
            raise ConfigConflict("caption_weights", "one caption at least must weigh something")
        return self


class CacheConfig(Section):
    """Whole remote shards on a local disk; without it, the wanted parts of shards are read from where they are."""

    dir: Annotated[Path, Field(strict=False)]
    """A folder on a disk of each machine; all processes share it, and so may other runs."""
    bytes: int = Field(ge=1)
    """Room for shards; those that were not read for longest go first."""


class LoaderConfig(Section):
    workers: int = Field(default=2, ge=0)
    """Processes per rank that decode images; 0: none but the training process, which an image that crashes its decoder then ends."""
    prefetch: int = Field(default=2, ge=1)
    """Steps that are read ahead."""
    max_bad_fraction: Share = 0.01
    """The run stops when more than this share of images cannot be loaded."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """A shard that is missing, cut off or not what its digest says stops the run, or leaves the places of its images empty."""
    verify: bool = False
    """Compare local shards with their digests when they are first read; what the cache downloads is always compared."""
    cache: CacheConfig | None = None
    timeout: float = Field(default=300.0, gt=0)
    """The run stops when storage gives nothing for so many seconds; an image that takes as long to decode is left out and counted."""
