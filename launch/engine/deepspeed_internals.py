"""Access to DeepSpeed, and to the parts of its optimizers that have no public API. Only this package imports deepspeed.

Private are the flat float32 weights of a rank, where each parameter is in them, and copying them back to the network. Every private
attribute is read by `_member`, so that another version of DeepSpeed fails with the attribute's name, not with wrong checkpoints.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from launch.checkpoints.tensor_fragments import Fragment, Shapes
from pipeline.foreign_warnings import HIDDEN

SUPPORTED = ">=0.19.8,<0.20"


@dataclass(frozen=True, slots=True)
class Share:
    """Elements `start` … `start + count` of a parameter, stored at `offset` in a flat vector of weights that the optimizer updates."""

    start: int
    weights: Tensor
    offset: int
    count: int

    def of(self, vector: Tensor) -> Fragment:
        """View of this share in the weights, or in a moments vector with the same layout."""
        return Fragment(self.start, vector.detach().view(-1)[self.offset : self.offset + self.count])


def import_deepspeed() -> Any:
    """Import DeepSpeed, without attaching it to a process group.

    ZeRO imports DeepSpeed's own Muon, which is unused here but compiles on import: `torch.compile` is disabled meanwhile, which saves
    four seconds.

    On a CPU, DeepSpeed would compile a shared-memory collective (30 seconds or more, needs a compiler) that it does not use under
    torchrun: gloo is used either way. Marked as incompatible, it is not compiled.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise RuntimeError(f"training needs deepspeed, which runs on Linux: pip install 'deepspeed{SUPPORTED}'") from None
    _member(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").addFilter(_is_relevant_to_users)
    with mock.patch.object(torch, "compile", _uncompiled):
        import deepspeed.runtime.zero.muon.muon_optimizer
    return deepspeed


def attached_deepspeed() -> Any:
    """DeepSpeed, attached to the process group."""
    library = import_deepspeed()
    library.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return library


def check_config(library: Any, config: dict[str, Any]) -> None:
    """Raise ValueError, in one line, if DeepSpeed rejects a value of its configuration."""
    try:
        library.DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"train.deepspeed: {key}: {message}, got {first['input']!r}") from None


def shares(engine: Any, *, shapes: Shapes, stage: int, rank: int) -> Iterator[tuple[str, Share]]:
    """Yield this rank's share of each trained parameter (those in `shapes`) under ZeRO 1 to 3."""
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if name not in shapes:
            continue
        if stage == 3:
            group, offset, count = _member(zero, "grad_position")[_member(zero, "get_param_id")(parameter)]
            weights, start = _member(zero, "fp32_partitioned_groups_flat")[group], rank * count
            count = min(count, math.prod(shapes[name]) - start)  # the last rank's share is padded
        else:
            mapping = _member(parameter, "_hp_mapping")
            if mapping is None:  # all of it belongs to other ranks
                continue
            weights = _member(zero, "single_partition_of_fp32_groups")[_member(mapping, "param_group_index")]
            network, flat = _member(mapping, "lp_fragment_address"), _member(mapping, "hp_fragment_address")
            start, offset, count = network.start, flat.start, flat.numel
        if count > 0:
            yield name, Share(start, weights, offset, count)


def parameters_by_vector(engine: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Yield the flat vectors of ZeRO 3 that the optimizer updates, and the parameters of which they hold a part."""
    zero = engine.optimizer
    yield from zip(_member(zero, "fp32_partitioned_groups_flat"), _member(zero, "fp16_groups"), strict=True)


def whole_value(parameter: nn.Parameter, *, stage: int) -> Tensor:
    """A copy of a parameter, gathered from all ranks under ZeRO 3. Must be called by all ranks."""
    if stage < 3:
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@contextmanager
def weights_replaced(engine: Any, *, stage: int) -> Iterator[None]:
    """Copy the shares to the network at the end, as after an update. Under ZeRO 0 they are its weights. Must be called by all ranks."""
    zero = engine.optimizer
    if stage == 3:
        _member(zero, "checkpoint_event_prologue")()  # partitions the small parameters, too
    yield
    if stage == 3:
        for group in range(len(_member(zero, "fp32_partitioned_groups_flat"))):
            _member(zero, "_reassign_or_swap_out_partitioned_parameters")(group)
        _member(zero, "checkpoint_event_epilogue")()
    elif stage:
        _member(zero, "update_lp_params")()


def _member(owner: Any, name: str) -> Any:
    """Attribute of a DeepSpeed object. Raises RuntimeError naming the versions that have it."""
    try:
        return getattr(owner, name)
    except AttributeError:
        import deepspeed

        kind = getattr(owner, "__name__", type(owner).__name__)
        remedy = f"pip install 'deepspeed{SUPPORTED}'"
        raise RuntimeError(f"deepspeed {deepspeed.__version__}: {kind} has no {name}, which checkpoints need: {remedy}") from None


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Replacement for `torch.compile` that returns the function unchanged."""
    return (lambda decorated: decorated) if function is None else function


def _is_relevant_to_users(record: logging.LogRecord) -> bool:
    """Log filter: hide DeepSpeed's warning that it has not tested our Muon, and that it skips a step, which the trainer says better."""
    return HIDDEN not in os.environ or not any(text in record.getMessage() for text in ("untested optimizer", "OVERFLOW! Skipping step"))
