"""Feature shards: cached outputs of a codec and a text encoder (docs/formats.md), read in place of images and captions.

A folder has, for each shard of the corpus, a tar and a table of the same number. `KEY.features.safetensors` in the tar has the latents of
a sample, one per encoded size, the features of all its captions, and an alignment teacher's tokens. The manifest records the codec, text
encoder, teacher, sizes and source tables, so that a plan can check beforehand that everything it needs is there:

    format, kind: "features"
    codec: {kind, factor, channels, draws, digest}        null: no latents; digest of the weights, null if there are none
    text: {kind, width, max_tokens, precision, digest}    null: no captions
    teacher: {kind, width, digest}                        null: no teacher tokens
    dtype, zstd: whether members are compressed           flipped: whether there are mirrored latents
    sizes: [{stride, max_tokens, max_pixels, min_tokens, max_aspect, fit}]        the size rules that were encoded
    empty: file of the empty caption's features, one tensor `text.0`
    live_view: {matrix, offset} of a linear map from a latent's cell to colours from 0 to 1; null: none was fitted
    totals: {samples, captions, bytes}                    rejected: {reason: samples that could not be encoded}
    shards: [{name, bytes, sha256, table, table_sha256, of}]                      `of` is the sha256 of the corpus's table

Tables have the columns key, offset and length (of the safetensors), heights and widths (lists, in pixels, of the encoded sizes),
resize_heights and resize_widths (the size before the centre crop), captions (their number), and reason: why a sample could not be encoded
("": it could). Such a sample has no member in the tar; it is skipped in a batch like an unreadable image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cost import Ints
from pipeline.errors import one_line
from pipeline.size_rule import SizeRule

FORMAT = 1
KIND = "features"
EMPTY = "empty.safetensors"
TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("heights", pa.list_(pa.int32())),
        ("widths", pa.list_(pa.int32())),
        ("resize_heights", pa.list_(pa.int32())),
        ("resize_widths", pa.list_(pa.int32())),
        ("captions", pa.int32()),
        ("reason", pa.string()),
    ]
)
_SIZE_COLUMNS = ("resize_heights", "resize_widths", "heights", "widths")


@dataclass(frozen=True, slots=True)
class FeatureShard:
    """One tar of features with its bytes and sha256; `of` is the digest of the corpus's table that it was encoded from."""

    tar: str
    bytes: int
    sha256: str
    table: str
    of: str


