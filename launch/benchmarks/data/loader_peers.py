"""Measure other loaders on a corpus's tars, used as in their documentation, with Pillow decoding.

`tim bench data` runs this file with the Python of the environment in which they are installed, so it does not import this project. It
prints one JSON object. A loader's own format or index is created once in a separate folder and not timed.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import glob
import io
import itertools
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil
from PIL import Image

BATCH = 16
SHUFFLED = 100  # samples in a shuffle buffer
EPOCH = 400  # minimum number of images per epoch, because some loaders pause between epochs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=LOADERS)
    parser.add_argument("--tars", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--max-pixels", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    tars = sorted(glob.glob(os.path.join(options.tars, "*.tar")))
    batches = LOADERS[options.name](tars, os.path.join(options.work, options.name), partial(shrunk, options.max_pixels), options.workers)
    print(json.dumps(rates(map(len, batches), warm_up=2 * options.workers, seconds=options.seconds)))


def rates(counts: Iterator[int], *, warm_up: int, seconds: float) -> dict[str, float]:
    """Images per second, and per CPU second of this process and its children, after `warm_up` batches."""
    for _ in range(warm_up):
        next(counts)
    images, start, start_cpu = 0, time.perf_counter(), _cpu_seconds()
    while time.perf_counter() - start < seconds:
        images += next(counts)
    elapsed, used = time.perf_counter() - start, _cpu_seconds() - start_cpu
    return {"images_per_second": images / elapsed, "images_per_cpu_second": images / used}


def _cpu_seconds() -> float:
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def shrunk(max_pixels: int, image: Image.Image) -> np.ndarray:
    """Resize to (h, w, 3) with at most `max_pixels` pixels, with Pillow's bicubic filter."""
    scale = min(1.0, (max_pixels / (image.width * image.height)) ** 0.5)
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


Shrink = Callable[[Image.Image], np.ndarray]


def webdataset(tars: list[str], work: str, shrink: Shrink, workers: int) -> Iterable[list[Any]]:
    import webdataset as wds

    samples = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(SHUFFLED).decode("pil").to_tuple("jpg").map(partial(_first, shrink))
    return wds.WebLoader(samples.repeat(), batch_size=BATCH, num_workers=workers, collate_fn=list)


def streaming(tars: list[str], work: str, shrink: Shrink, workers: int) -> Iterable[list[Any]]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    if not os.path.isdir(work):
        with MDSWriter(out=work, columns={"image": "bytes"}, size_limit=16 << 20) as out:
            for data in _images(tars):
                out.write({"image": data})

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return shrink(decoded(super().__getitem__(at)["image"]))

    clean_stale_shared_memory()
    dataset = Images(local=work, shuffle=True, batch_size=BATCH)
    return _endless(DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=list, persistent_workers=True))


def litdata(tars: list[str], work: str, shrink: Shrink, workers: int) -> Iterable[list[Any]]:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    if not os.path.isdir(work):
        files = []
        os.makedirs(work + "-files")
        for number, data in enumerate(_images(tars)):
            files.append(os.path.join(work + "-files", f"{number}.jpg"))
            with open(files[-1], "wb") as stream:
                stream.write(data)
        optimize(fn=_read, inputs=files, output_dir=work, chunk_bytes="16MB", num_workers=1)

    dataset = StreamingDataset(work, shuffle=True, transform=partial(_decode_and_shrink, shrink))
    return _endless(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=list, persistent_workers=True))


def energon(tars: list[str], work: str, shrink: Shrink, workers: int) -> Iterable[list[Any]]:
    from megatron.energon import ImageSample, SampleDecoder, TaskEncoder, WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    if not os.path.isdir(work):
        os.makedirs(work)
        for tar in tars:
            os.symlink(os.path.abspath(tar), os.path.join(work, os.path.basename(tar)))
        names = [os.path.basename(tar) for tar in tars]
        WebdatasetPreparator.prepare_dataset(work, names, split_parts_ratio=[("train", 1.0)], workers=1)
        with open(os.path.join(work, ".nv-meta", "dataset.yaml"), "w") as stream:
            stream.write("sample_type:\n  __module__: megatron.energon\n  __class__: ImageSample\nfield_map:\n  image: jpg\n")

    class Encoder(TaskEncoder):
        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample: ImageSample) -> Any:
            sample.image = shrink(sample.image)
            return sample

        def batch(self, samples: list[Any]) -> Any:
            return [sample.image for sample in samples]

        def encode_batch(self, batch: Any) -> Any:
            return batch

    dataset = get_train_dataset(
        work,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLED,
        max_samples_per_sequence=SHUFFLED,
        task_encoder=Encoder(),
    )
    return get_loader(dataset)


LOADERS = {"webdataset": webdataset, "mosaicml-streaming": streaming, "litdata": litdata, "megatron-energon": energon}


def _images(tars: list[str]) -> Iterator[bytes]:
    """All images, repeated until they fill an epoch."""
    images = []
    for path in tars:
        with tarfile.open(path) as tar:
            images += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    return itertools.islice(itertools.cycle(images), max(EPOCH, len(images)))


def _endless(loader: Any) -> Iterator[list[Any]]:
    while True:
        yield from loader


def _first(shrink: Shrink, sample: tuple[Image.Image]) -> np.ndarray:
    return shrink(sample[0])


def _decode_and_shrink(shrink: Shrink, data: bytes) -> np.ndarray:
    return shrink(decoded(data))


def _read(file: str) -> bytes:
    with open(file, "rb") as stream:
        return stream.read()


if __name__ == "__main__":
    main()
