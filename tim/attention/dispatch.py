"""Variable-length attention over packs: every segment attends to its own keys only, and nothing is padded.

Legend: T query tokens, S key tokens, H heads, D head width. `BACKENDS` lists the backends and their capabilities:

- `varlen`: `torch.nn.attention.varlen`, one kernel for the whole pack; the default on a GPU in half precision.
- `flash`: the same from the packages flash-attn 3 (Hopper) or flash-attn 2.
- `flex`: FlexAttention with a block mask, compiled at first use; any precision on a GPU.
- `sdpa`: scaled-dot-product attention, segments of similar lengths batched; runs everywhere, and the only one with a forward-mode
  derivative.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tim.attention.sdpa import has_tangent, sdpa
from tim.packed import Segments

log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities

Attention = Callable[[Tensor, Tensor, Tensor, Segments, Segments], Tensor]


class AttentionRequirements(NamedTuple):
    """What a call needs from a backend. device: device type; capability: compute capability of the GPU, None if irrelevant."""

    device: str
    dtype: torch.dtype
    backward: bool = False
    forward_mode: bool = False
    capability: tuple[int, int] | None = None


class Backend(NamedTuple):
    """An implementation and its capabilities. devices, backward: device types of the forward and the backward pass; dtypes: None for
    all; forward_mode: whether it supports `torch.func.jvp`; capability: minimum compute capability of the GPU."""

    run: Attention
    devices: tuple[str, ...]
    backward: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None = None
    forward_mode: bool = False
    capability: tuple[int, int] | None = None


def attention(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, q_segments: Segments, kv_segments: Segments, *, backend: str = "auto") -> Tensor:
    """Softmax attention within each segment, scale D^−½. Returns (T, H, D); zeros for a segment without keys.

    Raises ValueError for an unknown backend or one that does not meet the requirements.
    """
    needs = AttentionRequirements(
        q_THD.device.type,
        q_THD.dtype,
        backward=torch.is_grad_enabled() and (q_THD.requires_grad or k_SHD.requires_grad or v_SHD.requires_grad),
        forward_mode=has_tangent(q_THD, k_SHD, v_SHD),
        capability=_capability(q_THD.device.index) if q_THD.is_cuda else None,
    )
    return BACKENDS[choose_backend(needs, backend)].run(q_THD, k_SHD, v_SHD, q_segments, kv_segments)


@cache
def choose_backend(needs: AttentionRequirements, wanted: str = "auto") -> str:
    """The backend for a call. The choice of `auto` is logged once with its reason.

    Raises ValueError for an unknown backend, and for an unsuitable one with the reason and an alternative.
    """
    best = next(name for name in ("flash", "varlen", "sdpa") if (name != "flash" or _flash_3()) and _obstacle(name, needs) is None)
    if wanted == "auto":
        reasons = {"flash": "flash-attn 3 is installed", "sdpa": f"varlen {_obstacle('varlen', needs)}"}
        log.info("attention backend %s for %s on %s: %s", best, needs.dtype, needs.device, reasons.get(best, "supported by the GPU"))
        return best
    if wanted not in BACKENDS:
        raise ValueError(f"unknown attention backend {wanted!r}: choose one of auto, {', '.join(BACKENDS)}")
    obstacle = _obstacle(wanted, needs)
    if obstacle is not None:
        raise ValueError(f"attention backend {wanted!r} {obstacle}: use {best!r}")
    return wanted


def obstacles(needs: AttentionRequirements) -> dict[str, str | None]:
    """Why each backend cannot be used for a call, None for those that can."""
    return {name: _obstacle(name, needs) for name in BACKENDS}


def _obstacle(name: str, needs: AttentionRequirements) -> str | None:
    """Why a backend cannot be used, or None."""
    backend = BACKENDS[name]
    if needs.device not in backend.devices:
        return f"needs {' or '.join(backend.devices)}, not {needs.device}"
    if backend.dtypes is not None and needs.dtype not in backend.dtypes:
        return f"needs {' or '.join(str(dtype) for dtype in backend.dtypes)}, not {needs.dtype}"
    if backend.capability is not None and needs.capability is not None and needs.capability < backend.capability:
        required, actual = (".".join(map(str, version)) for version in (backend.capability, needs.capability))
        return f"needs a GPU of compute capability {required}, not {actual}"
    if needs.forward_mode and not backend.forward_mode:
        return "has no forward-mode derivative"
    if needs.backward and needs.device not in backend.backward:
        return f"has no backward pass on {needs.device}"
    if name == "flash" and not _flash_3() and find_spec("flash_attn") is None:
        return "needs the package flash-attn (the extra 'flash')"
    return None


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _flash_3() -> bool:
    """Whether flash-attn 3 is installed and the GPU can run it."""
    return find_spec("flash_attn_interface") is not None and torch.cuda.is_available() and _capability(None) >= HOPPER


@cache
def _flash_function() -> Any:
    return import_module("flash_attn_interface" if _flash_3() else "flash_attn").flash_attn_varlen_func


def _flash(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    return _fused(_flash_function(), q, k, v, q_segments, kv_segments)


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return _fused(varlen_attn, q, k, v, q_segments, kv_segments)


def _flex(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    from tim.attention.flex import flex  # imports torch's symbolic shapes, which takes a second

    return flex(q, k, v, q_segments, kv_segments)


def _fused(function: Any, q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    """Call with the seven positional arguments that all releases of torch and flash-attn share."""
    cu_q, cu_k = q_segments.cu_seqlens, kv_segments.cu_seqlens
    out = function(q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, q_segments.max_len, kv_segments.max_len)
    return out[0] if isinstance(out, tuple) else out  # early releases of flash-attn 3 also return the log-sum-exp


BACKENDS = {
    "varlen": Backend(_varlen, devices=("cuda",), backward=("cuda",), dtypes=HALF, capability=AMPERE),
    "flash": Backend(_flash, devices=("cuda",), backward=("cuda",), dtypes=HALF, capability=AMPERE),
    "flex": Backend(_flex, devices=("cuda", "cpu"), backward=("cuda",)),
    "sdpa": Backend(sdpa, devices=("cuda", "cpu"), backward=("cuda", "cpu"), forward_mode=True),
}
