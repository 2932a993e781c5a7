"""A model that can be sampled, from what people have: a model folder, a run, an official export, or a published file and a recipe's name.

The codec, the text encoder and its tokenizer may be replaced: their paths are those of the machine that trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints.export import PUBLISHED_GUIDANCE, model_folder, spec_of
from launch.checkpoints.initial_weights import ROPE_OF_PUBLISHED, InitialWeights, load_weights, read_network_file
from launch.config.load import load_config
from tim import Generator, TransitionTransformer, codecs, transports
from tim.model_folder.folder import ModelSpec, load_model
from tim.pretrained.official import NETWORK_FILE, OURS, network_description
from tim.text import encoders

REMEDY = "--codec, --text and --tokenizer say where these models are"


@dataclass(frozen=True, slots=True)
class Replacements:
    """What was typed for a model's codec, text encoder and tokenizer: KIND=PATH, KIND, or a PATH alone; None: the model's own."""

    codec: str | None = None
    text: str | None = None
    tokenizer: str | None = None


OWN = Replacements()  # nothing was typed


def open_model(
    path: Path, *, recipe: str | None, replacements: Replacements, say: Callable[[str], None]
) -> tuple[TransitionTransformer, ModelSpec]:
    """Network and description of the model that `path` means; its codec and text encoder are loaded by `generator_of`.

    `say` is told what was chosen. Raises ValueError where there is no model, and where `recipe` is missing or not wanted.
    """
    if path.is_dir() and any((path / name).is_file() for name in ("config.json", "config.yaml")):
        if recipe is not None:
            raise ValueError(f"--recipe {recipe}: {path} says itself what its network is; leave it out")
        network, spec = load_model(model_folder(path, say=say))
        return network, replaced(spec, replacements)
    found = load_weights(path)
    spec = _spec_of_recipe(recipe, found=found) if recipe is not None else _spec_of_export(found, path=path, say=say)
    spec = replaced(spec, replacements)
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
    network.load_official(found.state)
    say(f"{found.source}: rotary layout {spec.rope}")
    return network, spec


def generator_of(network: TransitionTransformer, spec: ModelSpec, *, device: torch.device) -> Generator:
    """The model, ready to sample. Raises ValueError where its codec or text encoder cannot be had, with the options that name others."""
    network = network.to(device).eval().requires_grad_(False)
    try:
        return Generator(network, spec, device=device)
    except ValueError as error:
        raise ValueError(f"{error} ({REMEDY})") from error


def replaced(spec: ModelSpec, replacements: Replacements) -> ModelSpec:
    """The description with the codec, text encoder and tokenizer that were typed. Raises ValueError for one that this model has not."""
    codec, words = dict(spec.codec), None if spec.text is None else dict(spec.text)
    if replacements.codec is not None:
        codec = _chosen(replacements.codec, option="--codec", kinds=codecs.CODECS, kind=codec["kind"])
    if words is None and (typed := replacements.text or replacements.tokenizer) is not None:
        raise ValueError(f"{'--text' if replacements.text else '--tokenizer'} {typed}: a model of classes reads no text")
    if words is not None and replacements.text is not None:
        chosen = _chosen(replacements.text, option="--text", kinds=encoders.TEXT_ENCODERS, kind=words["kind"])
        kept = {name: value for name, value in words.items() if name in ("max_tokens", "precision")}
        words = {**kept, **chosen}
    if words is not None and replacements.tokenizer is not None:
        words["tokenizer"] = replacements.tokenizer
    if codec["kind"] is None:
        raise ValueError(
            f"the weights do not say which codec made their {spec.network.get('in_channels')} channels: give --codec KIND=PATH"
        )
    if words is not None and words["kind"] is None:
        raise ValueError("the weights do not say which text encoder they were trained with: give --text KIND=PATH")
    return replace(spec, codec=codec, text=words)


def _chosen(typed: str, *, option: str, kinds: tuple[str, ...], kind: str | None) -> dict[str, Any]:
    """KIND=PATH, KIND, or the PATH of the model's own kind."""
    named, equals, path = typed.partition("=")
    if named in kinds:
        return {"kind": named, **({"path": path} if equals else {})}
    if kind in (None, "pixel", "lookup"):
        raise ValueError(f"{option} {typed}: say of which kind it is, {option} KIND={typed}, with one of {', '.join(kinds)}")
    return {"kind": kind, "path": typed}


def _spec_of_recipe(recipe: str, *, found: InitialWeights) -> ModelSpec:
    """The description in a recipe, with the network of an official export if that is where the weights are."""
    config = load_config(recipe)
    rope = config.network.rope if "rope" in config.network.model_fields_set else ROPE_OF_PUBLISHED
    spec = replace(spec_of(config), rope=found.rope or rope)
    return spec if found.params is None else replace(spec, network=found.params)


def _spec_of_export(found: InitialWeights, *, path: Path, say: Callable[[str], None]) -> ModelSpec:
    """The description of an official export; what it leaves out is as published."""
    if found.params is None or found.rope is None:
        raise ValueError(f"{path}: its weights do not say of which network they are: give --recipe NAME, for example --recipe t2i-xl-1")
    content = read_network_file(path)
    params, transport = network_description(content)
    ours = content.get(OURS)
    if isinstance(ours, Mapping) and {"codec", "text", "sampling"} <= set(ours):
        return ModelSpec(params, found.rope, transport, dict(ours["codec"]), ours["text"] and dict(ours["text"]), dict(ours["sampling"]))
    is_pixel, is_text = params.get("in_channels") == codecs.GEOMETRIES["pixel"].channels, params.get("cap_feat_dim") is not None
    if is_pixel and is_text:
        say(f"{path / NETWORK_FILE} names no codec and text encoder: pixel and lookup are taken; --codec and --text name others")
    shift = 1024 if is_text and transports.TRANSPORTS[transport["kind"]].shifts else None
    return ModelSpec(
        network=params,
        rope=found.rope,
        transport=transport,
        codec={"kind": "pixel" if is_pixel else None},
        text={"kind": "lookup" if is_pixel else None, "max_tokens": 77 if is_pixel else 256} if is_text else None,
        sampling={"steps": 8, "guidance": PUBLISHED_GUIDANCE, "interval": [0.0, 1.0], "shift": shift, "instantaneous": False},
    )