class Features:
    """A folder of features. Make one with `Features.open`.

    `codec`, `text` and `teacher` are their manifest entries, None if the folder lacks their features; `empty` is the path of the empty
    caption's features, None without captions; `live_view` a linear map from latents to colours, None if none was fitted.
    """

    def __init__(self, *, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.codec: dict[str, Any] | None = manifest["codec"] and dict(manifest["codec"])
        self.text: dict[str, Any] | None = manifest["text"] and dict(manifest["text"])
        self.teacher: dict[str, Any] | None = manifest["teacher"] and dict(manifest["teacher"])
        self.live_view: dict[str, Any] | None = manifest.get("live_view")
        self.empty = None if self.text is None else str(path / _file_name(manifest["empty"]))
        self.shards = tuple(
            FeatureShard(
                tar=str(path / _file_name(shard["name"])),
                bytes=shard["bytes"],
                sha256=shard["sha256"],
                table=_file_name(shard["table"]),
                of=shard["of"],
            )
            for shard in manifest["shards"]
        )
        self._flipped = bool(manifest["flipped"])
        self._rules = [SizeRule(**rule) for rule in manifest["sizes"]]

    @classmethod
    def open(cls, path: str | Path) -> Features:
        """Open the folder `path`. Raises ValueError, in one line, if it has no features or an unknown format."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            version, kind = manifest["format"], manifest["kind"]
            if kind != KIND or version != FORMAT:
                raise ValueError(
                    f"features {folder}: manifest.json has kind {kind!r}, format {version!r}; this version reads format {FORMAT}"
                )
            return cls(path=folder, manifest=manifest)
        except OSError as error:
            raise ValueError(f"features {folder}: there is no manifest.json; give a folder written by `tim encode`") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"features {folder}: manifest.json is damaged ({error}): encode the corpus again") from error

    def check(self, *, of: Sequence[str], corpus: str, rules: Sequence[SizeRule], flips: bool) -> None:
        """Check from the manifest that these features fit a plan.

        Args:
            of: digests of the tables of the corpus's shards.
            corpus: its name.
            rules: every size rule of the plan.
            flips: whether the plan mirrors images.

        Raises ValueError naming the missing size, mirrored latents or shard.
        """
        for rule in rules if self._has_sizes else ():
            if not any(_covers(encoded, rule) for encoded in self._rules):
                encoded = "; ".join(_format_rule(rule) for rule in self._rules) or "none"
                raise ValueError(
                    f"features {self.path} were encoded at other sizes ({encoded}) than the plan's ({_format_rule(rule)}): encode these"
                )
        if flips and self._has_sizes and not self._flipped:
            raise ValueError(f"features {self.path} have no mirrored latents, which plan.flip needs: set plan.flip=0 or encode them")
        if len(self.shards) < len(of):
            raise ValueError(f"features {self.path} have {len(self.shards)} shards, corpus {corpus} has {len(of)}: encode the rest")
        for number, (shard, digest) in enumerate(zip(self.shards, of, strict=False)):
            if shard.of != digest:
                raise ValueError(
                    f"features {self.path}: shard {number} was encoded from another version of corpus {corpus}: encode it again"
                )

    def join(self, shard: int, *, keys: Sequence[str], crops: Ints, captions: Ints) -> Ints:
        """Offset and length of samples' features in `shards[shard].tar`: (n, 2).

        Args:
            shard: its position.
            keys: n keys of the corpus's shard.
            crops: (n, 4), `Targets.crops`: resized size and crop of each.
            captions: (n,) number of captions of each.

        Raises ValueError naming a key without features, size or caption, or an unreadable table.
        """
        table = self._read(shard)
        rows = {key: row for row, key in enumerate(table.column("key").to_pylist())}
        for key in keys:
            if key not in rows:
                raise ValueError(f"features {self.path}: {self.shards[shard].table} has no sample {key}: encode the corpus again")
        selected = table.take(pa.array([rows[key] for key in keys], type=pa.int64()))
        if self._has_sizes:
            encoded = zip(*(selected.column(name).to_pylist() for name in _SIZE_COLUMNS), strict=True)
            for key, crop, sizes in zip(keys, crops.tolist(), encoded, strict=True):
                if tuple(crop) not in zip(*sizes, strict=True):
                    size = f"{crop[3]}x{crop[2]} pixels, cut out of {crop[1]}x{crop[0]}"
                    raise ValueError(f"features {self.path}: sample {key} has no latent of {size}: encode it at the plan's sizes")
        if self.text is not None:
            encoded = selected.column("captions").to_numpy()
            short = np.flatnonzero(encoded < captions)
            if len(short):
                key, number = keys[short[0]], encoded[short[0]]
                raise ValueError(f"features {self.path}: sample {key} lacks caption {number}: encode the corpus again")
        return np.stack([selected.column(name).to_numpy() for name in ("offset", "length")], axis=1).astype(np.int64).reshape(-1, 2)

    @property
    def parts(self) -> tuple[str, ...]:
        """The available ones of latents, captions and teacher."""
        return tuple(
            name for name, entry in (("latents", self.codec), ("captions", self.text), ("teacher", self.teacher)) if entry is not None
        )

    @property
    def _has_sizes(self) -> bool:
        return self.codec is not None or self.teacher is not None

    def _read(self, shard: int) -> pa.Table:
        path = self.path / self.shards[shard].table
        try:
            return pq.ParquetFile(path).read(use_threads=False).select(TABLE.names)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"features {self.path}: {path.name} cannot be read ({one_line(error)}): encode again") from error


def _covers(encoded: SizeRule, planned: SizeRule) -> bool:
    """Whether every image that `planned` keeps was encoded at the same size."""
    limits = {"min_tokens": planned.min_tokens, "max_aspect": planned.max_aspect}
    return replace(encoded, **limits) == planned and encoded.min_tokens <= planned.min_tokens and encoded.max_aspect >= planned.max_aspect


def _format_rule(rule: SizeRule) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(rule).items())


def _file_name(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"features: manifest.json names {name!r}, which is outside the folder: do not use them")
    return name
