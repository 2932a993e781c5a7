"""The work of a reader process: planned samples → bytes → pixels, captions, time draws and noise. A pure function of the plan.

Does not import pyarrow, pydantic or the planner, because every worker process imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.corpus.captions import MAX_TEXT_BYTES, clean_captions, normalise
from pipeline.corpus.json_record import parse_json
from pipeline.corpus.record_fields import read_fields
from pipeline.corpus.tags import TagShuffle
from pipeline.corpus.text_decoding import decode_text
from pipeline.errors import kind_and_line
from pipeline.images import Rejection, load_image
from pipeline.images.masks import MASK_EXTENSION, BadMask, load_mask
from pipeline.loading.feature_reader import FeatureDecoder, SampleFeatures
from pipeline.planned_steps import Member, PlannedSample
from pipeline.randomness import generator, generators, to_uniform
from pipeline.storage.shard_reader import BadShard, ByteRange, ShardReader


class Failure(NamedTuple):
    """An unreadable sample: its position in the pack, the reason, and whether its whole shard is unusable."""

    position: int
    reason: str
    bad_shard: bool = False


class FetchedPack(NamedTuple):
    """The bytes of a pack: image, text, json, features and mask of every sample, or the error of reading them.

    Empty for parts that a sample does not have or need.
    """

    samples: Sequence[PlannedSample]
    images: list[memoryview | OSError]
    texts: list[memoryview | OSError]
    records: list[memoryview | OSError]
    features: list[memoryview | OSError]
    masks: list[memoryview | OSError]


class ReadPack(NamedTuple):
    """A decoded pack, for transfer between processes: few large tensors, because each costs a file descriptor.

    `pixels` is uint8, all images concatenated, (h, w, 3) each; `noise` float32, (C, h/factor, w/factor) each; `sizes` are (h, w) in
    pixels; `uniforms` is (B, 2). A failed sample is a black image of one stride. For a stochastic codec, `codec_noise` is like `noise`.
    Features give `latents`, float32 like `noise`, zero for a failed sample; `texts`, float32 (M, F) with M in `text_lengths`; and
    `teacher`, float32 (T, D). `masks` is float32, (1, h/factor, w/factor) each, if a sample has a loss mask. Parts that are not read are
    None.
    """

    pixels: Tensor | None
    noise: Tensor
    sizes: list[tuple[int, int]]
    captions: list[str]
    uniforms: NDArray[np.float64]
    failures: list[Failure]
    codec_noise: Tensor | None = None
    latents: Tensor | None = None
    texts: Tensor | None = None
    text_lengths: tuple[int, ...] = ()
    teacher: Tensor | None = None
    masks: Tensor | None = None


class DecodePack(Protocol):
    """Decode a fetched pack; see `PackReader.decode`."""

    def __call__(self, fetched: FetchedPack, /, *, begin: Callable[[int], None] = ..., lost: Mapping[int, str] = ...) -> ReadPack: ...


class PackReader:
    """Fetch and decode packs. Belongs to one process after its first read. Different threads may fetch and decode at the same time.

    Args:
        seed: of times, noise, tags and codec noise.
        stride: pixels per token side.
        channels: latent channels.
        factor: pixels per latent cell.
        shards: reads the bytes.
        pixels, captions: whether to read images and captions; otherwise they come from `features`.
        features: decodes cached features; None if there are none.
        stochastic_codec: whether the codec for the images samples its latents.
        shuffle_tags: for captions that are lists of tags.
    """

    def __init__(
        self,
        *,
        seed: int,
        stride: int,
        channels: int,
        factor: int,
        shards: ShardReader,
        pixels: bool = True,
        captions: bool = True,
        features: FeatureDecoder | None = None,
        stochastic_codec: bool = False,
        shuffle_tags: TagShuffle | None = None,
    ) -> None:
        self._seed = seed
        self._stride = stride
        self._channels = channels
        self._factor = factor
        self._shards = shards
        self._pixels = pixels
        self._captions = captions
        self._features = features
        self._stochastic_codec = stochastic_codec
        self._shuffle_tags = shuffle_tags

    def fetch(self, samples: Sequence[PlannedSample]) -> FetchedPack:
        """Read the bytes of a pack, from all its shards at once."""
        ranges: list[list[ByteRange]] = [[], [], [], [], []]
        has_masks = any(sample.mask.exists for sample in samples)
        for sample in samples:
            if self._pixels:
                ranges[0].append(ByteRange(sample.tar, sample.image.offset, sample.image.length))
            if self._captions:
                ranges[1].append(_text_range(sample, sample.text))
                ranges[2].append(_text_range(sample, sample.json))
            if self._features:
                ranges[3].append(ByteRange(sample.features_tar, sample.features.offset, sample.features.length))
            if has_masks:
                place = (sample.mask.offset, sample.mask.length) if sample.mask.exists else (sample.image.offset, 0)
                ranges[4].append(ByteRange(sample.tar, *place))
        contents = iter(self._shards.read_parts([part for parts in ranges for part in parts]))
        empty: list[memoryview | OSError] = [memoryview(b"")] * len(samples)
        return FetchedPack(samples, *([next(contents) for _ in parts] or empty for parts in ranges))

    def decode(
        self, fetched: FetchedPack, /, *, begin: Callable[[int], None] = lambda _: None, lost: Mapping[int, str] = MappingProxyType({})
    ) -> ReadPack:
        """Decode a pack. Unreadable samples are listed in `failures`. An empty pack becomes one dummy of one stride.

        `begin` is called with the position of each sample before it is decoded, and with −1 after the last. Samples at positions in `lost`
        are not decoded: they fail with the given reasons.
        """
        samples = fetched.samples
        area = sum(sample.height * sample.width for sample in samples) or self._stride**2
        pixels = np.zeros(3 * area if self._pixels else 0, dtype=np.uint8)
        blank = self._features.blank() if self._features else None
        sizes: list[tuple[int, int]] = []
        captions: list[str] = []
        features: list[SampleFeatures] = []
        masks: list[NDArray[np.float32] | None] = []
        failures: list[Failure] = []
        filled = 0
        for position, (sample, data, text, record, encoded, mask_data) in enumerate(zip(*fetched, strict=True)):
            try:
                if position in lost:
                    raise ValueError(lost[position])
                begin(position)
                image = _decode_image(sample, data) if self._pixels else None
                caption = self._caption(sample, text, record) if self._captions else ""
                encoded_parts = self._features.decode(sample, encoded) if self._features else None
                mask = self._mask(sample, mask_data) if sample.mask.exists else None
                size = sample.height, sample.width
            except Exception as error:  # a truncated shard, a damaged image, caption or safetensors file
                reason = lost[position] if position in lost else kind_and_line(error)
                failures.append(Failure(position=position, reason=reason, bad_shard=isinstance(error, BadShard)))
                image, caption, encoded_parts, mask, size = None, "", blank, None, (self._stride, self._stride)
            if image is not None:
                pixels[filled : filled + image.size].reshape(*size, 3)[:] = image
            filled += 3 * size[0] * size[1]
            sizes.append(size)
            captions.append(caption)
            masks.append(mask)
            if encoded_parts is not None:
                features.append(encoded_parts)
        begin(-1)
        if not samples:
            filled, sizes, captions, features = 3 * area, [(self._stride, self._stride)], [""], [blank] if blank else []
        texts = [each.text for each in features if each.text is not None]
        return ReadPack(
            pixels=torch.from_numpy(pixels[:filled]) if self._pixels else None,
            noise=self._noise("noise", samples, sizes=sizes),
            sizes=sizes,
            captions=captions,
            uniforms=time_draws(self._seed, samples) if samples else np.full((1, 2), 0.5),
            failures=failures,
            codec_noise=self._noise("codec", samples, sizes=sizes) if self._stochastic_codec else None,
            latents=_concatenated([each.latent.reshape(-1) for each in features if each.latent is not None]),
            texts=_concatenated(texts),
            text_lengths=tuple(map(len, texts)),
            teacher=_concatenated([each.teacher for each in features if each.teacher is not None]),
            masks=self._joined_masks(masks, sizes=sizes),
        )

    def _mask(self, sample: PlannedSample, data: memoryview | OSError) -> NDArray[np.float32]:
        """The loss mask of a sample. Raises ValueError that names it, and OSError."""
        crop = sample.height, sample.width
        content = _bytes(data)
        try:
            return load_mask(content, resize=sample.resize, crop=crop, flip=sample.flip, factor=self._factor, slack=self._stride)
        except (BadMask, Rejection) as error:
            raise BadMask(f"its mask {sample.key}.{MASK_EXTENSION} {error}") from error

    def _joined_masks(self, masks: Sequence[NDArray[np.float32] | None], *, sizes: Sequence[tuple[int, int]]) -> Tensor | None:
        """All masks, concatenated, with ones for samples without one; None if no sample has one."""
        if all(mask is None for mask in masks):
            return None
        shapes = [(height // self._factor, width // self._factor) for height, width in sizes]
        filled = [np.ones(shape, np.float32) if mask is None else mask for mask, shape in zip(masks, shapes, strict=True)]
        return torch.from_numpy(np.concatenate([mask.reshape(-1) for mask in filled]))

    def _caption(self, sample: PlannedSample, text: memoryview | OSError, record: memoryview | OSError) -> str:
        caption = decode_caption(sample, text, record)
        if self._shuffle_tags is None or not caption:
            return caption
        return self._shuffle_tags.apply(caption, generator=generator(self._seed, "tags", sample.visit, sample.id))

    def _noise(self, purpose: str, samples: Sequence[PlannedSample], *, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Noise of all samples, concatenated; zero for the dummy of an empty pack."""
        shapes = [(self._channels, height // self._factor, width // self._factor) for height, width in sizes]
        if not samples:
            return torch.zeros(shapes[0]).reshape(-1)
        streams = generators(self._seed, purpose, [sample.visit for sample in samples], [sample.id for sample in samples])
        drawn = [stream.standard_normal(shape, dtype=np.float32).reshape(-1) for stream, shape in zip(streams, shapes, strict=True)]
        return torch.from_numpy(np.concatenate(drawn))


def decode_caption(sample: PlannedSample, text: memoryview | OSError, record: memoryview | OSError) -> str:
    """The drawn caption: the first is in the text file, the others in the json file; "" if dropped or missing.

    Raises UndecodableText.
    """
    if sample.caption < 0:
        return ""
    first = decode_text(_bytes(text))
    if sample.caption == 0 and first and not first.isspace():
        return normalise(first)[0]
    parsed = parse_json(bytes(_bytes(record)))
    captions, _ = clean_captions([first, *(read_fields(parsed).captions if isinstance(parsed, dict) else ())])
    return captions[sample.caption] if captions else ""


def time_draws(seed: int, samples: Sequence[PlannedSample]) -> NDArray[np.float64]:
    """(B, 2): the two uniform draws in (0, 1) for the times of each sample on this visit."""
    streams = generators(seed, "times", [sample.visit for sample in samples], [sample.id for sample in samples])
    return to_uniform(np.stack([stream.integers(0, 2**64, 2, dtype=np.uint64) for stream in streams]))


def _text_range(sample: PlannedSample, member: Member) -> ByteRange:
    """The byte range of a text, up to the limit; an empty range at the image if there is none or the caption is dropped."""
    if sample.caption < 0 or not member.exists:
        return ByteRange(sample.tar, sample.image.offset, 0)
    return ByteRange(sample.texts, member.offset, min(member.length, MAX_TEXT_BYTES))


def _concatenated(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts)) if parts else None


def _decode_image(sample: PlannedSample, data: memoryview | OSError) -> NDArray[np.uint8]:
    return load_image(_bytes(data), resize=sample.resize, crop=(sample.height, sample.width), flip=sample.flip)


def _bytes(data: memoryview | OSError) -> memoryview:
    if isinstance(data, OSError):
        raise data
    return data
