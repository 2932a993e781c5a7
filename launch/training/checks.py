"""Check, before training, that a run's frozen models exist and that cached features were made by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.config.schema import Config, ConfigError
from pipeline.features.manifest import Features


def check_models(config: Config) -> None:
    """Raises ConfigError if a frozen model that has to be run cannot be: codec, text encoder or alignment teacher."""
    from tim import codecs
    from tim.text import encoders

    parts = _cached_parts(config)
    try:
        if "latents" not in parts and config.codec.kind != "pixel":
            codecs.weights_folder(config.codec.kind, config.codec.path)
    except ValueError as error:
        raise ConfigError(f"codec.path: {error}") from error
    try:
        if "captions" not in parts and config.condition == "text":
            encoders.tokenizer(config.text.kind, config.text.path, tokenizer_path=config.text.tokenizer, max_tokens=config.text.max_tokens)
    except ValueError as error:
        raise ConfigError(f"text.path: {error}") from error
    alignment = config.objective.alignment
    if alignment is not None and alignment.path is None and "teacher" not in parts:
        raise ConfigError("objective.alignment.path: missing; give it in the file, or as objective.alignment.path=PATH on the command line")


def check_features(features: Features, config: Config) -> None:
    """Refuse features of another codec, text encoder or teacher than the config's."""
    from tim import codecs
    from tim.pretrained import weight_files
    from tim.text import encoders

    if features.codec is not None:
        geometry = codecs.geometry(config.codec.kind, config.codec.path)._asdict()
        path = config.codec.path
        weights = {} if path is None else {"digest": codecs.digest(path)}
        _expect(features, "codec", found=features.codec, wanted={"kind": config.codec.kind, **weights, **geometry})
    if features.text is not None and config.network.params.cap_feat_dim is not None:
        words = config.text
        weights = {} if words.path is None else {"digest": encoders.digest(words.kind, words.path, tokenizer_path=words.tokenizer)}
        settings = words.model_dump(include={"max_tokens", "precision"})
        wanted = {"kind": words.kind, **weights, "width": config.network.params.cap_feat_dim, **settings}
        _expect(features, "text", found=features.text, wanted=wanted)
    if (alignment := config.objective.alignment) is not None and features.teacher is not None:
        weights = {} if alignment.path is None else {"digest": weight_files.digest(alignment.path)}
        wanted = {"kind": alignment.kind, **weights, "width": config.network.params.z_dim}
        _expect(features, "teacher", found=features.teacher, wanted=wanted)


def _cached_parts(config: Config) -> set[str]:
    """What is read from features in all corpora."""
    read = [set(Features.open(entry.features).parts) if entry.features else set() for entry in config.corpus]
    return set.intersection(*read) if read else set()


def _expect(features: Features, section: str, *, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ConfigError(
                f"features {features.path} are of {section}.{key} {found.get(key)}, the config says {value}: encode with that"
            )
