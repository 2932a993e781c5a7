"""Pack any stream of webdataset samples online, by the size rule and the packer of planned training, without an index."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.cost import DIFFUSION, image_costs
from pipeline.images import Rejection, load_image
from pipeline.images.decoded import to_pixels
from pipeline.images.encode import Pixels
from pipeline.images.formats.jpeg import plain_jpeg_size
from pipeline.images.target_size import resize_and_crop
from pipeline.packing.packing import NO_ROOM, assign_to_packs
from pipeline.planning.config import PlanConfig
from pipeline.size_rule import target_size

logger = logging.getLogger(__name__)

IMAGE_KEYS = "image;jpg;jpeg;png;webp"
_ATTENTION_WIDTH = 1152  # of the network that costs are balanced for; one process waits for nobody


@dataclass(frozen=True, slots=True)
class StreamedPack:
    """Images of different sizes that run together without padding.

    `images` are uint8 (3, h, w), upright sRGB, with sides that are multiples of the stride; `samples` the dictionaries that they came with,
    without the image; `tokens` all tokens of the pack.
    """

    images: list[Tensor]
    samples: list[dict[str, Any]]
    tokens: int


@dataclass(slots=True)
class _Waiting:
    """An image that is not packed yet; `rounds` counts how often it found no room."""

    pixels: Pixels
    sample: dict[str, Any]
    tokens: int
    rounds: int = 0


def pack_stream(
    *,
    max_tokens: int,
    tokens_per_pack: int,
    stride: int = 32,
    packs: int = 8,
    max_pixels: int | None = None,
    min_tokens: int = 1,
    max_aspect: float = 8.0,
    fit: Literal["crop", "squash"] = "crop",
    image: str = IMAGE_KEYS,
) -> PackStream:
    """A stage for `webdataset.WebDataset(urls).decode("pil").compose(pipeline.pack_stream(max_tokens=256, tokens_per_pack=1024))`.

    It works on any stream of samples, `pipe:` included, and needs no index. What a prepared or indexed corpus (`tim prepare`, `tim index`)
    and `PackedDataset` give in addition:

    - equal cost and equally many packs on every rank: here each process packs what its own shards bring;
    - exact resume: a stream has no position, it starts over;
    - no sample lost: here the shards of a killed process are read again, and webdataset drops what it cannot split evenly;
    - one seeded global order for any number of ranks and workers: here it is that of the shards and of webdataset's shuffle buffer;
    - captions, kinds, times and noise drawn by hash, and counts of what is left out before training starts.

    The result depends on the stream alone: the same samples in the same order give the same packs.

    Args:
        max_tokens: of one image; a larger one is scaled down.
        tokens_per_pack: limit of every pack.
        stride: pixels per token side.
        packs: so many packs are filled together. More of them fill better and hold more images: at most `packs` full packs and one image
            are in memory.
        max_pixels, min_tokens, max_aspect, fit: further limits of the size rule, as in the `plan` section of a config.
        image: keys of the image in a sample, as webdataset writes alternatives. Undecoded files are decoded by `pipeline.images`, which is
            the most exact; PIL images, arrays and tensors of webdataset's decoders are taken as well.

    Raises ValueError for limits that contradict each other.
    """
    plan = PlanConfig(
        stride=stride,
        max_tokens=max_tokens,
        max_pixels=max_pixels,
        min_tokens=min_tokens,
        max_aspect=max_aspect,
        fit=fit,
        tokens_per_pack=tokens_per_pack,
        packs_per_step=packs,
    )
    return PackStream(plan, image_keys=tuple(image.split(";")))


class PackStream:
    """Callable on an iterable of samples. `left_out` counts, by reason, the samples that are not trained; each is logged once."""

    def __init__(self, plan: PlanConfig, *, image_keys: tuple[str, ...]) -> None:
        self.left_out: Counter[str] = Counter()
        self._plan = plan
        self._image_keys = image_keys

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[StreamedPack]:
        waiting: list[_Waiting] = []
        tokens = 0
        for sample in samples:
            fitted = self._fitted(sample)
            if fitted is None:
                continue
            waiting.append(fitted)
            tokens += fitted.tokens
            if tokens >= self._plan.packs_per_step * self._plan.tokens_per_pack:
                yield from self._packed(waiting, packs=self._plan.packs_per_step)
                tokens = sum(each.tokens for each in waiting)
        while waiting:
            tokens = sum(each.tokens for each in waiting)
            yield from self._packed(waiting, packs=-(-tokens // self._plan.tokens_per_pack))

    def _packed(self, waiting: list[_Waiting], *, packs: int) -> Iterator[StreamedPack]:
        """Fill packs; what finds no room stays in `waiting`."""
        tokens = np.array([each.tokens for each in waiting], dtype=np.int64)
        assigned = assign_to_packs(
            tokens,
            costs=image_costs(tokens, kinds=np.full(len(tokens), DIFFUSION), gamma=self._plan.gamma, width=_ATTENTION_WIDTH),
            urgency=np.array([each.rounds for each in waiting], dtype=np.int64),
            packs=packs,
            tokens_per_pack=self._plan.tokens_per_pack,
        )
        members = [[each for each, where in zip(waiting, assigned, strict=True) if where == pack] for pack in range(packs)]
        waiting[:] = [each for each, where in zip(waiting, assigned, strict=True) if where == NO_ROOM]
        for each in waiting:
            each.rounds += 1
        for pack in members:
            if pack:
                images = [torch.from_numpy(each.pixels).permute(2, 0, 1) for each in pack]
                yield StreamedPack(images, [each.sample for each in pack], sum(each.tokens for each in pack))

    def _fitted(self, sample: dict[str, Any]) -> _Waiting | None:
        """The image at its target size; None if it cannot be read, or if the size rule leaves it out."""
        key = next((key for key in self._image_keys if key in sample), None)
        if key is None:
            return self._leave_out(sample, "no-image", detail=f"it has none of {', '.join(self._image_keys)}")
        try:
            image = sample[key]
            size = plain_jpeg_size(image) if isinstance(image, bytes) else None
            pixels = None if size else to_pixels(image)
            height, width = size or pixels.shape[:2]  # pyright: ignore[reportOptionalMemberAccess]
            target = target_size(height, width=width, rule=self._plan.size_rule)
            if target.left_out:
                return self._leave_out(sample, target.left_out, detail=f"{width}x{height} pixels")
            resize, crop = target.resize, (target.height, target.width)
            fitted = load_image(image, resize=resize, crop=crop) if pixels is None else resize_and_crop(pixels, resize=resize, crop=crop)
        except Rejection as rejection:
            return self._leave_out(sample, rejection.reason, detail=rejection.detail)
        return _Waiting(np.array(fitted, order="C"), {name: value for name, value in sample.items() if name != key}, target.tokens)

    def _leave_out(self, sample: dict[str, Any], reason: str, *, detail: str) -> None:
        self.left_out[reason] += 1
        where = f"{sample.get('__key__', 'without a key')} of {sample.get('__url__', 'the stream')}"
        logger.warning("sample %s is left out: %s: %s", where, reason, detail)
