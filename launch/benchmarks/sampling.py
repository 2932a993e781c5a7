"""Benchmarks of `tim.Generator` and `tim sample`: packs against one image after another, the sampler's own work, memory of the largest
images."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoints.model_spec import spec_of
from launch.config.load import load_config
from pipeline.progress import Progress
from tim import Generator, ModelSpec, PackedTokens, TransitionTransformer, sample
from tim.model_folder.folder import save_model
from tim.packed import Condition
from tim.sampling.requests import ImageRequest

RECIPE = "demo"
SIZES = ((24, 48), (32, 32), (48, 24), (40, 48), (20, 20), (64, 32))  # width and height of the list, in turn
LARGEST = 4096
LIMIT_GB = 1.0  # of activations, for the network and for the codec: one guided image at a time
# DC-AE f32c32 with an eighth of its widths: the layout decides what is tiled, the widths how much it takes.
CODEC: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_out_channels": (16, 32, 64, 64, 128, 128),
    "decoder_block_out_channels": (16, 32, 64, 64, 128, 128),
    "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
    "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
}
NETWORK = {"patch_size": 1, "in_channels": 32, "depth": 4, "hidden_size": 256, "num_heads": 4, "cap_feat_dim": 64, "lora_hidden_size": 64}


def bench_lists(*, images: int, steps: int, repeats: int, progress: Progress) -> dict[str, Any]:
    """Guided images of mixed sizes by the demo's network with random weights: all in one call, and in one call each."""
    generator = _demo_generator()
    requests = [
        ImageRequest("a red circle", width=SIZES[i % len(SIZES)][0], height=SIZES[i % len(SIZES)][1], steps=steps, guidance=2.0, seed=i)
        for i in range(images)
    ]
    variants: dict[str, Callable[[], object]] = {
        "one call": lambda: list(generator.draw(requests)),
        "one by one": lambda: [list(generator.draw([request])) for request in requests],
    }
    seconds = {name: float("inf") for name in variants}
    for repeat in range(repeats + 1):  # the first round warms up
        for number, (name, run) in enumerate(variants.items()):
            progress("sample", repeat * len(variants) + number, (repeats + 1) * len(variants))
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    drawn = list(generator.draw(requests))
    return {
        "device": generator.device.type,
        "images": images,
        "steps": steps,
        "images_per_second": {name: images / value for name, value in seconds.items()},
        "one_by_one_over_one_call": seconds["one by one"] / seconds["one call"],
        "evaluations_per_guided_step": sum(each.evaluations for each in drawn) / (images * steps),
        "share_of_own_work_at_1024_tokens": _own_share(generator, steps=steps),
    }


def bench_memory(*, counts: tuple[int, ...], steps: int, progress: Progress) -> dict[str, Any]:
    """Peak memory of `tim sample` for guided images of 4096 × 4096 pixels, by a small network and a DC-AE-shaped codec."""
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _large_model(Path(folder))
        for number, count in enumerate(counts):
            progress("sample", number, len(counts))
            size = f"{LARGEST}x{LARGEST}"
            options = ["--size", size, "--steps", str(steps), "--guidance", "2", "--count", str(count), "--memory-gb", str(LIMIT_GB)]
            options += ["--out", f"{folder}/{count}"]
            command = [sys.executable, "-m", "launch.cli", "sample", str(model), "a red circle", *options]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            said = child.stderr.read() if child.stderr is not None else ""
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else f"tim sample ended with status {status}")
            peaks[f"{count} image{'s' * (count > 1)}"] = 1024 * usage.ru_maxrss
    return {"size": f"{LARGEST} x {LARGEST}", "steps": steps, "memory_gb": LIMIT_GB, "peak_bytes": peaks}


def _demo_generator() -> Generator:
    spec = spec_of(load_config(RECIPE))
    return Generator(_random_network(spec), spec)


def _random_network(spec: ModelSpec) -> TransitionTransformer:
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope).eval().requires_grad_(False)
    for parameter in network.parameters():  # a new network outputs zero for any input
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def _large_model(folder: Path) -> Path:
    """A model folder of a small network for latents of DC-AE, and a codec of its layout with random weights."""
    from diffusers import AutoencoderDC  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

    torch.manual_seed(0)
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock")
    scales = ((), (), (), (5,), (5,), (5,))
    layout: dict[str, Any] = {"encoder_block_types": blocks, "decoder_block_types": blocks}
    layout |= {"encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales}
    AutoencoderDC(**CODEC, **layout, attention_head_dim=32).save_pretrained(folder / "codec")
    spec = replace(spec_of(load_config(RECIPE)), network=NETWORK, codec={"kind": "dc-ae", "path": str(folder / "codec")})
    save_model(folder / "model", _random_network(spec).state_dict(), spec)
    return folder / "model"


class _TimedNetwork:
    """A network that measures the time spent in it."""

    def __init__(self, network: TransitionTransformer) -> None:
        self.seconds = 0.0
        self._network = network

    @property
    def patch_size(self) -> int:
        return self._network.patch_size

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /) -> PackedTokens:
        start = time.perf_counter()
        out = self._network(packed, t, r, condition)
        if out.tokens.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return out


def _own_share(generator: Generator, *, steps: int, side: int = 32) -> float:
    """Share of the sampler's own time, without the network's, in the steps of a guided image of `side`² tokens."""
    request = generator.check(ImageRequest("a red circle", width=side * generator.stride, height=side * generator.stride, guidance=2.0))
    conditions = generator.conditions([request])
    cells = side * generator.network.patch_size
    noise = torch.randn(generator.codec.channels, cells, cells, device=generator.device)
    shares = []
    for _ in range(3):
        network = _TimedNetwork(generator.network)
        start = time.perf_counter()
        sample(
            network,
            [noise],
            conditions.condition,
            transport=generator.transport,
            steps=max(steps, 8),
            guidance=2.0,
            null_condition=conditions.null,
        )
        shares.append(1 - network.seconds / (time.perf_counter() - start))
    return min(shares)
