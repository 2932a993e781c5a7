"""Packs: images or captions of different lengths, concatenated without padding.

Legend: B images, C latent channels, p patch size, T image tokens of a pack, F features of a token, S text tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Segments(NamedTuple):
    """Segment boundaries of a pack, built once on the host so that no layer synchronises the device.

    cu_seqlens: (B+1,) int32 cumulative lengths on the pack's device; max_len and lengths: on the host; ends: cu_seqlens on the host.
    """

    cu_seqlens: Tensor
    max_len: int
    lengths: tuple[int, ...]
    ends: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))
        return cls(ends.to(device, non_blocking=True), max(lengths, default=0), tuple(int(n) for n in lengths), ends)

    def pad(self, segments: int, *, tokens: int) -> Segments:
        """With further segments up to a number of segments and tokens. The first of them holds all further tokens, the others none."""
        further = segments - len(self.lengths), tokens - sum(self.lengths)
        assert min(further) >= 0, "a pack is padded to more segments and tokens than it has"
        assert further[0] or not further[1], "further tokens need a segment"
        lengths = (*self.lengths, *[further[1]][: further[0]], *[0] * (further[0] - 1))
        return Segments.from_lengths(lengths, self.cu_seqlens.device)

    def without_lengths(self, max_len: int) -> Segments:
        """For code that torch.compile traces: no value depends on the pack, `max_len` is an upper limit."""
        return self._replace(max_len=max_len, lengths=())


class PackedTokens(NamedTuple):
    """Images as one sequence of patches, row by row.

    tokens: (T, p·p·C), the features of a patch ordered (row, column, channel); segments: one per image;
    owner: (T,) int64 index of the image that a token belongs to; positions: (T, 2) int64 row and column of a token's patch;
    sizes: height and width of every image in patches; patch_size: p.
    """

    tokens: Tensor
    segments: Segments
    owner: Tensor
    positions: Tensor
    sizes: tuple[tuple[int, int], ...]
    patch_size: int

    @classmethod
    def from_latents(cls, latents: Sequence[Tensor], patch_size: int) -> PackedTokens:
        """Pack latents (C, h, w) of any sizes. Raises ValueError if a side is not a multiple of the patch size."""
        if not latents:
            raise ValueError("a pack needs at least one image")
        for index, latent in enumerate(latents):
            if latent.dim() != 3 or latent.shape[1] % patch_size or latent.shape[2] % patch_size:
                raise ValueError(
                    f"latent {index} has shape {tuple(latent.shape)}: expected (C, h, w) with sides that are multiples of {patch_size}"
                )
        device, p = latents[0].device, patch_size
        sizes = tuple((latent.shape[1] // p, latent.shape[2] // p) for latent in latents)
        tokens = torch.cat(
            [
                latent.reshape(latent.shape[0], h, p, w, p).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
                for latent, (h, w) in zip(latents, sizes, strict=True)
            ]
        )
        lengths = [h * w for h, w in sizes]
        owner = np.repeat(np.arange(len(sizes)), lengths)
        positions = np.concatenate([np.indices(size).reshape(2, -1).T for size in sizes])
        return cls(
            tokens,
            Segments.from_lengths(lengths, device),
            torch.from_numpy(owner).to(device, non_blocking=True),
            torch.from_numpy(positions).to(device, non_blocking=True),
            sizes,
            patch_size,
        )

    def to_latents(self) -> list[Tensor]:
        """The images as (C, h, w) tensors: the inverse of `from_latents`."""
        p = self.patch_size
        return [
            part.reshape(h, w, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, h * p, w * p)
            for part, (h, w) in zip(self.tokens.split(self.segments.lengths), self.sizes, strict=True)
        ]

    def rows(self, images: Sequence[int]) -> Tensor:
        """Indices into `tokens` of the tokens of these images, in order, built on the host."""
        starts = np.concatenate([[0], np.cumsum(self.segments.lengths)])
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in images])
        return torch.from_numpy(rows).to(self.tokens.device, non_blocking=True)

    def select(self, images: Sequence[int]) -> PackedTokens:
        """A new pack of the images with these indices, in this order; an index may occur more than once."""
        rows = self.rows(images)
        lengths = [self.segments.lengths[i] for i in images]
        owner = torch.from_numpy(np.repeat(np.arange(len(images)), lengths)).to(rows.device, non_blocking=True)
        return PackedTokens(
            self.tokens.index_select(0, rows),
            Segments.from_lengths(lengths, rows.device),
            owner,
            self.positions.index_select(0, rows),
            tuple(self.sizes[i] for i in images),
            self.patch_size,
        )

    def first_token(self) -> PackedTokens:
        """A pack of one image of one token."""
        segments = Segments.from_lengths([1], self.tokens.device)
        return PackedTokens(self.tokens[:1], segments, self.owner[:1], self.positions[:1], ((1, 1),), self.patch_size)

    def pad(self, images: int, *, tokens: int) -> PackedTokens:
        """With zeros as further images up to a number of images and tokens; the real ones come first. See `Segments.pad`."""
        real, further = len(self.sizes), tokens - len(self.tokens)
        segments = self.segments.pad(images, tokens=tokens)
        return PackedTokens(
            F.pad(self.tokens, (0, 0, 0, further)),
            segments,
            F.pad(self.owner, (0, further), value=real),
            F.pad(self.positions, (0, 0, 0, further)).contiguous(),  # strides are a part of a compiled shape
            (*self.sizes, *((length, 1) for length in segments.lengths[real:])),
            self.patch_size,
        )

    def without_lengths(self) -> PackedTokens:
        """For code that torch.compile traces: no value on the host depends on the pack."""
        return self._replace(segments=self.segments.without_lengths(len(self.tokens)), sizes=())

    def per_token(self, values: Tensor) -> Tensor:
        """Repeat one row per image, (B, …), for each of its tokens: (T, …)."""
        return per_token(values, self.owner)

    def mean_per_image(self, values: Tensor) -> Tensor:
        """Mean over the tokens of each image: (T,) → (B,)."""
        if values.is_cuda:
            sums = _sum_per_image(values[:, None], self.owner, images=len(self.sizes))[:, 0]
        else:
            sums = values.new_zeros(len(self.sizes)).index_add(0, self.owner, values)
        return sums / (self.segments.cu_seqlens[1:] - self.segments.cu_seqlens[:-1])


def per_token(values: Tensor, owner: Tensor) -> Tensor:
    """Repeat one row per image, (B, …), for each of its tokens: (T, …). owner: the pack's, (T,)."""
    if values.is_cuda and values.requires_grad and values.dim() == 2:
        return _PerToken.apply(values, owner)
    return values.index_select(0, owner)


