"""Run a plan: pass after pass, tile after tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from tim.codecs.base import to_values
from tim.codecs.kl_tiling.planner import Pass, Plan, needed
from tim.codecs.kl_tiling.regions import Region, Shape, crop, tiles
from tim.codecs.kl_tiling.steps import QUERIES, Add, Attend, Conv, Double, Norm, Save, Step

CHUNK = 2**20  # values converted to float64 at once


@torch.no_grad()
def run(plan: Plan, source: Tensor, *, device: torch.device) -> Iterator[tuple[Region, Tensor]]:
    """Regions of the output and their float32 values (C, h, w), which together cover it once.

    `source`: (C, h, w) on any device: float32, or uint8 levels of an image. Kept values are in the memory of the host.
    """
    runner = _Runner(plan, source, device)
    for each in plan.passes[:-1]:
        for _ in runner.whole(each) if each.side is None else runner.tiled(each):
            raise AssertionError("only the last pass has output")
    last = plan.passes[-1]
    yield from runner.whole(last) if last.side is None else runner.tiled(last)


class _Runner:
    """`_kept`: values (1, C, h, w) that the next pass starts from. `_frozen`: scale and shift of group norms with known statistics."""

    def __init__(self, plan: Plan, source: Tensor, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._kept = source[None]
        self._frozen: dict[int, tuple[Tensor, Tensor]] = {}

    def whole(self, each: Pass) -> Iterator[tuple[Region, Tensor]]:
        """Run a pass on the whole image. Yields the output if it is the last one."""
        steps, shapes = self._plan.steps, self._plan.shapes
        values = self._read(shapes[each.start].region)
        self._kept = values.new_empty(0)
        saved: list[tuple[Tensor, Region]] = []
        for i in range(each.start, each.stop):
            step = steps[i]
            if isinstance(step, (Norm, Attend)) and i not in self._frozen:
                statistics = _Statistics(shapes[i].channels, self._device)
                statistics.add(values)
                self._frozen[i] = statistics.scale_and_shift(_norm(step))
            values, _ = self._step(i, values, shapes[i].region, shapes[i + 1].region, saved)
        if each.stop == len(steps):
            yield shapes[-1].region, values[0]
        else:
            self._kept = values.cpu()

    def tiled(self, each: Pass) -> Iterator[tuple[Region, Tensor]]:
        """Run a pass over tiles, collecting the statistics of the norm at its stop. Yields the output if it is the last one."""
        steps, end = self._plan.steps, self._plan.shapes[each.stop]
        is_last = each.stop == len(steps)
        statistics = _Statistics(end.channels, self._device)
        kept = None if each.keep is None else _empty(self._plan.shapes[each.keep])
        for tile in tiles(end, each.side or max(end)):
            values = self._tile(each, tile, kept)
            if is_last:
                yield tile, values[0]
            else:
                statistics.add(values)
            del values  # before the next tile is computed
        if not is_last:
            self._frozen[each.stop] = statistics.scale_and_shift(_norm(steps[each.stop]))
        if kept is not None:
            self._kept = kept

    def _tile(self, each: Pass, tile: Region, kept: Tensor | None) -> Tensor:
        """Values of `tile` at the stop of a pass; what the pass keeps is written to `kept`."""
        regions = self._regions(each, tile)
        held = regions[0]
        values = self._read(held)
        saved: list[tuple[Tensor, Region]] = []
        for i in range(each.start, each.stop + 1):
            if kept is not None and i == each.keep:
                kept[..., slice(*held.rows), slice(*held.columns)] = values
            if i < each.stop:
                values, held = self._step(i, values, held, regions[i + 1 - each.start], saved)
        return values

    def _regions(self, each: Pass, tile: Region) -> list[Region]:
        """What is needed at every position of a pass for `tile` at its stop."""
        steps, shapes = self._plan.steps, self._plan.shapes
        rows = needed(steps, shapes, each.start, each.stop, tile.rows, axis=1)
        columns = needed(steps, shapes, each.start, each.stop, tile.columns, axis=2)
        return [Region(*both) for both in zip(rows, columns, strict=True)]

    def _read(self, region: Region) -> Tensor:
        """The kept values of a region, on the device."""
        part = self._kept[..., slice(*region.rows), slice(*region.columns)].to(self._device)
        if part.dtype == torch.uint8:
            part = to_values(part)
        return part.contiguous(memory_format=torch.channels_last)

    def _step(
        self, position: int, values: Tensor, held: Region, wanted: Region, saved: list[tuple[Tensor, Region]]
    ) -> tuple[Tensor, Region]:
        """Apply a step to the values of region `held`. The result covers `wanted` or a little more: its region is returned."""
        step = self._plan.steps[position]
        if isinstance(step, Save):
            saved.append((values, held))
        elif isinstance(step, Add):
            before, region = saved.pop()
            before = crop(before, region, wanted)
            values += before if step.shortcut is None else step.shortcut.module(before)
        elif isinstance(step, Norm):
            values = _activate(step.activation, _normalise(values, *self._frozen[position]))
        elif isinstance(step, Attend):
            values = _attend(step, values, *self._frozen[position])
        elif isinstance(step, Double):
            values = functional.interpolate(values, scale_factor=2.0, mode="nearest")
            held = Region(*(type(span)(2 * span.start, 2 * span.stop) for span in held))
        else:
            values, held = _convolve(step, values, held, wanted), wanted
        return values, held


def _convolve(step: Conv, values: Tensor, held: Region, wanted: Region) -> Tensor:
    """Zero padding is right at the borders of the image only. Elsewhere `held` is wider than `wanted`: what padding reached is cropped."""
    if step.stride == 1:
        return crop(step.module(values), held, wanted)
    missing = [2 * output.stop + 1 - span.stop for span, output in zip(held, wanted, strict=True)]
    padded = functional.pad(values, (0, missing[1], 0, missing[0])) if any(missing) else values
    return functional.conv2d(padded, step.module.weight, step.module.bias, stride=2)


def _norm(step: Step) -> nn.GroupNorm:
    assert isinstance(step, (Norm, Attend))
    return step.module if isinstance(step, Norm) else step.norm


def _normalise(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, values, scale)


def _activate(activation: nn.Module, values: Tensor) -> Tensor:
    return functional.silu(values, inplace=True) if isinstance(activation, nn.SiLU) else activation(values)


def _attend(step: Attend, values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Attention in blocks of queries, written over `values`."""
    module = step.module
    _, channels, height, width = values.shape
    tokens = values.permute(0, 2, 3, 1).view(height * width, channels)
    scale, shift = scale.flatten(), shift.flatten()
    inner = module.to_k.out_features
    keys, contents = (torch.empty(height * width, inner, dtype=values.dtype, device=values.device) for _ in range(2))
    blocks = [slice(start, start + QUERIES) for start in range(0, len(tokens), QUERIES)]
    for block in blocks:
        normed = _normalise(tokens[block], scale, shift)
        keys[block], contents[block] = module.to_k(normed), module.to_v(normed)
    for block in blocks:
        queries = module.to_q(_normalise(tokens[block], scale, shift))
        q, k, v = (each.unflatten(-1, (module.heads, -1)).transpose(0, 1)[None] for each in (queries, keys, contents))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        tokens[block] += module.to_out[0](mixed[0].transpose(0, 1).flatten(1))
    return values


def _empty(shape: Shape) -> Tensor:
    return torch.empty(1, *shape, memory_format=torch.channels_last)


class _Statistics:
    """Sums and sums of squares per channel, in float64, over tiles."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Add the values (1, C, h, w) of a tile."""
        _, channels, height, width = values.shape
        self._count += height * width
        for part in values.split(max(1, CHUNK // (channels * width)), dim=2):
            pixels = part.permute(0, 2, 3, 1).double().flatten(0, 2)
            self._sums[0] += pixels.sum(0)
            self._sums[1] += pixels.square_().sum(0)

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """The norm as values · scale + shift, both (1, C, 1, 1)."""
        mean, square = self._sums.view(2, norm.num_groups, -1).mean(-1) / self._count
        deviation = (square - mean.square()).clamp(min=0).add(norm.eps).sqrt()
        size = self._sums.shape[1] // norm.num_groups
        mean, deviation = mean.repeat_interleave(size), deviation.repeat_interleave(size)
        scale = norm.weight.double() / deviation
        shift = norm.bias.double() - mean * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)
