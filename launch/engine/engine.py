"""DeepSpeed engine: forward and backward passes, updates, and the state that checkpoints store.

A step calls `accumulate` once per pack, the same number of times on every rank, then `step`. Gradients are summed over packs and ranks
and divided by the step's planned image count, so they do not depend on how images are distributed over packs and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from launch.checkpoints.tensor_fragments import Fragment
from launch.config.deepspeed_settings import merged
from launch.distributed.ranks import Ranks
from launch.engine.deepspeed_internals import (
    Share,
    attached_deepspeed,
    check_config,
    parameters_by_vector,
    shares,
    weights_replaced,
    whole_value,
)
from launch.engine.moments import Pieces
from launch.engine.muon import Column, Muon
from launch.engine.optimizers import make_optimizer, uses_cpu_adam
from launch.engine.parameter_groups import parameter_groups, trained_parameters
from launch.engine.replicated import Replicated, owned_parameters, whole_parameters


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step. grad_norm: total gradient norm before clipping; applied: False if the gradient was not finite."""

    grad_norm: float
    applied: bool


class Engine:
    """A network under DeepSpeed ZeRO (stage 0: not sharded) with an optimizer. Call it like the network. Weights stay in float32.

    Parameters that need no gradient are frozen: they have no moments, and are not in `shapes`, fragments and checkpoints.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        ranks: Ranks,
        stage: int,
        precision: Literal["fp32", "bf16"] = "fp32",
        optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        lr_factors: Mapping[str, float] | None = None,
        clip: float = 1.0,
        deepspeed: Mapping[str, Any] | None = None,
    ) -> None:
        """deepspeed: settings merged into DeepSpeed's configuration, checked by `launch.config.deepspeed_settings`.

        Raises ValueError if a pattern of `lr_factors` matches no parameter, or DeepSpeed rejects a setting.
        """
        self.ranks = ranks
        self.stage = stage
        settings = deepspeed or {}
        library = attached_deepspeed()
        network.to(ranks.device).train()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in trained_parameters(network)}
        grouping = {"weight_decay": weight_decay, "muon": optimizer == "muon", "lr_factors": lr_factors or {}}
        groups = ranks.run_on_all_ranks(lambda: parameter_groups(network, **grouping))
        settings = {**settings, "zero_force_ds_cpu_optimizer": uses_cpu_adam(optimizer, settings)}
        self._optimizer, self._moments = make_optimizer(optimizer, groups, stage=stage, betas=betas, settings=settings, library=library)
        if isinstance(self._optimizer, Replicated):
            self._optimizer.clip = clip
        config = merged(deepspeed_config(stage=stage, precision=precision, clip=clip if stage else 0.0), settings)
        ranks.run_on_all_ranks(lambda: check_config(library, config))
        self._engine, *_ = library.initialize(model=network, optimizer=self._optimizer, config=config, dist_init_required=False)
        self._held, self._owned = self._shares()
        if isinstance(self._optimizer, Muon):
            self._optimizer.device = ranks.device
            self._optimizer.columns = self._muon_columns() if stage == 3 else {}
        self.updates = 0  # number of applied steps

    def __call__(self, *inputs: Any, return_alignment: bool = False) -> Any:
        return self._engine(*inputs, return_alignment=True) if return_alignment else self._engine(*inputs)

    @property
    def module(self) -> nn.Module:
        """The wrapped network. Forward passes through it bypass DeepSpeed's autocast and gradient handling."""
        return self._engine.module

    def accumulate(self, loss: Tensor, *, count: int) -> None:
        """Backward pass of one pack. loss: sum over its images; count: images planned in the step on all ranks."""
        self._engine.backward(loss * (self.ranks.size / count), scale_wrt_gas=False)

    def step(self, *, lr: float) -> StepResult:
        """Update the weights from the accumulated gradients. If they are not finite, all ranks skip the update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._engine.step()
        norm = self._optimizer.grad_norm if isinstance(self._optimizer, Replicated) else self._engine.get_global_grad_norm()
        applied = self._engine.was_step_applied()
        self.updates += applied
        return StepResult(grad_norm=math.nan if norm is None else float(norm), applied=applied)

    def discard(self) -> None:
        """Drop the accumulated gradients, which must not be finite."""
        result = self.step(lr=0.0)
        assert not result.applied, "only gradients that are not finite can be discarded"

    def fragments(self) -> dict[str, Fragment]:
        """Views of the float32 master weights owned by this rank. The fragments of all ranks cover all trained parameters."""
        return {name: share.of(share.weights) for name, share in self._owned.items()}

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield a copy of each frozen parameter. Must be called, and exhausted, by all ranks."""
        for name, parameter in self.module.named_parameters():
            if name not in self.shapes:
                yield name, whole_value(parameter, stage=self.stage)

    def moments(self) -> dict[str, dict[str, Fragment]]:
        """Views of the optimizer's moments by kind and parameter, like `fragments`; empty before the first update."""
        return self._moments.fragments(self._owned)

    def load(self, pieces: Pieces, *, updates: int) -> None:
        """Load weights and moments saved by any number of ranks after `updates` updates. Must be called by all ranks.

        pieces: opens the saved "weights", or moments of one kind. Each rank reads only the elements that it holds.
        """
        with weights_replaced(self._engine, stage=self.stage):
            pieces("weights").read_into({name: share.of(share.weights) for name, share in self._held.items()})
        self._moments.load(pieces, self._held, updates=updates)
        self.updates = updates

    @torch.no_grad()
    def exchange(self, fragments: Mapping[str, Fragment]) -> None:
        """Exchange the weights with fragments of the same elements, such as an average; done twice, it changes nothing.

        Must be called by all ranks. Needs no further memory.
        """
        with weights_replaced(self._engine, stage=self.stage):
            for name, weights in self.fragments().items():
                before = weights.values.clone()
                weights.values.copy_(fragments[name].values)
                fragments[name].values.copy_(before)
            if not self.stage:
                self._share_owned()

    def _share_owned(self) -> None:
        """Copy each parameter of ZeRO 0 from the rank that owns it to the others."""
        for name, share in self._held.items():
            values = share.of(share.weights).values
            if name not in self._owned:
                values.zero_()
            self.ranks.total(values)

    def _shares(self) -> tuple[dict[str, Share], dict[str, Share]]:
        """Shares of the parameters that this rank holds, and those that it saves and averages. They differ under ZeRO 0 only."""
        if self.stage:
            held = dict(shares(self._engine, shapes=self.shapes, stage=self.stage, rank=self.ranks.rank))
            return held, held
        held = whole_parameters(self.module)
        owned = owned_parameters({name: share.count for name, share in held.items()}, rank=self.ranks.rank, ranks=self.ranks.size)
        return held, {name: held[name] for name in owned}

    def _muon_columns(self) -> dict[Tensor, list[Column]]:
        """Parts of the matrices in each flat vector of ZeRO 3."""
        names = {id(parameter): name for name, parameter in trained_parameters(self.module)}
        size = self.ranks.size
        columns: dict[Tensor, list[Column]] = {}
        for vector, parameters in parameters_by_vector(self._engine):
            offset = 0
            for parameter in parameters:
                shape = self.shapes[names[id(parameter)]]
                count = -(-math.prod(shape) // size)
                columns.setdefault(vector, []).append(Column(shape, offset, count))
                offset += count
        return columns

    def close(self) -> None:
        self._engine.destroy()


def deepspeed_config(*, stage: int, precision: str, clip: float) -> dict[str, Any]:
    """DeepSpeed configuration with every key that affects the result, because its defaults change between releases.

    The batch sizes have no effect: every `step` ends an accumulation (`managed_gradient_accumulation`). Autocast keeps weights, their
    gathering and gradient accumulation in float32 (`lower_precision_safe_modules: []`), so that the derivative can be evaluated in float32.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
