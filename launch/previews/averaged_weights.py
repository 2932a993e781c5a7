"""Lend the averaged weights to the network that trains, and take them back bit by bit.

Under ZeRO 0 to 2 every rank has a whole network. Its parameters point to a copy of the average, gathered from all ranks, and afterwards to
their own storage again: 4 bytes per parameter and device, for the time of a preview only. The optimizer's float32 weights are not touched.

Under ZeRO 3 no rank has room for a whole copy. Each exchanges its part of the float32 weights with its part of the average, in place and
without further memory, and exchanges them again afterwards. DeepSpeed gathers layer by layer, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from launch.checkpoints.tensor_fragments import Fragment
from launch.distributed.ranks import Ranks
from launch.engine.engine import Engine


class NoMemory(RuntimeError):
    """A rank has no memory for a copy of the averaged weights. Raised on all ranks."""


@contextmanager
def averaged_weights(engine: Engine, average: Mapping[str, Fragment], *, ranks: Ranks) -> Iterator[nn.Module]:
    """The network with the averaged weights, in evaluation mode. `average`: this rank's fragments. Must be called by all ranks.

    An error under ZeRO 3 leaves the weights exchanged: the ranks no longer agree, and the run must end.
    Raises NoMemory on all ranks if one has no memory for the copy.
    """
    network = engine.module
    was_training = network.training
    network.eval()
    try:
        if engine.stage == 3:
            engine.exchange(average)
            yield network
            engine.exchange(average)
        else:
            with _copied(network, average, names=engine.shapes, ranks=ranks):
                yield network
    finally:
        network.train(was_training)


@contextmanager
def _copied(network: nn.Module, average: Mapping[str, Fragment], *, names: Mapping[str, object], ranks: Ranks) -> Iterator[None]:
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in names}
    copies: dict[str, Tensor] = {}
    try:
        for name, parameter in parameters.items():
            copies[name] = torch.zeros(math.prod(parameter.shape), dtype=torch.float32, device=ranks.device)
        is_full = False
    except torch.OutOfMemoryError:
        is_full = True
    if ranks.any(is_full):
        raise NoMemory("no memory for a copy of the averaged weights")
    kept: dict[str, Tensor] = {}
    try:
        for name, parameter in parameters.items():
            if (fragment := average.get(name)) is not None:
                part = copies[name][fragment.start : fragment.start + len(fragment.values)]
                part.copy_(fragment.values)  # from any device, and without more memory here
            kept[name] = parameter.data
            parameter.data = ranks.total(copies[name]).view(parameter.shape).to(parameter.dtype)
        yield
    finally:
        for name, values in kept.items():
            parameters[name].data = values
