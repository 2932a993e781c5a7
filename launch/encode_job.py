"""Settings and processes of `tim encode`."""

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
    """Encoding settings: those required by the training config `like`, with overrides.

    Raises ConfigError.
    """
    raw = yaml_file.read(None, overrides=overrides)
    if like is not None:
        raw.values = merge(required_settings(load_config(like)), raw.values)
    return yaml_file.check(raw, EncodeConfig)


def required_settings(config: Config) -> dict[str, Any]:
    """Settings of `EncodeConfig` that a training run requires of its features."""
    plan, text, alignment = config.plan, config.text, config.objective.alignment
    settings: dict[str, Any] = {
        "codec": config.codec.model_dump(),
        "patch_size": config.network.params.patch_size,
        "max_tokens": sorted({plan.max_tokens, *(stage.max_tokens for stage in plan.schedule if stage.max_tokens is not None)}),
        **plan.model_dump(include=set(SizeLimits.model_fields)),
        "flip": plan.flip > 0,
    }
    if config.condition == "text":
        width = config.network.params.cap_feat_dim
        settings["text"] = {**text.model_dump(include={"kind", "path", "tokenizer", "max_tokens", "precision"}), "width": width}
    if alignment is not None and alignment.path is not None:
        settings["teacher"] = {"kind": alignment.kind, "path": str(alignment.path), "precision": config.train.precision}
    return settings


def shorthand(section: str, typed: str | None) -> list[str]:
    """Overrides for an option such as `--codec KIND=PATH`."""
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
    """Encode in this process, or start several. Returns None in workers.

    Processes started by accelerate or torchrun (with LOCAL_RANK set) share the work.
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
                console.failure(f"encoding ended with exit code {code}: see the lines above; the same command continues", code=code)
                raise SystemExit(code)
            return read_encoded(out)
    with console.progress() as report:
        done = encode(corpus, out=out, config=settings, progress=report, announce=console.line)
    return None if LAUNCHER in os.environ else done


def _devices() -> int:
    import torch

    return torch.cuda.device_count()


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings recursively; values of `override` win."""
    merged = dict(base)
    for key, value in override.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return merged
