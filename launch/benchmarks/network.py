"""Benchmarks of the packed network, compared with padded batches and exact-size buckets of the same images and weights.

Variants run interleaved, and the fastest run of each counts, so that other load on the machine affects all equally. Precision is float32 on
the CPU, bfloat16 autocast on a GPU. A grid is an image's height and width in tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from launch.benchmarks.padded_network import DenseNetwork, Padding, dense_attention
from launch.distributed.device import training_device
from pipeline.corpus.corpus import Corpus
from pipeline.cost import DIFFUSION, TRANSITION
from pipeline.images import exif_orientation
from pipeline.progress import Progress
from pipeline.size_rule import SizeRule, target_sizes
from tim import PackedText, PackedTokens, Segments, TransitionObjective, TransitionTransformer, transports
from tim import sample as draw
from tim.attention.dispatch import BACKENDS, AttentionRequirements, attention, choose_backend
from tim.flops import Lengths, activation_bytes, step_flops
from tim.model_kinds import Precision
from tim.objective import Network

STRIDE = 16  # pixels per side of a token: raw pixels in patches of 16
FEATURES = 128  # width of the caption features
Grid = tuple[int, int]
Data = dict[str, Any]


def grids_of(paths: Sequence[Path], *, max_tokens: int) -> list[Grid]:
    """Grids by the native-size rule, in a fixed random order, of corpora, image folders (only headers are read), or a synthetic list.

    Raises ValueError if there are no images.
    """
    sides = [size for path in paths for size in image_sizes(path)] if paths else _synthetic_sizes()
    rule = SizeRule(stride=STRIDE, max_tokens=max_tokens)
    targets = target_sizes([height for height, _ in sides], widths=[width for _, width in sides], rule=rule)
    kept = np.flatnonzero(targets.left_out == 0)
    if not len(kept):
        raise ValueError(f"{', '.join(map(str, paths))}: no images: give a corpus or a folder of images")
    order = np.random.default_rng(0).permutation(kept)
    return [(int(targets.height[i]) // STRIDE, int(targets.width[i]) // STRIDE) for i in order]


def bench_step(grids: list[Grid], *, width: int, depth: int, batch: int, batches: int, repeats: int, progress: Progress) -> Data:
    """Benchmark a training step of the objective without the optimizer update. Half of the images have r < t."""
    bench = Bench(width=width, depth=depth)
    packs = [bench.inputs(grids[i : i + batch]) for i in range(0, min(len(grids), batch * batches), batch)]
    without_transitions = [(latents, text, {**rest, "kinds": torch.full_like(rest["kinds"], DIFFUSION)}) for latents, text, rest in packs]
    buckets = _buckets(grids, max_images=batch)
    chosen = np.random.default_rng(1).permutation(len(buckets))[: max(4, len(packs) * 8)]  # a random sample of the buckets
    pieces = [bench.inputs(buckets[i]) for i in chosen]
    dense = DenseNetwork(bench.network)
    rate = bench.matmul_rate()
    seconds = fastest(
        {
            "packed": lambda: bench.train(bench.network, packs),
            "padded": lambda: bench.train(dense, packs),
            "buckets": lambda: bench.train(dense, pieces),
            "forward and backward": lambda: bench.train(bench.network, without_transitions, derivative=False),
            "derivative": lambda: bench.derivative(packs),
        },
        repeats=repeats,
        progress=progress,
    )
    images, images_in_buckets = sum(len(p[0]) for p in packs), sum(len(p[0]) for p in pieces)
    tokens, tokens_in_buckets = (sum(sum(bench.lengths(p).tokens) for p in some) for some in (packs, pieces))
    params = bench.network.params
    work = sum(step_flops(params, bench.lengths(p), moving=range(0, len(p[0]), 2)) for p in packs)
    padded_work = sum(step_flops(params, _padded(bench.lengths(p)), moving=range(0, len(p[0]), 2)) for p in packs)
    ratio, ideal = seconds["padded"] / seconds["packed"], padded_work / work
    per_token = {"packed": seconds["packed"] / tokens, "buckets": seconds["buckets"] / tokens_in_buckets}
    data: Data = {
        **bench.facts(),
        "images": images,
        "tokens": tokens,
        "images_per_second": {
            "packed": images / seconds["packed"],
            "padded": images / seconds["padded"],
            # Sampled buckets hold other images: use their seconds per token with the packs' tokens per image.
            "buckets": images / (per_token["buckets"] * tokens),
        },
        "padded_over_packed": ratio,
        "ideal_padded_over_packed": ideal,
        "share_of_ideal": ratio / ideal,
        "buckets_over_packed": per_token["buckets"] / per_token["packed"],
        "images_per_bucket": images_in_buckets / len(pieces),
        "derivative_over_forward_backward": seconds["derivative"] / seconds["forward and backward"],
        "flops": work,
        "share_of_matmul_rate": work / seconds["packed"] / rate,
        "matmul_flops_per_second": rate,
        "estimated_activation_bytes": max(activation_bytes(params, bench.lengths(p), precision=bench.precision) for p in packs),
    }
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.train(bench.network, without_transitions[:1], derivative=False)
        data["peak_activation_bytes"] = torch.cuda.max_memory_allocated() - before
    return data


def bench_attention(grids: list[Grid], *, width: int, batch: int, repeats: int, progress: Progress) -> Data:
    """Benchmark self-attention of one pack, forward and backward, with every supported backend. Head width is 64."""
    device = training_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lengths = [height * wide for height, wide in grids[:batch]]
    segments = Segments.from_lengths(lengths, device)
    q, k, v = (torch.randn(sum(lengths), width // 64, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    padding = Padding.of(segments, device)
    variants: dict[str, Callable[[], Tensor]] = {}
    requirements = AttentionRequirements(
        device.type, dtype, backward=True, capability=torch.cuda.get_device_capability() if device.type == "cuda" else None
    )
    unsupported = {name: why for name in BACKENDS if (why := _unsupported_reason(name, requirements))}
    for name in BACKENDS:
        if name not in unsupported:
            variants[name] = lambda name=name: attention(q, k, v, segments, segments, backend=name)
    variants["padded"] = lambda: padding.gather(dense_attention(padding.spread(q), padding.spread(k), padding.spread(v), padding.mask))
    variants["image by image"] = lambda: torch.cat(
        [
            dense_attention(q_part[None], k_part[None], v_part[None], None)[0]
            for q_part, k_part, v_part in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
    )
    timed: dict[str, Callable[[], object]] = {}
    for name, run in variants.items():
        timed[f"{name} forward"] = lambda run=run: run()
        timed[f"{name} with backward"] = lambda run=run: run().sum().backward()
    seconds = fastest(timed, repeats=repeats, progress=progress)
    return {
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "images": len(lengths),
        "tokens": sum(lengths),
        "auto": choose_backend(requirements),
        "seconds": seconds,
        "impossible": unsupported,
    }


def bench_sample(grids: list[Grid], *, width: int, depth: int, batch: int, steps: int, repeats: int, progress: Progress) -> Data:
    """Benchmark guided sampling of one pack. The dense variants also run both halves of the guidance as one batch."""
    bench = Bench(width=width, depth=depth)
    transport = transports.make("ot_fm")

    def sampled(network: TransitionTransformer | DenseNetwork, some: list[Grid]) -> None:
        latents, text, rest = bench.inputs(some)
        assert isinstance(text, PackedText)
        null = PackedText.from_features([torch.zeros(2, FEATURES, device=bench.device)] * len(latents))
        draw(network, rest["noise"], text, transport=transport, steps=steps, guidance=2.0, null_condition=null, dtype=bench.precision)

    chosen, dense = grids[:batch], DenseNetwork(bench.network)
    buckets = _buckets(chosen, max_images=batch)
    seconds = fastest(
        {
            "packed": lambda: sampled(bench.network, chosen),
            "padded": lambda: sampled(dense, chosen),
            "buckets": lambda: [sampled(dense, bucket) for bucket in buckets],
        },
        repeats=repeats,
        progress=progress,
    )
    speeds = {name: len(chosen) / value for name, value in seconds.items()}
    ratios = {f"{name}_over_packed": seconds[name] / seconds["packed"] for name in ("padded", "buckets")}
    return {**bench.facts(), "images": len(chosen), "steps": steps, "images_per_second": speeds, **ratios}


class Bench:
    """A network with random weights, and inputs for it."""

    def __init__(self, *, width: int, depth: int) -> None:
        if width % 64:
            raise ValueError(f"--width {width}: must be a multiple of 64")
        self.device = training_device()
        self.precision: Precision = "fp32" if self.device.type == "cpu" else "bf16"
        torch.manual_seed(0)
        params = {"patch_size": STRIDE, "in_channels": 3, "depth": depth, "hidden_size": width, "num_heads": width // 64}
        self.network = TransitionTransformer.from_official({**params, "cap_feat_dim": FEATURES, "lora_hidden_size": width // 3})
        for parameter in self.network.parameters():  # a new network outputs zero for any input
            torch.nn.init.normal_(parameter, std=0.02)
        self.network.to(self.device)
        self.objective = TransitionObjective(transports.make("ot_fm"), patch_size=STRIDE, shift=256)

    def inputs(self, grids: Sequence[Grid]) -> tuple[list[Tensor], PackedText, dict[str, Any]]:
        """Random latents, captions, noise and times. Every other image has r < t."""
        generator = torch.Generator().manual_seed(len(grids))
        shapes = [(3, height * STRIDE, width * STRIDE) for height, width in grids]
        latents, noise = ([torch.randn(shape, generator=generator).to(self.device) for shape in shapes] for _ in range(2))
        lengths = torch.randint(4, 24, (len(grids),), generator=generator).tolist()
        text = PackedText.from_features([torch.randn(m, FEATURES, generator=generator).to(self.device) for m in lengths])
        kinds = torch.tensor([DIFFUSION if i % 2 else TRANSITION for i in range(len(grids))])
        uniforms = torch.rand(len(grids), 2, generator=generator, dtype=torch.float64)
        return latents, text, {"noise": noise, "kinds": kinds, "uniforms": uniforms, "weights": torch.ones(len(grids))}

    def lengths(self, inputs: tuple[list[Tensor], PackedText, dict[str, Any]]) -> Lengths:
        """Token lengths of images and captions."""
        latents, text, _ = inputs
        return Lengths([x.shape[1] * x.shape[2] // STRIDE**2 for x in latents], text.segments.lengths)

    def train(self, network: Network, packs: list[Any], *, derivative: bool = True) -> None:
        """Loss and gradients of every pack; without `derivative`, all images are treated as r = t."""
        for latents, text, rest in packs:
            with self.precise():
                if derivative:
                    loss = self.objective(network, latents, text, **rest).loss
                else:
                    packed, t, r = self._noisy(latents, rest)
                    loss = network(packed, t, r, text).tokens.square().mean()
            loss.backward()
        self.network.zero_grad()

    @torch.no_grad()
    def derivative(self, packs: list[Any]) -> None:
        """Both evaluations of the r < t images, as one pack, in training precision."""
        for latents, text, rest in packs:
            moving = (rest["kinds"] == TRANSITION).nonzero()[:, 0].tolist() * 2
            packed, t, r = self._noisy(latents, rest)
            with self.precise():
                self.network(packed.select(moving), t[moving], r[moving], text.select(moving))

    @contextmanager
    def precise(self) -> Iterator[None]:
        """Context with the precision of the benchmark."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def matmul_rate(self, side: int = 1024) -> float:
        """FLOP/s of a large matrix product on this device in the benchmark's precision."""
        side = side if self.device.type == "cpu" else 8 * side
        a, b = (
            torch.randn(side, side, device=self.device, dtype=torch.float32 if self.precision == "fp32" else torch.bfloat16) for _ in "ab"
        )
        return 2 * side**3 / fastest({"": lambda: a @ b}, repeats=5, progress=lambda *_, **__: None)[""]

    def facts(self) -> Data:
        """Device, precision and number of parameters."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {"device": _device_name(self.device), "precision": self.precision, "parameters": parameters}

    def _noisy(self, latents: list[Tensor], rest: dict[str, Any]) -> Any:
        packed = PackedTokens.from_latents(latents, STRIDE)
        t = rest["uniforms"][:, 0].to(self.device, torch.float32)
        return packed, t, t / 2


def fastest(variants: dict[str, Callable[[], object]], *, repeats: int, progress: Progress) -> dict[str, float]:
    """Seconds of each variant's fastest run. Variants run interleaved, after one warm-up run."""
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    total = (repeats + 1) * len(variants)
    for turn in range(repeats + 1):
        for position, (name, run) in enumerate(variants.items()):
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
            progress("measuring", turn * len(variants) + position + 1, total)
    return dict(best)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _buckets(grids: Sequence[Grid], *, max_images: int) -> list[list[Grid]]:
    """Batches of at most `max_images` images of exactly equal size."""
    by_size: dict[Grid, list[Grid]] = defaultdict(list)
    for grid in grids:
        by_size[grid].append(grid)
    return [bucket[i : i + max_images] for bucket in by_size.values() for i in range(0, len(bucket), max_images)]


