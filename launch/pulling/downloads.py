"""Download the parts of a model from the hub: sizes first, then files that are not in its cache, then their digests."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checkpoints.initial_weights import weights_file
from pipeline.progress import Progress
from tim.model_folder.location import local_model
from tim.pretrained import hub, weight_files
from tim.pretrained.hub import Address
from tim.pretrained.official import WEIGHTS
from tim.pretrained.safetensors_files import INDEX, read_index
from tim.pretrained.weight_files import Location

MEGABYTE = 10**6
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # folders of a pipeline


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model: the option that gives it, its path or hub address, and sub-folders of a pipeline that can have it.

    A network is one weights file or an index of such files.
    """

    option: str
    path: str
    folders: tuple[str, ...] = ()

    @property
    def is_network(self) -> bool:
        return self.option == "--network"


@dataclass(frozen=True, slots=True)
class Download:
    """Files of a hub part: `address` at a commit, with the folder or file that is the part; bytes and digests by path in the repository."""

    part: Part
    address: Address
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    @property
    def missing(self) -> dict[str, int]:
        """Those that are not in the cache."""
        return {path: size for path, size in self.sizes.items() if not hub.cached(self.address, path)}


def plan(part: Part) -> Download | None:
    """The files to download for a part on the hub; None if the hub cannot be reached: they may be in the cache.

    Raises ValueError naming the option if the repository, or such a model in it, is missing, or needs permission.
    """
    address = hub.parse(part.path)
    try:
        listed = hub.files(address)
    except hub.HubUnreachableError:
        return None
    except ValueError as error:
        raise ValueError(f"{part.option} {error}") from error
    inside, names = _network_files(part, address, listed.sizes) if part.is_network else _model_files(part, address, listed.sizes)
    sizes = {name: listed.sizes[name] for name in names}
    return Download(part, Address(address.repository, listed.commit, inside), sizes, listed.digests)


def fetch(planned: Download, *, done: int, total: int, report: Progress) -> Path:
    """Download what is missing, and check all files. Returns the local path of the part. done, total: bytes, of all parts.

    Raises ValueError naming the option if a download fails or a file is not as the hub states.
    """
    missing, root = planned.missing, Path()
    for path in planned.sizes:
        try:
            bar = _bar(report, done=done, total=total, note=path)
            file = _checked(planned.address, path, stated=planned.digests.get(path), bar=bar)
        except ValueError as error:
            raise ValueError(f"{planned.part.option} {error}") from error
        done += missing.get(path, 0)
        report("download (MB)", done // MEGABYTE, total // MEGABYTE, note=path)
        root = Path(str(file).removesuffix(path))
    hub.download(hub.parse(planned.part.path), min(planned.sizes, key=planned.sizes.__getitem__))  # notes the branch's commit, for offline
    return root / planned.address.inside


def _checked(address: Address, path: str, *, stated: str | None, bar: Any) -> Path:
    """A file that matches the hub's digest. One that does not is downloaded once more."""
    file = hub.download(address, path, bar=bar)
    if hub.is_damaged(file, stated=stated):
        file = hub.download(address, path, again=True)
    if hub.is_damaged(file, stated=stated):
        raise ValueError(f"{address}: {path} does not match the hub's digest, twice: run the same command later")
    return file


def fetch_cached(part: Part) -> Path:
    """The local path of a part that can only be in the cache. Raises ValueError naming the option if it is not there."""
    try:
        if part.is_network:
            found = Location(local_model(part.path), None)
            files = network_files(found.folder)
        else:
            found = weight_files.locate(part.path, parts=part.folders)
            files = weight_files.files(found)
        for file in files:
            if hub.is_damaged(file):
                raise ValueError(f"{file}: does not match the hub's digest: remove it, and download it again with a network")
        return found.file or found.folder
    except ValueError as error:
        what = "FILE, which you downloaded elsewhere" if part.is_network else "FOLDER, which you downloaded elsewhere"
        raise ValueError(f"{part.option} {error}: {part.option} {what}") from error


def network_files(path: Path) -> list[Path]:
    """The weights file of a network, or an index and its shards. Raises ValueError."""
    return [path, *sorted(set(read_index(path).values()))] if path.name.endswith(INDEX) else [path]


def given_files(part: Part) -> list[Path]:
    """The files of a part that is on this machine. Raises ValueError naming the option."""
    try:
        if not part.is_network:
            return weight_files.files(weight_files.locate(part.path, parts=part.folders))
        path = Path(part.path)
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        return network_files(weights_file(path) if path.is_dir() else path)
    except ValueError as error:
        raise ValueError(f"{part.option} {error}") from error


def check_space(needed: Iterable[tuple[Path, int]]) -> None:
    """Raise ValueError if file systems have fewer free bytes than their folders need together."""
    sums: dict[int, int] = {}
    for folder, count in needed:
        existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        device = existing.stat().st_dev
        sums[device] = sums.get(device, 0) + count
        free = shutil.disk_usage(existing).free
        if sums[device] > free:
            why = f"needs {sums[device] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise ValueError(f"{folder}: {why}: make room, or choose other folders (--out, and HF_HOME for the hub's cache)")


def _network_files(part: Part, address: Address, names: Mapping[str, int]) -> tuple[str, Sequence[str]]:
    """The weights file of a network in a repository and, if it is an index, its shards too."""
    inside = address.inside
    if inside not in names:
        found = [name for name in names if name.endswith(INDEX)] or [name for name in names if name.endswith(WEIGHTS)]
        found = [name for name in found if name.startswith(f"{inside}/" if inside else "")]
        if len(found) != 1:
            has = ", ".join(found[:5]) or "no weights"
            raise ValueError(f"{part.option} {part.path}: has {has}: give one file, {hub.HUB}{address.repository}/FILE")
        inside = found[0]
    stem = inside.removesuffix(INDEX)
    shards = [name for name in names if name.startswith(f"{stem}-") and "-of-" in name] if inside.endswith(INDEX) else []
    return inside, [inside, *shards]


def _model_files(part: Part, address: Address, names: Mapping[str, int]) -> tuple[str, Sequence[str]]:
    """The files of a codec, text encoder or tokenizer in a repository, and the folder or file that it is."""
    found = weight_files.wanted(names, address.inside, parts=part.folders)
    if not found:
        raise ValueError(f"{part.option} {part.path}: {address.repository} has no {address.inside or 'model'}")
    inside = address.inside if address.inside in names else found[0].rpartition("/")[0]
    above, _, name = inside.rpartition("/")
    if name.startswith(TEXT_ENCODER):  # its tokenizer is beside it
        sibling = f"{above}{'/' if above else ''}{name.replace(TEXT_ENCODER, TOKENIZER, 1)}"
        found = [*found, *weight_files.wanted(names, sibling)]
    return inside, found


def _bar(report: Progress, *, done: int, total: int, note: str) -> Any:
    """A class like tqdm's that reports to `report`."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})
            self.bytes = int(settings.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.bytes += int(n or 0)
            report("download (MB)", (done + self.bytes) // MEGABYTE, total // MEGABYTE, note=note)
            return super().update(n)

    return Bar
