"""The shortest way to make feature shards of a small corpus: any functions as codec and text encoder, one sample after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.corpus.corpus import Corpus
from pipeline.features.manifest import EMPTY
from pipeline.features.tensors import latent_name, pack, text_name
from pipeline.features.writer import FeatureWriter, features_manifest
from pipeline.images import load_image
from pipeline.size_rule import Crop, SizeRule, target_size

Encode = Callable[[Sequence[Any]], Sequence[Tensor]]


def write_features(
    folder: Path,
    corpus: Corpus,
    *,
    rules: Sequence[SizeRule],
    codec: dict[str, Any] | None,
    encode_images: Encode,
    text: dict[str, Any] | None,
    encode_texts: Encode,
    dtype: torch.dtype = torch.float32,
    flipped: bool = False,
    zstd: bool = False,
) -> Path:
    """Encode all samples of a corpus whose images lie in its own folder."""
    folder.mkdir()
    shards = []
    for number, shard in enumerate(corpus.shards):
        pictures = Path(shard.path).read_bytes()
        samples = corpus.read(number, columns=("key", "height", "width", "captions", "image_offset", "image_length")).to_pylist()
        tar, table = folder / f"{number:06d}.tar", folder / f"{number:06d}.parquet"
        with open(tar, "wb") as stream:
            writer = FeatureWriter(stream, zstd=zstd)
            for sample in samples:
                data = pictures[sample["image_offset"] : sample["image_offset"] + sample["image_length"]]
                tensors: dict[str, Tensor] = {}
                crops: list[Crop] = []
                for rule in rules if codec is not None else ():
                    target = target_size(sample["height"], width=sample["width"], rule=rule)
                    crops.append((*target.resize, target.height, target.width))
                    for flip in (False, True)[: 1 + flipped]:
                        pixels = load_image(data, resize=target.resize, crop=(target.height, target.width), flip=flip)
                        [latent] = encode_images([torch.from_numpy(pixels.transpose(2, 0, 1).copy())])
                        tensors[latent_name(crops[-1], flipped=flip)] = latent
                captions = sample["captions"] if text is not None else []
                tensors |= {text_name(i): features for i, features in enumerate(encode_texts(captions) if captions else ())}
                stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
                writer.add(sample["key"], stored, crops=crops, captions=len(captions))
            table.write_bytes(writer.finish([sample["key"] for sample in samples]))
        digests = {"sha256": _digest(tar), "table_sha256": _digest(table), "of": shard.digest}
        shards.append({"name": tar.name, "bytes": tar.stat().st_size, "table": table.name, **digests})
    if text is not None:
        (folder / EMPTY).write_bytes(pack({text_name(0): encode_texts([""])[0].to(dtype)}))
    how = features_manifest(codec=codec, text=text, teacher=None, dtype=str(dtype), zstd=zstd, flipped=flipped, rules=rules)
    (folder / "manifest.json").write_text(json.dumps({**how, "shards": shards}))
    return folder


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