def _padded(lengths: Lengths) -> Lengths:
    assert lengths.text is not None
    return Lengths([max(lengths.tokens)] * len(lengths.tokens), [max(lengths.text)] * len(lengths.text))


def image_sizes(path: Path) -> list[tuple[int, int]]:
    """Heights and widths of the images of a corpus or a folder. Skips files that are not images."""
    if (path / "manifest.json").is_file():
        corpus = Corpus.open(path)
        tables = [corpus.read(shard, columns=["height", "width"]).to_pydict() for shard in range(len(corpus.shards))]
        return [size for table in tables for size in zip(table["height"], table["width"], strict=True)]
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder: give a corpus or a folder of images")
    sizes = [_size(file) for file in sorted(path.iterdir())]
    return [size for size in sizes if size is not None]


def _size(file: Path) -> tuple[int, int] | None:
    """Height and width of an image after EXIF rotation; None if the file is not an image."""
    try:
        with Image.open(file) as image:
            return image.size if exif_orientation(image) >= 5 else (image.height, image.width)
    except (UnidentifiedImageError, IsADirectoryError, Image.DecompressionBombError):
        return None


def _unsupported_reason(name: str, requirements: AttentionRequirements) -> str:
    try:
        choose_backend(requirements, name)
    except ValueError as error:
        return str(error)
    return ""


def _synthetic_sizes() -> list[tuple[int, int]]:
    """400 synthetic sizes like those of web photographs: median half a megapixel, most of them 3:2 to 4:3."""
    generator = np.random.default_rng(0)
    area = np.exp(generator.normal(np.log(5e5), 0.8, 400))
    aspect = generator.choice([4 / 3, 3 / 2, 1.0, 3 / 4, 2 / 3, 16 / 9], 400)
    return [(round(height), round(width)) for height, width in zip(np.sqrt(area / aspect), np.sqrt(area * aspect), strict=True)]
