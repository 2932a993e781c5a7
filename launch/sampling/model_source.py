"""Load a model for sampling from a model folder, a run, an official export, or a published weight file and a recipe.

Paths of codec, text encoder and tokenizer can be replaced, because the stored ones are those of the training machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from launch.model_place import locate_model
from launch.sampling.loras import Lora, merge_loras, parse_loras
from launch.sampling.typed_options import TypedModel
from pipeline.digests import file_digest, json_digest
from tim import Generator, TransitionTransformer, codecs, transports
from tim.codecs.load import PARTS as CODEC_PARTS
from tim.disk_cache import DiskCache
from tim.model_folder.folder import ModelSpec, description_file, load_model
from tim.model_kinds import Dtype
from tim.pretrained import weight_files
from tim.pretrained.official import NETWORK_FILE, OURS, network_description
from tim.sampling.sources import choose_device
from tim.text import encoders, tokenizers

if TYPE_CHECKING:
    from accelerate import PartialState

    from launch.checkpoints.initial_weights import InitialWeights

Say: TypeAlias = Callable[[str], None]
REMEDY = "give the paths of these models with --codec, --text and --tokenizer"


@dataclass(frozen=True, slots=True)
class Replacements:
    """Options that replace a model's codec, text encoder and tokenizer: KIND=PATH, KIND, or PATH; None: keep the model's."""

    codec: str | None = None
    text: str | None = None
    tokenizer: str | None = None


NO_REPLACEMENTS = Replacements()


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model and how it is run.

    path: as typed, what `launch.model_place.locate_model` takes; of a run, its `model/` or its newest checkpoint is used; a
    weight file is of the network in `recipe`. replacements: other paths of its codec, text encoder and tokenizer; loras: merged into its
    weights. device_reason: how the device was chosen.
    """

    path: str | Path
    recipe: str | None = None
    replacements: Replacements = NO_REPLACEMENTS
    loras: Sequence[Lora] = ()
    device: str | None = None
    dtype: Dtype | None = None
    memory_gb: float | None = None
    device_reason: str = "--device"

    @classmethod
    def typed(cls, path: str, typed: TypedModel) -> ModelOptions:
        """Of the command line. Raises ValueError if the scale of a LoRA is not a number."""
        replacements = Replacements(codec=typed.codec, text=typed.text, tokenizer=typed.tokenizer)
        return cls(path, typed.recipe, replacements, parse_loras(typed.lora or []), typed.device, typed.dtype, typed.memory_gb)


class OpenedModel(NamedTuple):
    """A loaded model.

    digest: sha256 of its description, with the digests of its weights, or of its weight file, and of what replaces its parts.
    """

    network: TransitionTransformer
    spec: ModelSpec
    digest: str


def open_generator(model: ModelOptions, *, state: PartialState | None, log: Say) -> tuple[Generator, str]:
    """The generator of this process, and the model's digest. state: the processes that share the work; a run's checkpoint is exported by
    the main one, before the others look for it.

    Raises ValueError as `open_model` and `make_generator`, and for an unknown device.
    """
    with nullcontext() if state is None else state.main_process_first():
        opened = open_model(model.path, recipe=model.recipe, replacements=model.replacements, loras=model.loras, log=log)
    if model.device is not None:
        device, why = choose_device(model.device, option="--device"), model.device_reason
    else:
        device = choose_device(None if state is None else state.device)
        why = f"{'a' if device.type == 'cuda' else 'no'} CUDA device is available"
    log(f"device: {device.type} ({why})")
    generator = make_generator(opened.network, opened.spec, device=device, dtype=model.dtype, memory_gb=model.memory_gb)
    log(f"precision: {generator.dtype} ({'the default of this device' if model.dtype is None else '--dtype'})")
    return generator, opened.digest


def say_nothing(line: str) -> None:
    """Drop the lines of processes other than the main one."""


def open_model(path: str | Path, *, recipe: str | None, replacements: Replacements, loras: Sequence[Lora] = (), log: Say) -> OpenedModel:
    """Load network and specification of a model, and merge `loras` into it; `make_generator` loads its codec and text encoder.

    `log` receives the choices made. Raises ValueError if there is no model, `recipe` is missing or not allowed, or a LoRA does not fit.
    """
    opened = _open_model(path, recipe=recipe, replacements=replacements, log=log)
    if recipe is not None or replacements != NO_REPLACEMENTS:
        opened = opened._replace(digest=_digest_with_parts(opened, replacements))
    merge_loras(opened.network, loras)
    for lora in loras:
        log(f"LoRA: {lora}")
    return opened


def _open_model(path: str | Path, *, recipe: str | None, replacements: Replacements, log: Say) -> OpenedModel:
    place = locate_model(path)
    if place.kind in ("folder", "run", "checkpoint"):
        if recipe is not None:
            raise ValueError(f"--recipe {recipe}: {path} already describes its network; leave it out")
        folder = place.path if place.run is None else _folder_of_run(place.path, log=log)
        network, spec = load_model(folder, cache=DiskCache.default())
        return OpenedModel(network, apply_replacements(spec, replacements), file_digest(description_file(folder)))
    from launch.checkpoints.initial_weights import load_weights

    found = load_weights(place.path)
    spec = _spec_of_recipe(recipe, found=found) if recipe is not None else _spec_of_export(found, path=place.path, log=log)
    spec = apply_replacements(spec, replacements)
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
    network.load_official(found.state)
    log(f"{found.source}: rotary layout {spec.rope}")
    described = found.source / NETWORK_FILE if found.source.is_dir() else found.source
    return OpenedModel(network, spec, file_digest(described))


def _folder_of_run(path: Path, *, log: Say) -> Path:
    from launch.checkpoints.export import model_folder  # what reads checkpoints takes long to import

    return model_folder(path, log=log)


