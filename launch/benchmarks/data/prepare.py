"""Benchmark `tim bench prepare`: raw images to a clean corpus, compared with other tools on the same files and with bare decoding.

All tools have the same number of processes. The time of a tool is that of the whole command, including its start. The bare decoder is timed
inside its processes, without their start, while they decode every pixel.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import simplejpeg
from PIL import Image

from launch.benchmarks.data import prepare_peers
from launch.benchmarks.data.environments import environment, run_json
from launch.benchmarks.data.interleaved import BOUND, OURS, relative_rates, run_interleaved
from pipeline.corpus.record_fields import IMAGE_EXTENSIONS
from pipeline.foreign_warnings import hide_if_asked
from pipeline.progress import Progress

Data = dict[str, Any]
_TIMEOUT = 3600.0  # seconds per tool


def bench_prepare(
    images: Sequence[Path], *, work: Path, copies: int, workers: int, repeats: int, install: bool, progress: Progress
) -> Data:
    """Images per second and per CPU second. `work` holds copies of the images and the other tools' environments.

    A few unique bytes are appended to every copy, so that there are no duplicates. Raises ValueError if there are no images.
    """
    folder = _copy_images(images, work=work, copies=copies)
    files = [path for path in sorted(folder.iterdir()) if path.name != "metadata.jsonl"]
    missing: dict[str, str] = {}
    runs: dict[str, Callable[[Path], Data]] = {
        OURS: lambda out: _prepare(folder, out=out, workers=workers),
        BOUND: lambda out: _decode(files, workers=workers),
    }
    for name in prepare_peers.TOOLS:
        package = name.split(" ")[0]
        python, absent = Path(sys.executable), {}
        if package in prepare_peers.PACKAGES:
            python, absent = environment(work / f"{package}-environment", packages=prepare_peers.PACKAGES[package], install=install)
        if absent:
            missing[name] = next(iter(absent.values()))
        else:
            runs[name] = partial(_tool, python, name, folder=folder, workers=workers)
    kept: dict[str, int] = {}

    def measured(name: str) -> dict[str, float]:
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # so that pending writes do not slow down the next tool
        result = runs[name](out)
        kept[name] = result["kept"]
        return {f"images_per_{unit}": len(files) / result[f"{unit}s"] for unit in ("second", "cpu_second")}

    best = run_interleaved({name: partial(measured, name) for name in runs}, repeats=repeats, missing=missing, progress=progress)
    shutil.rmtree(work / "out", ignore_errors=True)
    ratios = relative_rates(best, others=prepare_peers.TOOLS)
    data: Data = {"images": len(files), "workers": workers, **best, "kept": kept, **ratios}
    return {**data, "not_measured": missing} if missing else data


def _copy_images(images: Sequence[Path], *, work: Path, copies: int) -> Path:
    """Create a folder with `copies` copies of all images of some folders, and captions."""
    files = [path for folder in images if folder.is_dir() for path in sorted(folder.iterdir())]
    files = [path for path in files if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    if not files:
        raise ValueError(f"{', '.join(map(str, images))}: no images: give folders of images")
    folder = work / f"images-{copies}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for copy in range(copies):
        for number, path in enumerate(files):
            name = f"{copy:03d}-{number:06d}{path.suffix}"
            (folder / name).write_bytes(path.read_bytes() + f"{copy:08d}{number:08d}".encode())
            rows.append(json.dumps({"file_name": name, "text": f"an image of {path.stem}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), "utf-8")
    return folder


def _prepare(folder: Path, *, out: Path, workers: int) -> Data:
    return _timed([sys.executable, "-m", "launch.cli", "prepare", folder, "--out", out, "--workers", workers, "--json"])


def _tool(python: Path, name: str, out: Path, *, folder: Path, workers: int) -> Data:
    return _timed([python, prepare_peers.__file__, name, "--folder", folder, "--out", out, "--workers", workers])


def _timed(command: Sequence[object]) -> Data:
    """JSON result of a command, with its elapsed seconds and the CPU seconds of it and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = run_json(command, seconds=_TIMEOUT)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**result, "seconds": elapsed, "cpu_seconds": used}


def _decode(files: Sequence[Path], *, workers: int) -> Data:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=hide_if_asked) as pool:
        done = list(pool.map(decode_all, [files[first::workers] for first in range(workers)]))
    rates = sum(count / seconds for count, seconds, _ in done)
    return {"kept": len(files), "seconds": len(files) / rates, "cpu_seconds": sum(used for _, _, used in done)}


def decode_all(files: Sequence[Path]) -> tuple[int, float, float]:
    """Read and decode files. Returns their number, elapsed seconds and CPU seconds."""
    start, busy = time.perf_counter(), time.process_time()
    for path in files:
        data = path.read_bytes()
        if data[:3] == b"\xff\xd8\xff":
            simplejpeg.decode_jpeg(data, colorspace="RGB")
        else:
            Image.open(io.BytesIO(data)).load()
    return len(files), time.perf_counter() - start, time.process_time() - busy
