"""The DeepSpeed engine: the only file that imports deepspeed.

A step is: `accumulate` once per pack, the same number of times on every rank, then `step`. Gradients are summed over packs and ranks
and divided by the step's planned image count, so they do not depend on how images fall into packs and ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.checkpoints.tensor_fragments import Fragment, Shapes, ShardedTensors
from launch.distributed.ranks import Ranks
from launch.training.muon import Muon, hidden_matrices
from pipeline.foreign_warnings import HIDDEN

ADAM_EPSILON = 1e-6  # as TiM was trained
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("exp_avg", "exp_avg_sq", "momentum")}  # torch's names, and Muon's


@dataclass(frozen=True, slots=True)
class StepResult:
    """grad_norm: norm of the averaged gradient over all parameters before clipping; applied: False where it was not finite."""

    grad_norm: float
    applied: bool


@dataclass(frozen=True, slots=True)
class _Share:
    """What this rank owns of a parameter: `count` elements from `start` on, which lie from `offset` on in a vector of its weights."""

    start: int
    weights: Tensor
    offset: int
    count: int

    def of(self, vector: Tensor) -> Fragment:
        """The same piece of the weights, or of a vector of moments beside them, as a view."""
        return Fragment(self.start, vector.detach()[self.offset : self.offset + self.count])


class Engine:
    """A network under DeepSpeed ZeRO, with torch's AdamW or Muon. Call it like the network; weights stay in float32."""

    def __init__(
        self,
        network: nn.Module,
        *,
        ranks: Ranks,
        stage: int,
        precision: Literal["fp32", "bf16"] = "fp32",
        optimizer: Literal["adamw", "muon"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ) -> None:
        self.ranks = ranks
        self.stage = stage
        deepspeed = _import_deepspeed()
        network.to(ranks.device).train()
        self.shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        groups = _parameter_groups(network, weight_decay, muon=optimizer == "muon")
        make = Muon if optimizer == "muon" else torch.optim.AdamW
        self._optimizer = make(groups, lr=0.0, betas=betas, eps=ADAM_EPSILON, fused=True)
        self._kinds = MOMENTS[optimizer]
        config = _deepspeed_config(stage=stage, precision=precision, clip=clip)
        self._engine, *_ = deepspeed.initialize(model=network, optimizer=self._optimizer, config=config, dist_init_required=False)
        self._shares = dict(_shares(self._engine, shapes=self.shapes, stage=stage, rank=ranks.rank))
        self.updates = 0  # steps that were applied

    def __call__(self, *inputs: Any, return_alignment: bool = False) -> Any:
        return self._engine(*inputs, return_alignment=True) if return_alignment else self._engine(*inputs)

    @property
    def module(self) -> nn.Module:
        """The network itself: forwards through it use no autocast and keep no gradient of their own."""
        return self._engine.module

    def accumulate(self, loss: Tensor, *, count: int, last: bool) -> None:
        """Backward of one pack. loss: sum over its images; count: images planned in the step, all ranks; last: the step's last pack."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * (self.ranks.size / count), scale_wrt_gas=False)

    def step(self, *, lr: float) -> StepResult:
        """Update the weights from what was accumulated. A gradient that is not finite is dropped on all ranks alike."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = self._engine.was_step_applied()
        self.updates += applied
        return StepResult(grad_norm=math.nan if norm is None else float(norm), applied=applied)

    def fragments(self) -> dict[str, Fragment]:
        """The float32 master weights that this rank owns, as views: together, the ranks' fragments are the whole network."""
        return {name: share.of(share.weights) for name, share in self._shares.items()}

    def moments(self) -> dict[str, dict[str, Fragment]]:
        """What the optimizer remembers of gradients, by kind and parameter, as views like `fragments`; empty before the first update."""
        found: dict[str, dict[str, Fragment]] = {kind: {} for kind in self._kinds}
        for name, share in self._shares.items():
            state = self._optimizer.state.get(share.weights, {})
            for kind in self._kinds:
                if kind in state:
                    found[kind][name] = share.of(state[kind])
        return found

    def load(self, pieces: Callable[[str], ShardedTensors], *, updates: int) -> None:
        """Continue with the weights and moments that other ranks had, however many, after so many updates; all ranks call it.

        pieces: what they wrote of "weights" and of each kind of moments. Every rank reads only what it owns now.
        """
        zero = self._engine.optimizer
        if self.stage == 3:
            zero.checkpoint_event_prologue()  # small parameters, too, lie in shares only
        pieces("weights").read_into(self.fragments())
        if self.stage == 3:  # as after an update: the network takes over the masters
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()
        else:
            zero.update_lp_params()
        for kind in self._kinds:
            saved = pieces(kind)
            saved.read_into({name: share.of(self._moment(kind, share)) for name, share in self._shares.items() if name in saved})
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(updates), device=self.ranks.device)
        self.updates = updates

    def _moment(self, kind: str, share: _Share) -> Tensor:
        """The vector of moments beside a vector of weights; zero where there was none."""
        state = self._optimizer.state[share.weights]
        if kind not in state:
            state[kind] = torch.zeros_like(share.weights)
        return state[kind]

    def close(self) -> None:
        self._engine.destroy()


def _shares(engine: Any, *, shapes: Shapes, stage: int, rank: int) -> Iterator[tuple[str, _Share]]:
    """What this rank owns, by parameter. DeepSpeed (0.19) has no public name for it in stages 1 and 2, nor before the first update in 3."""
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            weights, start = zero.fp32_partitioned_groups_flat[group], rank * count
            count = min(count, math.prod(shapes[name]) - start)  # the last rank's share is padded
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            weights = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            start, offset, count = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        else:
            continue
        if count > 0:
            yield name, _Share(start, weights, offset, count)


def _parameter_groups(network: nn.Module, weight_decay: float, *, muon: bool) -> list[dict[str, Any]]:
    """Matrices decay; biases and gains do not. With `muon`, the hidden matrices come in a group that says their shapes."""
    hidden = hidden_matrices(network) if muon else []
    taken = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in network.parameters() if id(parameter) not in taken]
    groups = [
        {"params": hidden, "weight_decay": weight_decay, "shapes": [tuple(parameter.shape) for parameter in hidden]},
        {"params": [parameter for parameter in others if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in others if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed_config(*, stage: int, precision: str, clip: float) -> dict[str, Any]:
    """Every key on which the result depends, stated: DeepSpeed's defaults have changed between releases.

    The batch sizes are a formality: a step's packs are accumulated by `Engine.accumulate`. Autocast leaves weights, their gathering
    and gradient sums in float32 (`lower_precision_safe_modules: []`), so that the derivative can be evaluated in float32.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
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


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Decorate as `torch.compile` does, and leave the function as it is."""
    return (lambda decorated: decorated) if function is None else function


def _can_be_acted_on(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log is for our users: that it does not know our Muon is not."""
    return HIDDEN not in os.environ or "untested optimizer" not in record.getMessage()


def _import_deepspeed() -> Any:
    """Import DeepSpeed and attach it to the process group.

    ZeRO imports DeepSpeed's own Muon, which is compiled as it is imported: four seconds of TorchInductor for what is not used here.

    On a CPU it would first compile a shared-memory collective, 30 seconds or more and a compiler needed, which under torchrun it then
    does not use: gloo does the work either way. Declared incompatible, it is left out.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise RuntimeError("training needs deepspeed, which runs on Linux: pip install 'deepspeed>=0.19.8,<0.20'") from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").addFilter(_can_be_acted_on)
    with mock.patch.object(torch, "compile", _uncompiled):
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
