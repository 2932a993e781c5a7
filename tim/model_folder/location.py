"""Where a model is: a path on this machine, or an address of the Hugging Face hub, whose files are downloaded once into the hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tim.model_folder.folder import FORMAT, TRANSFORMER
from tim.pretrained import hub, weight_files
from tim.pretrained.hub import HUB, Address
from tim.pretrained.official import WEIGHTS
from tim.pretrained.safetensors_files import INDEX, read_shard_names
from tim.pretrained.weight_files import PIPELINE

_CONFIG = "config.json"


def local_model(name: str | Path) -> Path:
    """The folder or file of a model: the path itself, or that of the files at `hf://OWNER/NAME[@REVISION][/FOLDER]`.

    Of a model folder on the hub, the files that its config.json names are downloaded, of a weight file or an index of shards, that file and
    its shards. Raises ValueError if there is no such model, or if it cannot be downloaded and is not in the cache.
    """
    if not str(name).startswith(HUB):
        return Path(name).expanduser()
    address = hub.parse(str(name))
    if address.inside.endswith((*WEIGHTS, INDEX)):
        return _weights(address)
    config, part = _description(address)
    pinned = address._replace(revision=hub.commit_of(config))
    listed = _listed_files(config, address=address)
    if listed is None:
        return weight_files.local_folder(str(pinned))
    for file in [_in_repository(PurePosixPath(address.inside, part), name, address=address) for name in listed]:
        hub.download(pinned, file)
    return config.parent.parent if part else config.parent


def _description(address: Address) -> tuple[Path, str]:
    """The config.json of a model folder on the hub, in our or the diffusers layout, and the sub-folder that it is in."""
    found = _downloaded(address, _CONFIG)
    if isinstance(found, Path):
        return found, ""
    index = _downloaded(address, PIPELINE)  # without a network, it may be in the cache
    if isinstance(index, Path):
        return hub.download(address, str(PurePosixPath(address.inside, TRANSFORMER, _CONFIG))), TRANSFORMER
    if isinstance(found, hub.HubUnreachableError):
        raise found
    raise ValueError(f"{address}: has no {_CONFIG} of a model; for a file of weights, give {HUB}{address.repository}/FILE")


def _downloaded(address: Address, name: str) -> Path | ValueError:
    """A file in the folder of an address, or the error if it is missing there or cannot be downloaded."""
    try:
        return hub.download(address, str(PurePosixPath(address.inside, name)))
    except (hub.MissingFileError, hub.HubUnreachableError) as error:
        return error


def _listed_files(config: Path, *, address: Address) -> Sequence[str] | None:
    """Names of the files of a model folder, relative to its config.json; None if it does not list them."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        has_format = content["format"] == FORMAT
        files = content.get("files")
        names = None if files is None else [str(name) for name in files]
    except (ValueError, KeyError, TypeError, AttributeError):
        has_format, names = False, None
    if not has_format:
        remedy = "`tim pull` builds a model folder from published weights"
        raise ValueError(f"{address}: its {_CONFIG} is not of a model of tim (format {FORMAT}): {remedy}")
    return names


def _weights(address: Address) -> Path:
    """A weight file on the hub, or an index with its shards."""
    file = hub.download(address, address.inside)
    if file.name.endswith(INDEX):
        pinned = address._replace(revision=hub.commit_of(file))
        for shard in read_shard_names(file):
            hub.download(pinned, str(PurePosixPath(address.inside).with_name(shard)))
    return file


def _in_repository(root: PurePosixPath, name: str, *, address: Address) -> str:
    """The path in a repository of a file that a config.json names. Raises ValueError if it is not in the repository."""
    path = os.path.normpath(root / name)
    if os.path.isabs(name) or path.startswith(".."):
        raise ValueError(f"{address}: its {_CONFIG} names {name!r}, which is not in the repository: it may be malicious")
    return path
