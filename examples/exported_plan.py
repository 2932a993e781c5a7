"""Follow an exported plan without `tim`: read its JSON lines, and the images by their byte ranges.

Shows what `tim plan --export` writes: one line per pack, with rank, keys, target sizes, kinds and draws. Any trainer that can read a file
range can follow the plan; this script imports nothing but Pillow.

    tim plan CONFIG corpus=CORPUS --ranks 8 --steps 10000 --export plan.jsonl
    python examples/exported_plan.py plan.jsonl --rank 0
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


def read_image(sample: dict[str, Any]) -> Image.Image:
    """Scale the upright image, and cut its centre, as the plan says."""
    with open(sample["tar"], "rb") as tar:
        tar.seek(sample["offset"])
        image = Image.open(io.BytesIO(tar.read(sample["length"]))).convert("RGB")
    (resize_height, resize_width), height, width = sample["resize"], sample["height"], sample["width"]
    image = ImageOps.exif_transpose(image).resize((resize_width, resize_height), Image.Resampling.LANCZOS)
    left, top = (resize_width - width) // 2, (resize_height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if sample["flip"] else image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="what `tim plan --export` wrote")
    parser.add_argument("--rank", type=int, default=0)
    given = parser.parse_args()

    packs = images = 0
    kinds: Counter[str] = Counter()
    with given.plan.open(encoding="utf-8") as lines:
        for pack in map(json.loads, lines):
            if pack["rank"] != given.rank:
                continue
            batch = [read_image(sample) for sample in pack["samples"]]  # a real loop would encode and train them here
            kinds.update(sample["kind"] for sample in pack["samples"])
            packs, images = packs + 1, images + len(batch)
            sizes = ", ".join(f"{image.width}x{image.height}" for image in batch[:4])
            print(f"step {pack['step']} pack {pack['pack']}: {len(batch)} images, {pack['tokens']} tokens: {sizes} …")
    print(f"rank {given.rank}: {images} images in {packs} packs, kinds {dict(sorted(kinds.items()))}")


if __name__ == "__main__":
    main()
