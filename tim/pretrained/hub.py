"""Repositories of the Hugging Face hub: addresses, sizes and digests of files, downloads into the hub's cache.

An address is `hf://OWNER/NAME`, or with a revision (branch, tag or commit) and a folder or file, `hf://OWNER/NAME@REVISION/FOLDER`.
A complete file in the cache is not downloaded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB = "hf://"
_COMMIT, _SHA256 = 40, 64  # hexadecimal digits


class Address(NamedTuple):
    """A repository, a revision of it (None: the newest), and a folder or file in it, "" for all of it."""

    repository: str
    revision: str | None
    inside: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.repository}{revision}{'/' if self.inside else ''}{self.inside}"


class HubUnreachableError(ValueError):
    """The hub cannot be reached, or does not answer as it should."""


class HubFiles(NamedTuple):
    """Files of a repository: the commit, and bytes by path."""

    commit: str
    sizes: dict[str, int]


def parse(name: str) -> Address:
    """The parts of an address. Raises ValueError if it has no owner or no name."""
    owner, _, rest = name.removeprefix(HUB).strip("/").partition("/")
    repository, _, inside = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not owner or not repository:
        raise ValueError(f"{name}: expected {HUB}OWNER/NAME, or {HUB}OWNER/NAME/FOLDER for a part of a pipeline")
    return Address(f"{owner}/{repository}", revision or None, inside)


def files(address: Address) -> HubFiles:
    """All files of a repository. Raises HubUnreachableError, and ValueError if there is no such repository or no permission for it."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(address.repository, revision=address.revision, files_metadata=True)
    except Exception as error:  # anything that the hub and the network raise
        raise refusal(address, error) from error
    return HubFiles(str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []})


def cached(address: Address, path: str) -> bool:
    """Whether a file of a commit is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(address.repository, path, revision=address.revision), str)


def cache_folder() -> Path:
    """The folder of the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def download(address: Address, path: str, *, again: bool = False, bar: Any = None) -> Path:
    """Download one file, if it is not in the cache, or `again`. bar: a class like tqdm's. Raises ValueError."""
    from huggingface_hub import hf_hub_download

    try:
        options: dict[str, Any] = {} if bar is None else {"tqdm_class": bar}
        return Path(hf_hub_download(address.repository, path, revision=address.revision, force_download=again, **options))
    except Exception as error:  # anything that the hub, its cache and the network raise
        raise refusal(address, error) from error


def snapshot(address: Address, patterns: Sequence[str]) -> Path:
    """The folder in the cache of a repository's commit, with the files of these patterns downloaded. Raises ValueError."""
    from huggingface_hub import snapshot_download

    revision: dict[str, Any] = {} if address.revision is None else {"revision": address.revision}
    try:
        return Path(snapshot_download(address.repository, allow_patterns=list(patterns), **revision))
    except Exception as error:  # anything that the hub, its cache and the network raise
        raise refusal(address, error) from error


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the cache; None if it is not in the cache."""
    parts = path.absolute().parts
    after = parts[parts.index("snapshots") + 1 :] if "snapshots" in parts else ()
    return after[0] if after and len(after[0]) == _COMMIT else None


def is_damaged(file: Path) -> bool:
    """Whether a file in the cache differs from the digest that the hub states, which names it there. Files elsewhere are not known."""
    stated = file.resolve().name
    if commit_of(file) is None or not set(stated) <= set("0123456789abcdef"):
        return False
    if len(stated) == _SHA256:
        return _digest(file, hashlib.sha256()) != stated
    if len(stated) == _COMMIT:  # a file in git: the digest of a header and the content
        return _digest(file, hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)) != stated
    return False


def refusal(address: Address, error: BaseException) -> ValueError:
    """The one-line error for a repository that cannot be used."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    chain = list(_chain(error))
    statuses = {getattr(getattr(each, "response", None), "status_code", None) for each in chain}
    page = f"{constants.ENDPOINT}/{address.repository}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN), then run the same command again"
    local = "give a local folder with config.json and safetensors instead"
    is_gated = any(isinstance(each, GatedRepoError) for each in chain)
    if not is_gated and any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return ValueError(f"{address}: there is no {page}, or it is private: check its name; if it is private, {log_in}; or {local}")
    if is_gated or statuses & {401, 403}:
        return ValueError(f"{address}: needs permission: accept the licence at {page}, {log_in}; or {local}")
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return HubUnreachableError(f"{address} cannot be downloaded ({why}); {local}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _digest(file: Path, digest: Any) -> str:
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
