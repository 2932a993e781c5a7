"""Feature shards: what a codec and a text encoder made of a corpus (DESIGN §4), read in place of its pictures and captions.

A folder holds, for each shard of the corpus, a tar and a table of the same number; `KEY.features.safetensors` in the tar has the latents
of a sample, one for each size it was encoded at, and the features of all its captions. The manifest says by which codec, which text
encoder, at which sizes, and from which tables of the corpus, so that a plan knows beforehand whether it will find what it needs:

    format, kind: "features"
    codec: {kind, factor, channels}    text: {kind, width, max_tokens}, or null without captions    flipped: are there mirrored latents?
    sizes: [{stride, max_tokens, max_pixels, min_tokens, max_aspect, fit}]        the size rules that were encoded
    empty: file of the empty caption's features, one tensor `text.0`
    shards: [{name, bytes, sha256, table, table_sha256, of}]                      `of` is the sha256 of the corpus's table

Tables have the columns key, offset and length (of the safetensors), heights and widths (lists, in pixels, of the sizes that are there) and
captions (their number).
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
from pipeline.resolution import SizeRule

FORMAT = 1
KIND = "features"
EXTENSION = "features.safetensors"
TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("heights", pa.list_(pa.int32())),
        ("widths", pa.list_(pa.int32())),
        ("captions", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class FeatureShard:
    """One tar of features with its bytes and sha256; `of` is the digest of the corpus's table that it was made from."""

    tar: str
    bytes: int
    sha256: str
    table: str
    of: str


class Features:
    """A folder of features. Make one with `Features.open`.

    `codec` and `text` are what the manifest says of them; `empty` is the path of the empty caption's features, None without captions.
    """

    def __init__(self, *, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.codec: dict[str, Any] = dict(manifest["codec"])
        self.text: dict[str, Any] | None = manifest["text"] and dict(manifest["text"])
        self.empty = None if self.text is None else str(path / _plain(manifest["empty"]))
        self.shards = tuple(
            FeatureShard(
                tar=str(path / _plain(shard["name"])),
                bytes=shard["bytes"],
                sha256=shard["sha256"],
                table=_plain(shard["table"]),
                of=shard["of"],
            )
            for shard in manifest["shards"]
        )
        self._flipped = bool(manifest["flipped"])
        self._rules = [SizeRule(**rule) for rule in manifest["sizes"]]

    @classmethod
    def open(cls, path: str | Path) -> Features:
        """Open the folder `path`. Raises ValueError, in one line, if it holds no features or those of an unknown format."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            found, kind = manifest["format"], manifest["kind"]
            if kind != KIND or found != FORMAT:
                raise ValueError(
                    f"features {folder}: manifest.json is of kind {kind!r}, format {found!r}; this version reads features of {FORMAT}"
                )
            return cls(path=folder, manifest=manifest)
        except OSError as error:
            raise ValueError(f"features {folder}: there is no manifest.json; give a folder that `tim encode` wrote") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"features {folder}: manifest.json is damaged ({error}): encode the corpus again") from error

    def check(self, *, of: Sequence[str], corpus: str, rules: Sequence[SizeRule], flips: bool) -> None:
        """Refuse a plan that these features are not for, from the manifests alone.

        Args:
            of: digests of the tables of the corpus's shards.
            corpus: its name.
            rules: every size rule of the plan.
            flips: whether it mirrors images.

        Raises ValueError naming the size, the mirrored latents or the shard that is not there.
        """
        for rule in rules:
            if not any(_covers(encoded, rule) for encoded in self._rules):
                encoded = "; ".join(_in_words(rule) for rule in self._rules) or "none"
                raise ValueError(
                    f"features {self.path} were encoded at other sizes ({encoded}) than the plan's ({_in_words(rule)}): encode them, too"
                )
        if flips and not self._flipped:
            raise ValueError(f"features {self.path} have no mirrored latents, which plan.flip needs: set plan.flip=0 or encode them")
        if len(self.shards) < len(of):
            raise ValueError(f"features {self.path} have {len(self.shards)} shards, corpus {corpus} has {len(of)}: encode the rest")
        for number, (shard, digest) in enumerate(zip(self.shards, of, strict=False)):
            if shard.of != digest:
                raise ValueError(f"features {self.path}: shard {number} is of another digest than that of corpus {corpus}: encode it again")

    def join(self, shard: int, *, keys: Sequence[str], heights: Ints, widths: Ints, captions: Ints) -> Ints:
        """Where the features of samples lie in `shards[shard].tar`: (n, 2), offset and length.

        Args:
            shard: its position.
            keys: n keys of the corpus's shard.
            heights, widths: (n,) target sizes in pixels.
            captions: (n,) how many captions each has.

        Raises ValueError naming the key whose features, size or caption is not there, or the table that cannot be read.
        """
        table = self._read(shard)
        rows = {key: row for row, key in enumerate(table.column("key").to_pylist())}
        for key in keys:
            if key not in rows:
                raise ValueError(f"features {self.path}: {self.shards[shard].table} has no sample {key}: encode the corpus again")
        found = table.take(pa.array([rows[key] for key in keys], type=pa.int64()))
        sizes = _lists(found, "heights"), _lists(found, "widths")
        for number, (key, height, width) in enumerate(zip(keys, heights.tolist(), widths.tolist(), strict=True)):
            if (height, width) not in zip(sizes[0][number], sizes[1][number], strict=True):
                raise ValueError(
                    f"features {self.path}: sample {key} has no latent of {width}x{height} pixels: encode it at the plan's sizes"
                )
        if self.text is not None:
            encoded = found.column("captions").to_numpy()
            short = np.flatnonzero(encoded < captions)
            if len(short):
                key, number = keys[short[0]], encoded[short[0]]
                raise ValueError(f"features {self.path}: sample {key} lacks caption {number}: encode the corpus again")
        return np.stack([found.column(name).to_numpy() for name in ("offset", "length")], axis=1).astype(np.int64).reshape(-1, 2)

    def _read(self, shard: int) -> pa.Table:
        path = self.path / self.shards[shard].table
        try:
            return pq.ParquetFile(path).read(use_threads=False).select(TABLE.names)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ValueError(
                f"features {self.path}: {path.name} cannot be read ({' '.join(str(error).split())[:200]}): encode again"
            ) from error


def latent_name(height: int, width: int, *, flipped: bool = False, deviation: bool = False) -> str:
    """The tensor of an image of `height` × `width` pixels: (C, h/factor, w/factor). With `deviation`, of what the codec samples with."""
    return f"latent{'_std' if deviation else ''}.{height}x{width}{'.flipped' if flipped else ''}"


def text_name(caption: int) -> str:
    """The tensor of a caption's features: (M, F)."""
    return f"text.{caption}"


def size_entry(rule: SizeRule) -> dict[str, Any]:
    """A size rule as the manifest has it."""
    return asdict(rule)


def _covers(encoded: SizeRule, planned: SizeRule) -> bool:
    """Whether all that `planned` keeps was encoded, at the same size."""
    limits = {"min_tokens": planned.min_tokens, "max_aspect": planned.max_aspect}
    return replace(encoded, **limits) == planned and encoded.min_tokens <= planned.min_tokens and encoded.max_aspect >= planned.max_aspect


def _in_words(rule: SizeRule) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(rule).items())


def _lists(table: pa.Table, column: str) -> list[list[int]]:
    return table.column(column).to_pylist()


def _plain(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"features: manifest.json names {name!r}, which leads out of the folder: do not use them")
    return name
