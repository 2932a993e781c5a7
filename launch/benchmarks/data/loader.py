"""Benchmark `tim bench data`: load images from shards to arrays of their target sizes, compared with other loaders on the same tars.

All loaders have the same number of worker processes and run interleaved; the fastest run of each counts. The others decode with Pillow and
resize with its bicubic filter, which is cheaper than our Lanczos filter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dataprep.prepare import PrepareConfig, prepare
from launch.benchmarks.data import loader_peers
from launch.benchmarks.data.environments import environment, run_json
from launch.benchmarks.data.interleaved import BOUND, OURS, relative_rates, run_interleaved
from pipeline.corpus.corpus import Corpus
from pipeline.foreign_warnings import hide_if_asked
from pipeline.images import load_image
from pipeline.loading.loader import Loader
from pipeline.planned_steps import PlannedSample
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.progress import Progress
from pipeline.storage.shard_reader import ByteRange, ShardReader

STRIDE = 32  # pixels per token side, and per latent cell, as with the codec of the published text-to-image network
CHANNELS = 32
PIXELS_PER_STEP = 16 * 1024**2
Data = dict[str, Any]


def bench_data(
    folder: Path, *, work: Path, max_side: int, workers: int, seconds: float, repeats: int, install: bool, progress: Progress
) -> Data:
    """Run on the JPEGs of a folder, scaled down to `max_side`² pixels. `work` holds prepared shards and the others' environment.

    Raises ValueError if there are no JPEGs.
    """
    corpus = _prepare_corpus(folder, work=work)
    plan = Planner(
        [corpus],
        plan=PlanConfig(
            stride=STRIDE,
            max_tokens=max_side**2 // STRIDE**2,
            tokens_per_pack=max(PIXELS_PER_STEP // 8, 2 * max_side**2) // STRIDE**2,
            packs_per_step=4,
        ),
        seed=0,
        width=1152,
        diffusion_share=0.5,
        consistency_share=0.1,
    )
    python, missing = environment(work / "peers", packages=list(loader_peers.LOADERS), install=install)
    runs: dict[str, Callable[[], Data]] = {
        OURS: lambda: _loader_rates(plan, workers=workers, seconds=seconds),
        BOUND: lambda: _decoder_rates(plan, workers=workers, seconds=seconds),
    }
    for name in loader_peers.LOADERS:
        if name not in missing:
            options = {"tars": corpus.folder, "work": work / folder.name, "max-pixels": max_side**2, "workers": workers}
            runs[name] = partial(peer_rates, python, name, {**options, "seconds": seconds})
    best = run_interleaved(runs, repeats=repeats, missing=missing, progress=progress)
    data: Data = {
        "images": corpus.count,
        "max_side": max_side,
        "workers": workers,
        **best,
        "gigabytes_read_per_cpu_second": _reading_rate(corpus) / 1e9,
        **relative_rates(best, others=loader_peers.LOADERS),
    }
    return {**data, "not_measured": missing} if missing else data


def _prepare_corpus(folder: Path, *, work: Path) -> Corpus:
    """Prepare the folder's JPEGs in about four shards, keeping the original bytes of valid files."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder}: no JPEGs: give a folder of images")
    links, out = work / f"{folder.name}-jpegs", work / f"{folder.name}-corpus"
    links.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (links / file.name).exists():
            (links / file.name).symlink_to(file.resolve())
    config = {"captions": {"required": False}, "shards": {"max_samples": -(-len(files) // 4)}}
    prepare([str(links)], out=out, config=PrepareConfig.model_validate(config))
    return Corpus.open(out)


def _loader_rates(planner: Planner, *, workers: int, seconds: float) -> Data:
    """Rates of the full loader. Steps loaded before the measurement are not counted."""
    loader = Loader(planner, seed=0, channels=CHANNELS, factor=STRIDE, workers=workers, max_bad_fraction=0)
    with closing(loader):
        return loader_peers.rates((step.images for step in loader), warm_up=3, seconds=seconds)


def _decoder_rates(planner: Planner, *, workers: int, seconds: float) -> Data:
    """Rates of the same number of processes that only decode and resize images from memory."""
    samples = [sample for pack in planner.next_step().packs for sample in pack.samples]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=hide_if_asked) as pool:
        futures = [pool.submit(decode_for, samples, seconds) for _ in range(workers)]
        rates = [future.result() for future in futures]
    by_cpu = workers / sum(1 / rate["images_per_cpu_second"] for rate in rates)
    return {"images_per_second": sum(rate["images_per_second"] for rate in rates), "images_per_cpu_second": by_cpu}


def decode_for(samples: Sequence[PlannedSample], seconds: float) -> Data:
    """Decode and resize samples for `seconds`, in one thread."""
    import torch

    torch.set_num_threads(1)
    reader = ShardReader()
    encoded = [(sample, reader.read(sample.tar, offset=sample.image.offset, length=sample.image.length)) for sample in samples]
    reader.close()
    return loader_peers.rates(map(_decode, cycle(encoded)), warm_up=1, seconds=seconds)


def _decode(encoded: tuple[PlannedSample, bytes]) -> int:
    sample, data = encoded
    load_image(data, resize=sample.resize, crop=(sample.height, sample.width))
    return 1


def _reading_rate(corpus: Corpus) -> float:
    """Bytes of images read in random order per second of one core, from the page cache."""
    parts: list[ByteRange] = []
    for number, shard in enumerate(corpus.shards):
        table = corpus.read(number, columns=("image_offset", "image_length")).to_pydict()
        parts += [ByteRange(shard.path, *span) for span in zip(table["image_offset"], table["image_length"], strict=True)]
    size = sum(part.length for part in parts)
    reader = ShardReader()
    best = float("inf")
    for _ in range(6):
        start = time.process_time()
        for i in range(0, len(parts), 64):
            reader.read_parts(parts[i : i + 64])
        best = min(best, time.process_time() - start)
    reader.close()
    return size / best


def peer_rates(python: Path, name: str, options: dict[str, Any]) -> Data:
    """Measure another loader in its environment. Raises ChildProcessError with its last output line if it fails."""
    Path(options["work"]).mkdir(parents=True, exist_ok=True)
    arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
    return run_json([python, loader_peers.__file__, name, *arguments], seconds=600 + options["seconds"])
