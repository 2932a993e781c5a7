"""Prepare a folder of captioned images with other tools, used as in their documentation, with the checks of `tim prepare` they support.

`tim bench prepare` runs this file with the Python of the environment in which they are installed, so it does not import this project. It
prints one JSON object with the number of kept images. The folder has images and `metadata.jsonl` (`file_name`, `text`).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MIN_SIDE, MAX_ASPECT, MAX_CHARACTERS = 16, 8.0, 4096
LARGEST_SIDE = 1024  # img2dataset's keep_ratio scales down to it
_COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=TOOLS)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    with open(os.path.join(options.folder, "metadata.jsonl"), encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    listed = [{"path": os.path.join(os.path.abspath(options.folder), row["file_name"]), "text": row["text"]} for row in rows]
    os.makedirs(options.out)
    kept = TOOLS[options.name](listed, options.out, options.workers)
    print(json.dumps({"kept": kept}), file=sys.__stdout__)  # some tools replace sys.stdout


Listed = list[dict[str, str]]


def img2dataset_no(listed: Listed, out: str, workers: int) -> int:
    return _img2dataset(listed, out, workers, resize_mode="no")


def img2dataset_keep_ratio(listed: Listed, out: str, workers: int) -> int:
    return _img2dataset(listed, out, workers, resize_mode="keep_ratio", resize_only_if_bigger=True, image_size=LARGEST_SIDE)


def _img2dataset(listed: Listed, out: str, workers: int, **resizing: Any) -> int:
    """The full img2dataset pipeline, "downloading" from file: URLs."""
    from img2dataset import download

    table = os.path.join(out, "list.jsonl")
    with open(table, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"url": f"file://{row['path']}", "caption": row["text"]}) + "\n" for row in listed)
    download(
        url_list=table,
        input_format="jsonl",
        url_col="url",
        caption_col="caption",
        output_folder=os.path.join(out, "shards"),
        output_format="webdataset",
        processes_count=workers,
        thread_count=16,
        number_sample_per_shard=-(-len(listed) // (4 * workers)),
        encode_quality=95,
        min_image_size=MIN_SIDE,
        max_aspect_ratio=MAX_ASPECT,
        compute_hash="sha256",
        enable_wandb=False,
        **resizing,
    )
    stats = [name for name in os.listdir(os.path.join(out, "shards")) if name.endswith("_stats.json")]
    return sum(json.load(open(os.path.join(out, "shards", name)))["successes"] for name in stats)


def datasets_map(listed: Listed, out: str, workers: int) -> int:
    """`map` and `filter` over image files; keeps the original bytes and removes exact duplicates."""
    import datasets

    data = datasets.Dataset.from_list(listed)
    data = data.map(_examine, num_proc=workers)
    seen: set[str] = set()
    first = [digest not in seen and not seen.add(digest) for digest in data["sha256"]]
    data = data.select([row for row, (is_new, is_valid) in enumerate(zip(first, data["valid"], strict=True)) if is_new and is_valid])
    data.save_to_disk(os.path.join(out, "data"), num_proc=workers)
    return len(data)


def _examine(row: dict[str, Any]) -> dict[str, Any]:
    with open(row["path"], "rb") as stream:
        data = stream.read()
    result = {"image": data, "sha256": hashlib.sha256(data).hexdigest(), "phash": "", "width": 0, "height": 0, "valid": False}
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # decodes every pixel
    except Exception:  # any decoding error
        return result
    low = _COSINES @ np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64) @ _COSINES.T
    result["phash"] = np.packbits(low > np.median(low)).tobytes().hex()
    result["width"], result["height"] = image.size
    short, long = sorted(image.size)
    result["valid"] = short >= MIN_SIDE and long <= MAX_ASPECT * short and 0 < len(row["text"].strip()) <= MAX_CHARACTERS
    return result


def data_juicer(listed: Listed, out: str, workers: int) -> int:
    """Data-Juicer's operators for sizes, aspect ratios, text lengths and perceptual-hash duplicates."""
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    table, result = os.path.join(out, "list.jsonl"), os.path.join(out, "kept.jsonl")
    with open(table, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"images": [row["path"]], "text": f"<__dj__image> {row['text']}"}) + "\n" for row in listed)
    process = [
        {"image_shape_filter": {"min_width": MIN_SIDE, "min_height": MIN_SIDE}},
        {"image_aspect_ratio_filter": {"min_ratio": 1 / MAX_ASPECT, "max_ratio": MAX_ASPECT}},
        {"text_length_filter": {"min_len": 1, "max_len": MAX_CHARACTERS}},
        {"image_deduplicator": {"method": "phash"}},
    ]
    recipe = os.path.join(out, "recipe.yaml")
    paths = {"dataset_path": table, "export_path": result, "ds_cache_dir": os.path.join(out, "cache")}
    with open(recipe, "w", encoding="utf-8") as stream:  # JSON is YAML
        json.dump({"project_name": "bench", **paths, "np": workers, "process": process}, stream)
    DefaultExecutor(init_configs(["--config", recipe])).run()
    with open(result, encoding="utf-8") as stream:
        return sum(1 for _ in stream)


# Packages to install for tools that are not dependencies of this project. Data-Juicer's duplicate operator needs imagededup, which it would
# otherwise install during the measurement.
PACKAGES = {"img2dataset": ["img2dataset"], "py-data-juicer": ["py-data-juicer", "imagededup"]}

# Name in the results table → function. The name starts with the package, up to the first space.
TOOLS: dict[str, Callable[[Listed, str, int], int]] = {
    "img2dataset no": img2dataset_no,
    "img2dataset keep_ratio": img2dataset_keep_ratio,
    "datasets map": datasets_map,
    "py-data-juicer": data_juicer,
}


if __name__ == "__main__":
    main()
