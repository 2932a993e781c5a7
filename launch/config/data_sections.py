"""Data sections: corpora, codec, text encoder, loader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from launch.config.section import Section, Share
from launch.config.yaml_file import ConfigConflict
from pipeline.corpus.row_filter import Where
from pipeline.planning.config import Weight
from tim.model_kinds import CodecKind, Precision, TextKind


class CorpusConfig(Section):
    path: str
    """A corpus folder written by `tim prepare`, or its URL: s3://…, gs://…, https://…, hf://…"""
    name: str | None = None
    """Prefix of its sample ids; default: the name in its manifest."""
    features: Annotated[Path, Field(strict=False)] | None = None
    """A folder of precomputed latents and text features, read instead of the images and captions."""
    weight: Weight | None = None
    """Share of all images, relative to the weights of the other corpora; null: every image is seen equally often. With several corpora
    and no weights, all tables are read once at the start to count the images."""
    repeats: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Number of passes over this corpus per pass over a corpus with repeats 1."""
    cap: int | None = Field(default=None, ge=1)
    """At most this many images per epoch, a different subset each time."""
    where: str | None = None
    """Keep only images whose row in the corpus's tables satisfies this expression: 'clip >= 0.28 and width*height > 5e5'."""
    exclude: Annotated[Path, Field(strict=False)] | None = None
    """A parquet file; images whose key is in its column `key` are excluded."""
    loss_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor of the loss of its images, such as 0.5 for regularisation images. Does not change which images a step has, and the sum of the
    losses is still divided by their number. Can be changed when a run is resumed."""

    @model_validator(mode="after")
    def _check(self) -> CorpusConfig:
        if self.weight is not None and self.repeats != 1:
            raise ConfigConflict("repeats", "weight and repeats both set how often the corpus is seen: give one of them")
        if self.where is not None:
            try:
                Where(self.where)
            except ValueError as error:
                raise ConfigConflict("where", str(error)) from None
        return self


def as_corpora(value: Any) -> Any:
    """Expand the short form `corpus: PATH` to a list with one entry."""
    items = value if isinstance(value, list) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class ValidationConfig(Section):
    """Loss on images that are not trained on, at fixed times and noise. Give either `share` or `corpus`."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of each corpus that is never trained on, by hash of the sample ids: the same images in every run."""
    corpus: Annotated[tuple[CorpusConfig, ...], BeforeValidator(as_corpora)] = ()
    """Other corpora, in the form of `corpus`, without weight, repeats and cap. Images that `corpus` selects as well are refused."""
    every: int = Field(default=500, ge=1)
    """Steps between validations; another one is at the end."""
    images: int = Field(default=512, ge=1)
    """Use at most this many images, always the same."""

    @model_validator(mode="after")
    def _check(self) -> ValidationConfig:
        if (self.share is None) == (not self.corpus):
            raise ConfigConflict("share", "give either the share of the corpus, or validation.corpus")
        if any((each.weight, each.repeats, each.cap) != (None, 1, None) for each in self.corpus):
            raise ConfigConflict("corpus", "weight, repeats and cap have no effect here: leave them out")
        return self


class CodecConfig(Section):
    kind: CodecKind = "pixel"
    """Image codec: `pixel` trains on pixels, the others are diffusers autoencoders (`tim/codecs/`)."""
    path: str | None = None
    """Weights of the autoencoder: a diffusers folder, a weight file, a pipeline, or hf://OWNER/NAME[/FOLDER]. Planning needs them only for
    `kl` and `tiny`."""
    channels: Literal[1, 3, 4] | None = None
    """Channels of `pixel`: 1 (grey), 3 (RGB, the default) or 4 (RGBA). With one channel the cosine term of the loss compares signs only."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory limit of an autoencoder's activations in 10⁹ bytes: larger images are processed in tiles, without seams. null: half of the
    device's memory."""

    @model_validator(mode="after")
    def _check(self) -> CodecConfig:
        if self.kind == "pixel" and self.path is not None:
            raise ConfigConflict("path", "pixel has no weights: leave it out, or give another kind")
        if self.kind == "pixel" and self.memory_gb is not None:
            raise ConfigConflict("memory_gb", "pixel is never processed in tiles: leave it out, or give another kind")
        if self.kind != "pixel" and self.channels is not None:
            raise ConfigConflict("channels", f"the channels of {self.kind} are those of its weights: leave it out, or give kind pixel")
        return self


class TagsConfig(Section):
    """Shuffling of captions that are lists of tags, in a different order each time."""

    share: Share = 1.0
    """Share of images whose tags are shuffled."""
    separator: str = Field(default=", ", min_length=1)
    """Separator between tags; whitespace around it is ignored."""
    keep: int = Field(default=0, ge=0)
    """Number of leading tags that keep their place."""


class TextConfig(Section):
    kind: TextKind = "lookup"
    """Text encoder: `lookup` is a frozen table of random embeddings, `open_clip` the text tower of a CLIP model, `hf` a text encoder or
    language model of transformers (`tim/text/encoders.py`)."""
    path: str | None = None
    """Weights for `open_clip` and `hf`: a folder, a weight file in one, a pipeline, or hf://OWNER/NAME[/FOLDER]."""
    tokenizer: str | None = None
    """Tokenizer folder for `hf`, in the same forms; null: the one in path, or in a pipeline its tokenizer folder."""
    precision: Precision = "fp32"
    """Precision of the text encoder; bf16: autocast."""
    max_tokens: int = Field(default=77, ge=2, le=4096)
    """Longer captions are truncated."""
    caption_dropout: Share = 0.1
    """Share of images trained with the empty caption, for classifier-free guidance."""
    caption_weights: tuple[Weight, ...] = (1.0,)
    """Relative weights of an image's 1st, 2nd, … caption. One caption is drawn each time; further captions have the last weight."""
    shuffle_tags: TagsConfig | None = None
    """Shuffle captions that are lists of tags; null: never."""

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.kind == "lookup" and self.path is not None:
            raise ConfigConflict("path", "lookup has no weights: leave it out, or give another kind")
        if self.kind != "hf" and self.tokenizer is not None:
            raise ConfigConflict("tokenizer", f"{self.kind} uses CLIP's tokenizer: leave it out, or use kind hf")
        if not any(self.caption_weights):
            raise ConfigConflict("caption_weights", "at least one weight must be above 0")
        return self


class CacheConfig(Section):
    """Local disk cache of whole remote shards; without it, only the needed byte ranges are read from remote storage."""

    dir: Annotated[Path, Field(strict=False)]
    """A folder on a local disk of each machine, shared by all processes; other runs may share it, too."""
    bytes: int = Field(ge=1)
    """Size limit in bytes; the least recently used shards are evicted first."""


class LoaderConfig(Section):
    workers: int = Field(default=2, ge=0)
    """Decoding processes per rank; 0: decode in the training process, where an image that crashes the decoder ends the run."""
    prefetch: int = Field(default=2, ge=1)
    """Number of steps loaded ahead."""
    max_bad_fraction: Share = 0.01
    """Stop the run if more than this share of images cannot be loaded, is in a skipped shard, or makes the loss non-finite."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """A shard that is missing, truncated or does not match its digest stops the run (error), or its images are skipped (skip)."""
    verify: bool = False
    """Verify the digests of local shards when they are first read; shards that the cache downloads are always verified."""
    cache: CacheConfig | None = None
    """Local disk cache of remote shards; null: none."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds without data from storage after which the run stops; an image that takes this long to decode is skipped and counted."""
