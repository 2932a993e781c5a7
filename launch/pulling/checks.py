"""Check that the parts of a pulled model fit together, before they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.digests import file_digest
from tim import TransitionTransformer, codecs
from tim.model_folder.folder import ModelSpec, is_model_folder, is_pulled, read_spec
from tim.network import PROJECTOR
from tim.pretrained.safetensors_files import LazyTensors
from tim.text import encoders


def fitting_params(spec: ModelSpec, weights: LazyTensors, *, source: Path) -> ModelSpec:
    """The spec of these weights: without the projection for the alignment teacher if they have none.

    Raises ValueError naming the first names and shapes that differ from the network's.
    """
    has_projector = any(name.startswith(PROJECTOR) for name in weights.shapes)
    network = dict(spec.network) if has_projector else {key: value for key, value in spec.network.items() if key != "z_dim"}
    found = ModelSpec(network, spec.rope, spec.transport, spec.codec, spec.text, spec.sampling)
    with torch.device("meta"):
        empty = TransitionTransformer.from_official(network, rope=spec.rope)
    try:
        empty.load_official({name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()})
    except ValueError as error:
        raise ValueError(f"--network {source}: {error}") from error
    return found


def used_weights(spec: ModelSpec, weights: LazyTensors, *, source: Path) -> LazyTensors:
    """The network's tensors in its own order, each checked when it is read. Raises ValueError for one that is not finite."""
    with torch.device("meta"):
        names = TransitionTransformer.from_official(spec.network, rope=spec.rope).state_dict()

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"--network {source}: {name} has values that are not finite: download the file again")
        return tensor

    return LazyTensors({name: weights.shapes[name] for name in names}, {name: weights.dtypes[name] for name in names}, read)


def check_codec(spec: ModelSpec) -> None:
    """Raise ValueError unless the codec can be loaded, and has the network's channels."""
    kind, path = spec.codec["kind"], spec.codec.get("path")
    codec = codecs.make(kind, path, channels=spec.codec.get("channels"))
    if codec.channels != spec.network["in_channels"]:
        raise ValueError(f"--codec {path}: has {codec.channels} channels, the network {spec.network['in_channels']}")


def check_text(spec: ModelSpec) -> None:
    """Raise ValueError unless the text encoder has the network's width, all weights of its config and a usable tokenizer."""
    text = spec.text
    if text is None or text.get("path") is None:
        return
    kind, path = text["kind"], text["path"]
    width, needed = encoders.width(kind, path), spec.network["cap_feat_dim"]
    if width != needed:
        raise ValueError(f"--text {path}: its features have width {width}, the network takes {needed}: give the encoder of its training")
    encoders.check_weights(kind, path)
    encoders.tokenizer(kind, path, tokenizer_path=text.get("tokenizer"), max_tokens=text["max_tokens"])


def check_older(out: Path, spec: ModelSpec) -> None:
    """Raise ValueError if `out` is a model folder that `tim pull` did not write, or one of another network."""
    if not is_model_folder(out):
        return
    remedy = "give another --out, or remove the folder first"
    if not is_pulled(out):
        raise ValueError(f"--out {out}: holds a model that `tim pull` did not write: {remedy}")
    found = read_spec(out)
    for name, before, now in (
        ("network", *(_without_teacher(each.network) for each in (found, spec))),
        ("rotary layout", found.rope, spec.rope),
        ("codec", found.codec["kind"], spec.codec["kind"]),
        ("text encoder", *((each.text or {}).get("kind") for each in (found, spec))),
    ):
        if before != now:
            raise ValueError(f"--out {out}: holds the model of another recipe, which has another {name}: {remedy}")


def _without_teacher(network: Mapping[str, Any]) -> dict[str, Any]:
    """A network's parameters without the projection for the alignment teacher, which published weights may lack."""
    return {name: value for name, value in network.items() if name not in ("z_dim", "projector_dim", "encoder_depth")}


def check_digests(expected: Mapping[str, str], files: Sequence[Path]) -> None:
    """Compare files with sha256 digests given by name or by the end of a path. Raises ValueError naming the first difference."""
    for name, digest in expected.items():
        found = [file for file in files if file.as_posix().endswith(f"/{name.lstrip('/')}")]
        if len(found) != 1:
            those = ", ".join(sorted({file.name for file in files}))
            which = "is none of the files" if not found else "is several of the files"
            raise ValueError(f"--sha256 {name}: {which} of this model ({those}): give the end of the path of one")
        if (actual := file_digest(found[0])) != digest.lower():
            raise ValueError(f"--sha256 {name}: {found[0]} has {actual}, not {digest}: download it again, or correct the digest")
