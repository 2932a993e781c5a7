"""Write a plan for other trainers: steps and packs as JSON lines, or the buckets that the official TiM code reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.corpus import Corpus, read_manifest
from pipeline.cost import KIND_NAMES
from pipeline.packing.rank_assignment import assign_to_ranks
from pipeline.planned_steps import PlannedSample
from pipeline.planning.planner import Planner
from pipeline.progress import Progress, no_progress
from pipeline.randomness import draws
from pipeline.storage.atomic import publish

FORMAT = 1
DATA_INFO, BUCKET_SAMPLER = "data_info.jsonl", "bucket_sampler.json"
_OFFICIAL_STRIDE = 32  # to which the official code rounds every bucket's sides down


def export_steps(planner: Planner, *, file: Path, steps: int, ranks: int = 1, progress: Progress = no_progress) -> dict[str, Any]:
    """Plan `steps` steps ahead and write one JSON line per pack; the planner is left after them. The file appears whole or not at all.

    Keys of a line: `format`; `step`, `rank` and `pack`, each counted from 0, `pack` within the step and rank; `step_images`, the number of
    images of the step on all ranks, by which a sum of losses is divided; `tokens`, `cost` and `samples` of the pack. Every rank has equally
    many packs of a step, some of them empty where `ranks` does not divide them.

    Keys of a sample: `id` (corpus name / key), `key`, `tar`, `offset` and `length` (of the image's file in the tar, in bytes), `resize`
    ([height, width] to scale the upright image to), `height` and `width` (to cut from the centre of that), `tokens`, `kind` (`diffusion`:
    r = t, `consistency`: r = 0, `transition`: r < t), `caption` (which of its captions, −1: dropped), `label` (−1: none or dropped),
    `flip`, `visit` (how often it was planned before), `loss_weight` (of its corpus) and `mask` ([offset, length] of its loss mask, or
    null).

    Returns the counts of `steps`, `packs` and `images`. Raises ValueError for an impossible number of steps or ranks, or if a table cannot
    be read.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} is not a number of steps to plan, give 1 or more")
    packs = images = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with publish(file) as stream:
        for done in range(steps):
            step = planner.next_step()
            for rank, share in enumerate(assign_to_ranks(step, ranks=ranks, lockstep=False)):
                for number, pack in enumerate(share):
                    place = {"format": FORMAT, "step": step.index, "rank": rank, "pack": number, "step_images": step.images}
                    samples = [_sample(sample) for sample in pack.samples]
                    _write_line(stream, {**place, "tokens": pack.tokens, "cost": pack.cost, "samples": samples})
                packs += len(share)
            images += step.images
            progress("exporting", done + 1, steps)
    return {"steps": steps, "packs": packs, "images": images}


def _sample(sample: PlannedSample) -> dict[str, Any]:
    return {
        "id": sample.id,
        "key": sample.key,
        "tar": sample.tar,
        "offset": sample.image.offset,
        "length": sample.image.length,
        "resize": list(sample.resize),
        "height": sample.height,
        "width": sample.width,
        "tokens": sample.tokens,
        "kind": KIND_NAMES[sample.kind],
        "caption": sample.caption,
        "label": sample.label,
        "flip": sample.flip,
        "visit": sample.visit,
        "loss_weight": sample.loss_weight,
        "mask": [sample.mask.offset, sample.mask.length] if sample.mask.exists else None,
    }


