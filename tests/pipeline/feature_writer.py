"""The shortest writer of feature shards: what `pipeline.features` says of the format, and nothing of how it is made fast."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from pipeline.features import EXTENSION, FORMAT, KIND, TABLE, latent_name, size_entry, text_name
from pipeline.images import load_image
from pipeline.index import Corpus
from pipeline.resolution import SizeRule, target_size

Encode = Callable[[Sequence[Any]], Sequence[Tensor]]


def write_features(
    folder: Path,
    corpus: Corpus,
    *,
    rules: Sequence[SizeRule],
    codec: dict[str, Any],
    encode_images: Encode,
    text: dict[str, Any] | None,
    encode_texts: Encode,
    dtype: torch.dtype = torch.float32,
    flipped: bool = False,
) -> Path:
    """Encode all samples of a corpus whose pictures lie in its own folder."""
    folder.mkdir()
    shards = []
    for number, shard in enumerate(corpus.shards):
        rows = []
        with tarfile.open(folder / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            pictures = Path(shard.path).read_bytes()
            for sample in corpus.read(number, columns=("key", "height", "width", "captions", "image_offset", "image_length")).to_pylist():
                data = pictures[sample["image_offset"] : sample["image_offset"] + sample["image_length"]]
                tensors, sizes = {}, []
                for rule in rules:
                    target = target_size(sample["height"], width=sample["width"], rule=rule)
                    height, width = target.height, target.width
                    sizes.append((height, width))
                    for flip in (False, True)[: 1 + flipped]:
                        pixels = load_image(data, resize=target.resize, crop=(height, width), flip=flip)
                        [latent] = encode_images([torch.from_numpy(pixels.transpose(2, 0, 1).copy())])
                        tensors[latent_name(height, width, flipped=flip)] = latent
                if text is not None:
                    tensors |= {text_name(i): features for i, features in enumerate(encode_texts(sample["captions"]))}
                payload = save({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()})
                info = tarfile.TarInfo(f"{sample['key']}.{EXTENSION}")
                info.size = len(payload)
                offset = tar.offset + 512
                tar.addfile(info, io.BytesIO(payload))
                heights, widths = zip(*sizes, strict=True)
                rows.append((sample["key"], offset, len(payload), heights, widths, len(sample["captions"]) if text is not None else 0))
        table = folder / f"{number:06d}.parquet"
        columns = [pa.array(values, type=field.type) for values, field in zip(zip(*rows, strict=True), TABLE, strict=True)]
        pq.write_table(pa.table(columns, schema=TABLE), table)
        name = f"{number:06d}.tar"
        digests = {"sha256": _digest(folder / name), "table_sha256": _digest(table), "of": shard.digest}
        shards.append({"name": name, "bytes": (folder / name).stat().st_size, "table": table.name, **digests})
    if text is not None:
        save_file({text_name(0): encode_texts([""])[0].to(dtype)}, folder / "empty.safetensors")
    facts = {"codec": codec, "text": text, "flipped": flipped, "sizes": [size_entry(rule) for rule in rules], "empty": "empty.safetensors"}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "kind": KIND, **facts, "shards": shards}))
    return folder


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
