"""`tim encode` as a person types it: its settings, from a training config if one is named, and its processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataprep.features.encode import EncodeConfig, Encoded, encode, read_encoded
from launch.config import yaml_file
from launch.config.load import load_config
from launch.config.schema import Config
from launch.console import Console
from launch.distributed.torchrun import LAUNCHER, cores, die_with_launcher, run_in_processes
from pipeline.corpus.corpus import Corpus
from pipeline.planning.config import SizeLimits


def settings(like: str | None, *, overrides: Sequence[str]) -> EncodeConfig:
    """What is to be encoded: what a run of the training config `like` would need, and values that replace some of it.

    Raises ConfigError, in one line.
    """
    written = yaml_file.read(None, overrides=overrides)
    if like is not None:
        written.values = _laid_over(needs(load_config(like)), written.values)
    return yaml_file.check(written, EncodeConfig)


def needs(config: Config) -> dict[str, Any]:
    """What the features for a training run have to be: settings of `EncodeConfig`."""
    plan, words, alignment = config.plan, config.text, config.objective.alignment
    found: dict[str, Any] = {
        "codec": {"kind": config.codec.kind, "path": config.codec.path},
        "patch_size": config.network.params.patch_size,
        "max_tokens": sorted({plan.max_tokens, *(stage.max_tokens for stage in plan.schedule if stage.max_tokens is not None)}),
        **plan.model_dump(include=set(SizeLimits.model_fields)),
        "flip": plan.flip > 0,
    }
    if config.condition == "text":
        width = config.network.params.cap_feat_dim
        found["text"] = {**words.model_dump(include={"kind", "path", "tokenizer", "max_tokens", "precision"}), "width": width}
    if alignment is not None and alignment.path is not None:
        found["teacher"] = {"kind": alignment.kind, "path": str(alignment.path), "precision": config.train.precision}
    return found


def shorthand(section: str, typed: str | None) -> list[str]:
    """`--codec KIND=PATH` as overrides."""
    if typed is None:
        return []
    kind, equals, path = typed.partition("=")
    return [f"{section}.kind={kind}", *([f"{section}.path={path}"] if equals else [])]


def run(
    corpus: str,
    *,
    out: Path,
    settings: EncodeConfig,
    like: str | None,
    overrides: Sequence[str],
    processes: int | None,
    debug: bool,
    console: Console,
) -> Encoded | None:
    """Encode in this process, or start several; None in all but the one that has something to say.

    Processes that accelerate or torchrun started (they have a LOCAL_RANK) share the work as they are.
    """
    if "LOCAL_RANK" in os.environ:
        die_with_launcher()
    else:
        shards = len(Corpus.open(corpus).shards)
        processes = min(processes or _devices() or cores(), max(1, shards))
        if processes > 1:
            options = [*(["--for", like] if like is not None else []), *(["--debug"] if debug else [])]
            code = run_in_processes(["encode", corpus, *overrides, "--out", str(out), *options], processes=processes)
            if code:
                console.failure(f"encoding ended with exit code {code}: the lines above say why; the same command continues it", code=code)
                raise SystemExit(code)
            return read_encoded(out)
    with console.progress() as report:
        done = encode(corpus, out=out, config=settings, progress=report, announce=console.line)
    return None if LAUNCHER in os.environ else done


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above`, and what it does not say of `below`; sections likewise."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _laid_over(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return merged
