"""What a check is given, and how checks measure: random inputs, time, memory, relative errors."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tim import PackedText, PackedTokens, TransitionTransformer

Choice = TypeVar("Choice")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY = {"patch_size": 1, "in_channels": 4, "depth": 2, "hidden_size": 32, "cap_feat_dim": 16, "num_heads": 2, "lora_hidden_size": 8}


@dataclass(frozen=True, slots=True)
class Case:
    """Where a check runs. tiny: sizes for a CPU and a second."""

    device: torch.device
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: Choice, tiny: Choice) -> Choice:
        return tiny if self.tiny else full

    def randn(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers, drawn on the CPU so that every device sees the same."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def network(self, params: Mapping[str, Any], *, std: float = 0.02) -> TransitionTransformer:
        """A network with normal weights everywhere: a new one outputs zero for any input."""
        with self.device:
            network = TransitionTransformer.from_official(dict(params))
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, std=std, generator=generator)
            if name.endswith("norm.weight"):
                torch.nn.init.ones_(parameter)
        return network

    def pack(self, params: Mapping[str, Any], grids: Sequence[tuple[int, int]], texts: Sequence[int], *, seed: int = 0) -> Inputs:
        """Random latents, noise and captions. grids: height and width of each image in tokens; texts: tokens of each caption."""
        p, channels = params["patch_size"], params["in_channels"]
        shapes = [(channels, height * p, width * p) for height, width in grids]
        latents, noise = ([self.randn(*shape, seed=seed + 10 * i + kind) for i, shape in enumerate(shapes)] for kind in (1, 2))
        features = [self.randn(count, params["cap_feat_dim"], seed=seed + 10 * i + 3) for i, count in enumerate(texts)]
        return Inputs(latents, noise, features)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], *, repeats: int = 5, warmup: int = 2) -> float:
        """Median seconds of a call; on a GPU by CUDA events."""
        for _ in range(warmup):
            run()
        return statistics.median(self._once(run) for _ in range(repeats))

    def _once(self, run: Callable[[], object]) -> float:
        self.synchronize()
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large matrix product on this device."""
        side = self.size(8192, 64)
        a, b = (self.randn(side, side, seed=seed, dtype=dtype) for seed in (1, 2))
        return 2 * side**3 / self.seconds(lambda: a @ b, repeats=10, warmup=3)

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Largest memory of tensors since `reset_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None

    def release(self) -> None:
        """Give the memory of a check back before the next one."""
        if "torch._dynamo" in sys.modules:  # takes two seconds to import
            torch.compiler.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """A pack: latents and noise (C, h, w), caption features (M, F)."""

    latents: list[Tensor]
    noise: list[Tensor]
    features: list[Tensor]

    @property
    def text(self) -> PackedText:
        return PackedText.from_features(self.features)

    def packed(self, patch_size: int) -> PackedTokens:
        return PackedTokens.from_latents(self.latents, patch_size)

    def image(self, index: int) -> Inputs:
        """A pack of one of the images."""
        return Inputs([self.latents[index]], [self.noise[index]], [self.features[index]])


def relative_error(actual: Sequence[Tensor] | Tensor, expected: Sequence[Tensor] | Tensor) -> float:
    """Norm of the difference over the norm of what is expected, all tensors together."""
    pairs = list(zip([actual], [expected], strict=True)) if isinstance(actual, Tensor) else list(zip(actual, expected, strict=True))
    difference = sum(float((a.detach().double() - e.detach().double()).square().sum()) for a, e in pairs)  # pyright: ignore
    return math.sqrt(difference) / math.sqrt(sum(float(e.detach().double().square().sum()) for _, e in pairs))  # pyright: ignore
