"""The encoder and the decoder of an AutoencoderKL (diffusers) as a list of steps that can run on a part of an image.

Every step says which rows or columns of its input a span of its output needs; the halo of a tile follows from that. It also says what it
costs. A residual block is `Save`, its layers, `Add`. Only two steps see the whole image: `Norm`, whose statistics come from a pass of their
own, and `Attend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from tim.codecs.base import Span
from tim.codecs.kl_tiling.regions import Shape

ELEMENT_WORK = 200  # time to read and write one value, in floating-point operations of a convolution (CPU: 100 to 400)
QUERIES = 8192  # pixels per call of attention: enough to fill a GPU


class Holds(NamedTuple):
    """Values in memory while a step runs: of its result, and of temporary tensors beside input and result."""

    result: int
    extra: int


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution with kernel 1 or 3 that keeps the size, or one with kernel 3 and stride 2 that pads bottom and right by one."""

    module: nn.Conv2d

    @property
    def stride(self) -> int:
        """Rows of input per row of output."""
        return self.module.stride[0]

    def reads(self, span: Span, side: int) -> Span:
        """Span of the input, `side` long, that `span` of the output needs."""
        if self.stride == 2:
            return Span(2 * span.start, min(side, 2 * span.stop + 1))
        reach = self.module.kernel_size[0] // 2
        return Span(max(0, span.start - reach), min(side, span.stop + reach))

    def after(self, shape: Shape) -> Shape:
        """Shape of the output for an input of this shape."""
        return Shape(self.module.out_channels, shape.height // self.stride, shape.width // self.stride)

    def work(self, channels: int, pixels: int) -> int:
        """Floating-point operations for this number of output pixels."""
        kernel = self.module.kernel_size[0] * self.module.kernel_size[1]
        return pixels * self.module.out_channels * (2 * self.module.in_channels * kernel + ELEMENT_WORK)

    def holds(self, channels: int, pixels: int, outputs: int) -> Holds:
        """Memory for `pixels` of input and `outputs` of output. With stride 1 the result is as large as the input, then cropped."""
        if self.stride == 2:
            return Holds(self.module.out_channels * outputs, channels * pixels)
        return Holds(self.module.out_channels * pixels, 0)


class _SameShape:
    """A step whose output has the shape of its input and needs nothing beyond its own pixels."""

    __slots__ = ()

    def reads(self, span: Span, side: int) -> Span:
        """Span of the input that `span` of the output needs: the same."""
        return span

    def after(self, shape: Shape) -> Shape:
        """Shape of the output: that of the input."""
        return shape

    def work(self, channels: int, pixels: int) -> int:
        """Work of reading and writing every value, in floating-point operations."""
        return pixels * channels * ELEMENT_WORK

    def holds(self, channels: int, pixels: int, outputs: int) -> Holds:
        """Memory for `pixels` of input and `outputs` of output."""
        return Holds(channels * pixels, 0)


@dataclass(frozen=True, slots=True)
class Norm(_SameShape):
    """A group norm and the activation after it."""

    module: nn.GroupNorm
    activation: nn.Module


@dataclass(frozen=True, slots=True)
class Save(_SameShape):
    """Keep the input for the `Add` at the end of the residual block."""

    def work(self, channels: int, pixels: int) -> int:
        """None: the tensor itself is kept."""
        return 0

    def holds(self, channels: int, pixels: int, outputs: int) -> Holds:
        """No memory beside the input."""
        return Holds(0, 0)


@dataclass(frozen=True, slots=True)
class Add(_SameShape):
    """Add what `Save` kept, through a convolution with kernel 1 where the number of channels changes."""

    shortcut: Conv | None

    def work(self, channels: int, pixels: int) -> int:
        """Work of the addition and the shortcut, in floating-point operations."""
        return pixels * channels * ELEMENT_WORK + (0 if self.shortcut is None else self.shortcut.work(channels, pixels))

    def holds(self, channels: int, pixels: int, outputs: int) -> Holds:
        """The sum is written over the input; the shortcut copies what was kept."""
        return Holds(0, 0 if self.shortcut is None else (self.shortcut.module.in_channels + channels) * outputs)


@dataclass(frozen=True, slots=True)
class Attend(_SameShape):
    """Self-attention between all pixels, with its group norm and its residual connection. `module` is diffusers' Attention."""

    module: Any

    @property
    def norm(self) -> nn.GroupNorm:
        """The group norm before it."""
        return self.module.group_norm

    def work(self, channels: int, pixels: int) -> int:
        """Floating-point operations: four projections and two products over all pairs of pixels."""
        width = self.module.to_q.out_features
        return 4 * pixels * pixels * width + 8 * pixels * channels * width

    def holds(self, channels: int, pixels: int, outputs: int) -> Holds:
        """Keys and values of all pixels, and what a block of queries takes. The result is written over the input."""
        width = self.module.to_q.out_features
        return Holds(0, 2 * width * pixels + 5 * width * min(pixels, QUERIES))


@dataclass(frozen=True, slots=True)
class Double:
    """Repeat every pixel twice in both directions."""

    def reads(self, span: Span, side: int) -> Span:
        """Span of the input that `span` of the output needs."""
        return Span(span.start // 2, -(-span.stop // 2))

    def after(self, shape: Shape) -> Shape:
        """Shape of the output for an input of this shape."""
        return Shape(shape.channels, 2 * shape.height, 2 * shape.width)

    def work(self, channels: int, pixels: int) -> int:
        """Work of reading and writing every value, in floating-point operations."""
        return pixels * channels * ELEMENT_WORK

    def holds(self, channels: int, pixels: int, outputs: int) -> Holds:
        """Memory for `pixels` of input."""
        return Holds(4 * channels * pixels, 0)


Step: TypeAlias = Conv | Norm | Save | Add | Attend | Double


def decoder_steps(network: Any) -> tuple[Step, ...]:
    """Steps from latents to pixels of an AutoencoderKL or AutoencoderKLFlux2. Raises ValueError for blocks of another kind."""
    decoder = network.decoder
    blocks = (step for block in decoder.up_blocks for step in _block(block, "UpDecoderBlock2D"))
    first = () if network.post_quant_conv is None else (Conv(network.post_quant_conv),)
    return (*first, Conv(decoder.conv_in), *_middle(decoder.mid_block), *blocks, *_last(decoder))


def encoder_steps(network: Any) -> tuple[Step, ...]:
    """Steps from pixels to the moments of latents (means, then log variances). Raises ValueError like `decoder_steps`."""
    encoder = network.encoder
    blocks = (step for block in encoder.down_blocks for step in _block(block, "DownEncoderBlock2D"))
    last = () if network.quant_conv is None else (Conv(network.quant_conv),)
    return (Conv(encoder.conv_in), *blocks, *_middle(encoder.mid_block), *_last(encoder), *last)


def _last(part: Any) -> tuple[Step, ...]:
    _require(isinstance(part.conv_norm_out, nn.GroupNorm), part.conv_norm_out)
    return Norm(part.conv_norm_out, part.conv_act), Conv(part.conv_out)


def _middle(block: Any) -> Iterator[Step]:
    yield from _residual(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            plain = attention.group_norm is not None and attention.spatial_norm is None and attention.residual_connection
            _require(plain and attention.rescale_output_factor == 1, attention)
            yield Attend(attention)
        yield from _residual(resnet)


def _block(block: Any, expected: str) -> Iterator[Step]:
    _require(type(block).__name__ == expected, block)
    for resnet in block.resnets:
        yield from _residual(resnet)
    for upsampler in getattr(block, "upsamplers", None) or ():
        yield from (Double(), Conv(upsampler.conv))
    for downsampler in getattr(block, "downsamplers", None) or ():
        yield Conv(downsampler.conv)


def _residual(block: Any) -> tuple[Step, ...]:
    plain = type(block).__name__ == "ResnetBlock2D" and block.time_emb_proj is None and block.upsample is None and block.downsample is None
    _require(plain and block.output_scale_factor == 1, block)
    shortcut = None if block.conv_shortcut is None else Conv(block.conv_shortcut)
    first, second = (Norm(norm, block.nonlinearity) for norm in (block.norm1, block.norm2))
    return Save(), first, Conv(block.conv1), second, Conv(block.conv2), Add(shortcut)


def _require(supported: bool, block: nn.Module) -> None:
    if not supported:
        raise ValueError(f"{type(block).__name__} of this kind cannot run in tiles: AutoencoderKL with its own residual blocks can")
