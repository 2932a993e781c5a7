"""Attention for blocks that torch.compile traces, where lengths are not values of the compiled code.

Imported only by networks that are compiled: the import of torch's compiler takes three seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tim.attention.dispatch import BACKENDS, AttentionRequirements, attention, choose_backend
from tim.attention.traced import sdpa_traced
from tim.packed import Segments


def compiled_attention(
    q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, q_segments: Segments, kv_segments: Segments, *, backend: str = "auto"
) -> Tensor:
    """Like `tim.attention.dispatch.attention`. While torch.compile traces, the segments may have no lengths.

    A forward-mode derivative is not compiled.
    """
    if not torch.compiler.is_compiling():
        return attention(q_THD, k_SHD, v_SHD, q_segments, kv_segments, backend=backend)
    backward = torch.is_grad_enabled() and (q_THD.requires_grad or k_SHD.requires_grad or v_SHD.requires_grad)
    name = _choose(q_THD.device.type, q_THD.device.index, q_THD.dtype, backward, backend)
    if name == "varlen":
        return BACKENDS[name].run(q_THD, k_SHD, v_SHD, q_segments, kv_segments)
    if name == "sdpa" and q_THD.device.type == "cpu":
        return sdpa_traced(q_THD, k_SHD, v_SHD, q_segments.ends, kv_segments.ends)
    return _untraced(name, q_THD, k_SHD, v_SHD, q_segments, kv_segments)  # pyright: ignore[reportCallIssue]  (its decorator has no types)


@torch.compiler.assume_constant_result
def _choose(device: str, index: int | None, dtype: torch.dtype, backward: bool, wanted: str) -> str:
    capability = torch.cuda.get_device_capability(index) if device == "cuda" else None
    return choose_backend(AttentionRequirements(device, dtype, backward=backward, capability=capability), wanted)


@torch.compiler.disable
def _untraced(name: str, q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    """A backend that torch.compile cannot trace: the block is compiled in two parts, before and after."""
    q_segments, kv_segments = (segments._replace(lengths=tuple(segments.ends.diff().tolist())) for segments in (q_segments, kv_segments))
    return BACKENDS[name].run(q, k, v, q_segments, kv_segments)