def make_generator(
    network: TransitionTransformer, spec: ModelSpec, *, device: torch.device, dtype: Dtype | None = None, memory_gb: float | None = None
) -> Generator:
    """Create the generator. Raises ValueError, naming the options to replace them, if its codec or text encoder cannot be loaded."""
    network = network.to(device).eval().requires_grad_(False)
    try:
        return Generator(network, spec, device=device, dtype=dtype, memory_gb=memory_gb)
    except ValueError as error:
        raise ValueError(f"{error} ({REMEDY})") from error


def apply_replacements(spec: ModelSpec, replacements: Replacements) -> ModelSpec:
    """Specification with codec, text encoder and tokenizer replaced. Raises ValueError for one that this model does not have."""
    codec, text = dict(spec.codec), None if spec.text is None else dict(spec.text)
    if replacements.codec is not None:
        codec = _parse_replacement(replacements.codec, option="--codec", kinds=codecs.CODECS, kind=codec["kind"])
    if text is None and (typed := replacements.text or replacements.tokenizer) is not None:
        raise ValueError(f"{'--text' if replacements.text else '--tokenizer'} {typed}: a class model has no text encoder")
    if text is not None and replacements.text is not None:
        chosen = _parse_replacement(replacements.text, option="--text", kinds=encoders.TEXT_ENCODERS, kind=text["kind"])
        kept = {name: value for name, value in text.items() if name in ("max_tokens", "precision")}
        text = {**kept, **chosen}
    if text is not None and replacements.tokenizer is not None:
        text["tokenizer"] = replacements.tokenizer
    if codec["kind"] is None:
        raise ValueError(f"the codec of the weights ({spec.network.get('in_channels')} channels) is unknown: give --codec KIND=PATH")
    if text is not None and text["kind"] is None:
        raise ValueError("the text encoder of the weights is unknown: give --text KIND=PATH")
    return replace(spec, codec=codec, text=text)


def _digest_with_parts(opened: OpenedModel, replacements: Replacements) -> str:
    """Digest of a model with other parts or a recipe than it was saved with: of their content, so that they can be moved."""
    spec, cache = opened.spec, DiskCache.default()
    of_file = file_digest if cache is None else cache.file_digest
    parts: dict[str, Any] = {"model": opened.digest, "rope": spec.rope, "transport": spec.transport, "sampling": spec.sampling}
    replaced = {"codec": (spec.codec, replacements.codec, CODEC_PARTS), "text": (spec.text, replacements.text, encoders.PARTS)}
    for name, (section, given, folders) in replaced.items():
        if given is not None and section is not None:
            path = section.get("path")
            content = None if path is None else weight_files.model_digest(path, parts=folders, of_file=of_file)
            parts[name] = {**section, "path": content}
    if replacements.tokenizer is not None:
        parts["tokenizer"] = weight_files.digest(replacements.tokenizer, parts=tokenizers.PARTS, weights=False)
    return json_digest(parts)


def _parse_replacement(typed: str, *, option: str, kinds: tuple[str, ...], kind: str | None) -> dict[str, Any]:
    """Parse KIND=PATH, KIND, or the PATH of a model of the current kind."""
    named, equals, path = typed.partition("=")
    if named in kinds:
        return {"kind": named, **({"path": path} if equals else {})}
    if kind in (None, "pixel", "lookup"):
        raise ValueError(f"{option} {typed}: give its kind, {option} KIND={typed}; KIND is one of {', '.join(kinds)}")
    return {"kind": kind, "path": typed}


def _spec_of_recipe(recipe: str, *, found: InitialWeights) -> ModelSpec:
    """Specification from a recipe; for an official export, with the export's network."""
    from launch.checkpoints.initial_weights import ROPE_OF_PUBLISHED
    from launch.checkpoints.model_spec import spec_of
    from launch.config.load import load_config

    config = load_config(recipe)
    rope = config.network.rope if "rope" in config.network.model_fields_set else ROPE_OF_PUBLISHED
    spec = replace(spec_of(config), rope=found.rope or rope)
    return spec if found.params is None else replace(spec, network=found.params)


def _spec_of_export(found: InitialWeights, *, path: Path, log: Say) -> ModelSpec:
    """Specification of an official export, with the published defaults."""
    from launch.checkpoints.initial_weights import read_network_file
    from launch.checkpoints.model_spec import PUBLISHED_GUIDANCE

    if found.params is None or found.rope is None:
        raise ValueError(f"{path}: a weight file does not describe its network: give --recipe NAME, for example --recipe t2i-xl-1")
    content = read_network_file(path)
    params, transport = network_description(content)
    ours = content.get(OURS)
    if isinstance(ours, Mapping) and {"codec", "text", "sampling"} <= set(ours):
        return ModelSpec(params, found.rope, transport, dict(ours["codec"]), ours["text"] and dict(ours["text"]), dict(ours["sampling"]))
    is_pixel, is_text = params.get("in_channels") == codecs.GEOMETRIES["pixel"].channels, params.get("cap_feat_dim") is not None
    if is_pixel and is_text:
        log(f"{path / NETWORK_FILE} has no codec and text encoder: using pixel and lookup; give others with --codec and --text")
    shift = 1024 if is_text and transports.TRANSPORTS[transport["kind"]].shifts else None
    return ModelSpec(
        network=params,
        rope=found.rope,
        transport=transport,
        codec={"kind": "pixel" if is_pixel else None},
        text={"kind": "lookup" if is_pixel else None, "max_tokens": 77 if is_pixel else 256} if is_text else None,
        sampling={"steps": 8, "guidance": PUBLISHED_GUIDANCE, "interval": [0.0, 1.0], "shift": shift, "instantaneous": False},
    )
