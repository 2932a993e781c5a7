"""Checks before training: frozen models and optimizers exist, and cached features were computed with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from launch.config.run_sections import EvalConfig
from launch.config.schema import Config, ConfigError
from launch.engine.optimizers import check_available
from launch.finetuning.lora import check_peft
from launch.trackers.backends import check_installed
from pipeline.features.manifest import Features


def check_models(config: Config) -> None:
    """Raise ConfigError if a required codec, text encoder, alignment teacher, optimizer or tracker is not available."""
    from tim import codecs
    from tim.text import encoders

    check_installed(config.log.trackers)
    parts = cached_parts(config)
    draws = bool(config.preview.prompts) or config.eval is not None
    try:
        if ("latents" not in parts or draws) and config.codec.kind != "pixel":
            codecs.weights_folder(config.codec.kind, config.codec.path)
    except ValueError as error:
        raise ConfigError(f"codec.path: {error}") from error
    try:
        if ("captions" not in parts or draws) and config.condition == "text":
            encoders.tokenizer(config.text.kind, config.text.path, tokenizer_path=config.text.tokenizer, max_tokens=config.text.max_tokens)
    except ValueError as error:
        raise ConfigError(f"text.path: {error}") from error
    try:
        check_available(config.train.optimizer)
    except ValueError as error:
        raise ConfigError(f"train.optimizer: {error}") from error
    if config.eval is not None:
        _check_evaluations(config.eval)
    if config.train.lora is not None:
        check_peft()
        if config.train.init is None:
            raise ConfigError("train.init: missing; train.lora needs the weights that its adapters are trained on")
    teacher = config.objective.alignment
    if teacher is not None and teacher.path is None and "teacher" not in parts:
        raise ConfigError("objective.alignment.path: missing; give it in the file, or as objective.alignment.path=PATH on the command line")


def _check_evaluations(section: EvalConfig) -> None:
    """Raise ConfigError for metrics and features that `tim eval` does not know: better now than at the first evaluation."""
    from launch.evaluation.scorers import check_names
    from tim.metrics.distances import METRICS
    from tim.metrics.extractors.make import check_form

    with _as_config_error("eval.metrics"):
        check_names(section.metrics)
    for key, texts in {"features": section.features, "clip": () if section.clip is None else (section.clip,)}.items():
        with _as_config_error(f"eval.{key}"):
            for text in texts:
                check_form(text)
    if "clip_score" in section.metrics and section.clip is None:
        raise ConfigError("eval.clip: missing; eval.metrics: clip_score needs a model, such as open_clip=FOLDER")
    has_inception = any(text.startswith("inception=") for text in section.features)
    for name in section.metrics:
        if name in METRICS and METRICS[name].features == "inception" and not has_inception:
            raise ConfigError(f"eval.metrics: {name} needs features of inception: give eval.features: [inception=FILE]")


@contextmanager
def _as_config_error(key: str) -> Iterator[None]:
    """Name a key in place of the option of a command."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{key}: {str(error).removeprefix('--metrics ')}") from error


def check_features(features: Features, config: Config) -> None:
    """Raise ConfigError for features of a codec, text encoder or teacher other than the configured one."""
    from tim import codecs
    from tim.pretrained import weight_files
    from tim.text import encoders

    if features.codec is not None:
        geometry = codecs.geometry(config.codec.kind, config.codec.path, channels=config.codec.channels)._asdict()
        path = config.codec.path
        weights = {} if path is None else {"digest": codecs.digest(path)}
        _expect(features, "codec", actual=features.codec, expected={"kind": config.codec.kind, **weights, **geometry})
    if features.text is not None and config.network.params.cap_feat_dim is not None:
        text = config.text
        weights = {} if text.path is None else {"digest": encoders.digest(text.kind, text.path, tokenizer_path=text.tokenizer)}
        settings = text.model_dump(include={"max_tokens", "precision"})
        expected = {"kind": text.kind, **weights, "width": config.network.params.cap_feat_dim, **settings}
        _expect(features, "text", actual=features.text, expected=expected)
    if (alignment := config.objective.alignment) is not None and features.teacher is not None:
        weights = {} if alignment.path is None else {"digest": weight_files.digest(alignment.path)}
        expected = {"kind": alignment.kind, **weights, "width": config.network.params.z_dim}
        _expect(features, "teacher", actual=features.teacher, expected=expected)


def cached_parts(config: Config) -> set[str]:
    """Model outputs that all corpora provide as cached features."""
    cached = [set(Features.open(entry.features).parts) if entry.features else set() for entry in config.corpus]
    return set.intersection(*cached) if cached else set()


def _expect(features: Features, section: str, *, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if actual.get(key) != value:
            raise ConfigError(
                f"features {features.path} were encoded with {section}.{key} {actual.get(key)}, the config has {value}: encode them again"
            )