def export_buckets(planner: Planner, *, folder: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write every sample of the plan's corpora once, in buckets of exactly one size, as the official TiM code reads them.

    - `data_info.jsonl`, its `jsonl_dir`: a line per sample with `image_file`, `captions` and `bucket` (`native-HEIGHTxWIDTH`).
    - `bucket_sampler.json`, its `packed_json`: a list of batches, each a list of line numbers, counted from 0, of one bucket. A batch has
      as many images as fit into `plan.tokens_per_pack`; the last one of a bucket may have fewer. The plan's seed shuffles each bucket.

    `image_file` is CORPUS/KEY.EXTENSION: extract the shards of each corpus into the folder of its name, and give the folder above as
    `root_dir` (`tar -xf CORPUS/000000.tar -C ROOT/CORPUS`). That code squashes an image to its bucket's size, as `plan.fit: squash` does,
    and draws kinds, captions and the order of batches itself.

    Returns the counts of `images`, `buckets` and `batches`. Raises ValueError for a plan that buckets cannot hold (another stride than a
    multiple of 32, a schedule, or weight, repeats, cap or loss_weight of a corpus), and for a corpus that `tim prepare` did not write.
    """
    _check_bucketable(planner)
    folder.mkdir(parents=True, exist_ok=True)
    sizes: list[NDArray[np.int64]] = []
    shuffled: list[NDArray[np.uint64]] = []
    shards = sum(len(source.corpus.shards) for source in planner.sources)
    done = 0
    with publish(folder / BUCKET_SAMPLER) as sampler, publish(folder / DATA_INFO) as info:
        for source in planner.sources:
            extension = _extension(source.corpus)
            for shard in range(len(source.corpus.shards)):
                table, targets = source.select(shard, rule=planner.plan.size_rule, columns=("key", "captions"))
                kept = np.flatnonzero(targets.left_out == 0)
                keys, captions = table.column("key").take(kept).to_pylist(), table.column("captions").take(kept).to_pylist()
                size = np.stack([targets.height[kept], targets.width[kept], targets.tokens[kept]], axis=1)
                for key, texts, (height, width) in zip(keys, captions, size[:, :2].tolist(), strict=True):
                    place = {"image_file": f"{source.name}/{key}.{extension}", "captions": texts or [""]}
                    _write_line(info, {**place, "bucket": f"native-{height}x{width}"})
                sizes.append(size)
                shuffled.append(draws(planner.seed, "buckets", visits=0, ids=source.hashes(keys)))
                done += 1
                progress("exporting", done, shards)
        if not sum(map(len, sizes)):
            raise ValueError("there is nothing to export: the plan leaves every sample out")
        buckets, batches = _write_batches(
            sampler, np.concatenate(sizes), order=np.concatenate(shuffled), tokens_per_batch=planner.plan.tokens_per_pack
        )
    return {"images": sum(map(len, sizes)), "buckets": buckets, "batches": batches}


def _check_bucketable(planner: Planner) -> None:
    if planner.stride % _OFFICIAL_STRIDE:
        raise ValueError(
            f"plan.stride {planner.stride}: the official code rounds buckets to {_OFFICIAL_STRIDE} pixels: plan with multiples"
        )
    if planner.plan.schedule:
        raise ValueError("plan.schedule: buckets are the same in all steps, leave it out")
    for source in planner.sources:
        if source.weight is not None or source.repeats != 1 or source.cap is not None:
            raise ValueError(f"corpus {source.name}: buckets hold every sample once, leave out weight, repeats and cap")
        if source.loss_weight != 1:
            raise ValueError(f"corpus {source.name}: the official code weights every sample alike, leave out loss_weight")


def _extension(corpus: Corpus) -> str:
    """Of all image files of a prepared corpus."""
    try:
        return read_manifest(corpus.folder)["config"]["images"]["format"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"corpus {corpus.name}: its manifest names no image format; buckets need what `tim prepare` wrote") from error


def _write_batches(stream: BinaryIO, sizes: NDArray[np.int64], *, order: NDArray[np.uint64], tokens_per_batch: int) -> tuple[int, int]:
    """Write the JSON list of batches of rows (n, 3) of height, width and tokens: the number of buckets, and of batches."""
    rows = np.lexsort((order, sizes[:, 1], sizes[:, 0]))
    starts = np.flatnonzero(np.any(np.diff(sizes[rows, :2], axis=0, prepend=-1), axis=1))
    batches = 0
    for bucket in np.split(rows, starts[1:]):
        images = tokens_per_batch // int(sizes[bucket[0], 2])
        for first in range(0, len(bucket), images):
            stream.write(b",\n" if batches else b"[")
            stream.write(json.dumps(bucket[first : first + images].tolist()).encode())
            batches += 1
    stream.write(b"]\n")
    return len(starts), batches


def _write_line(stream: BinaryIO, values: dict[str, Any]) -> None:
    stream.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