class _PerToken(torch.autograd.Function):
    """Rows by index, with the gradient as a matrix product. The gradient of `index_select` adds up with atomic operations on a GPU: in
    bfloat16 where the values are, so that sums over thousands of tokens lose most of their digits, and in another order each time."""

    @staticmethod
    def forward(values: Tensor, owner: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return values.index_select(0, owner)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, owner = inputs
        ctx.images = len(values)
        ctx.save_for_backward(owner)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (owner,) = ctx.saved_tensors
        return _sum_per_image(grad, owner, images=ctx.images), None


def _sum_per_image(values: Tensor, owner: Tensor, *, images: int) -> Tensor:
    """Sum over the tokens of each image, (T, X) → (B, X), accumulated in float32 or better."""
    of_image = owner == torch.arange(images, device=owner.device)[:, None]
    with torch.autocast(values.device.type, enabled=False):
        return of_image.to(values.dtype) @ values


class PackedText(NamedTuple):
    """Captions, concatenated. features: (S, F); segments: one per caption."""

    features: Tensor
    segments: Segments

    def pad(self, captions: int, *, tokens: int) -> PackedText:
        """With zeros as further captions up to a number of captions and tokens; the real ones come first. See `Segments.pad`."""
        further = tokens - len(self.features)
        return PackedText(F.pad(self.features, (0, 0, 0, further)), self.segments.pad(captions, tokens=tokens))

    def without_lengths(self) -> PackedText:
        """For code that torch.compile traces: no value on the host depends on the pack."""
        return self._replace(segments=self.segments.without_lengths(len(self.features)))

    @classmethod
    def from_features(cls, features: Sequence[Tensor]) -> PackedText:
        """Pack caption features (M, F) of any lengths M."""
        if not features:
            raise ValueError("a pack needs at least one caption")
        return cls(torch.cat(list(features)), Segments.from_lengths([len(f) for f in features], features[0].device))

    def select(self, captions: Sequence[int]) -> PackedText:
        """A new pack of the captions with these indices, in this order; an index may occur more than once."""
        parts = self.features.split(self.segments.lengths)
        return PackedText.from_features([parts[i] for i in captions])


# Conditioning of the images of a pack: one caption each, or (B,) int64 class ids.
Condition: TypeAlias = PackedText | Tensor


def select(condition: Condition, images: Sequence[int]) -> Condition:
    """The conditions of the images with these indices, in this order; an index may occur more than once."""
    if isinstance(condition, PackedText):
        return condition.select(images)
    return condition[torch.tensor(images, dtype=torch.int64).to(condition.device, non_blocking=True)]


def join(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions. Raises ValueError if captions and class ids are mixed."""
    captions = [condition for condition in conditions if isinstance(condition, PackedText)]
    if not captions:
        return torch.cat([condition for condition in conditions if isinstance(condition, Tensor)])
    if len(captions) < len(conditions):
        raise ValueError("captions and class ids in one pack: conditions and null conditions must be of the same type")
    return PackedText.from_features([part for text in captions for part in text.features.split(text.segments.lengths)])


class PackShape(NamedTuple):
    """What packs are padded to: image tokens, images, caption tokens (0: class ids)."""

    tokens: int
    images: int
    text: int

    @classmethod
    def around(cls, packed: PackedTokens, condition: Condition, *, full: int, whole: bool) -> PackShape:
        """The shape to pad to, one of few. full: tokens of a full pack.

        Tokens are rounded up to quarters of a full pack (with `whole`, to full packs), images and caption tokens to powers of two, from
        numbers on that most full packs have room in. There is always room for one more image with a caption of one token.
        """
        unit = full if whole else -(-full // 4)
        tokens = -(-len(packed.tokens) // unit) * unit
        images = _power_of_two(len(packed.sizes) + 1, least=max(16, full // 256))
        text = _power_of_two(len(condition.features) + 1, least=max(64, full // 8)) if isinstance(condition, PackedText) else 0
        return cls(tokens, images, text)


def pad(packed: PackedTokens, condition: Condition, shape: PackShape) -> tuple[PackedTokens, Condition]:
    """A pack of exactly this shape: the rest is one more image, and its caption, which no other image attends to.

    The other images that it needs are empty. Its output is to be ignored: then it has no gradient.
    """
    packed = packed.pad(shape.images, tokens=shape.tokens)
    if isinstance(condition, PackedText):
        return packed, condition.pad(shape.images, tokens=shape.text)
    return packed, F.pad(condition, (0, shape.images - len(condition)))


def _power_of_two(number: int, *, least: int) -> int:
    return 1 << (max(number, least) - 1).bit_length()
