"""Repositories of the Hugging Face hub: addresses, sizes and digests of files, downloads into the hub's cache.

An address is `hf://OWNER/NAME`, or with a revision (branch, tag or commit) and a folder or file, `hf://OWNER/NAME@REVISION/FOLDER`.
A complete file in the cache is not downloaded again. What fails for a while, as on an overloaded server, is tried again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

HUB = "hf://"
RETRY_SECONDS = (1.0, 5.0, 20.0)  # waits before further attempts
_COMMIT, _SHA256 = 40, 64  # hexadecimal digits
_ADDRESS = re.compile(r"([^/@]+)/([^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?")
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
_PASSING_ERRORS = ("ReadTimeout", "ReadError", "RemoteProtocolError")  # of the HTTP library
_SHORT_FILE = "Consistency check failed"  # what the library says if a connection ends early
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Address(NamedTuple):
    """A repository, a revision of it (None: the newest), and a folder or file in it, "" for all of it."""

    repository: str
    revision: str | None
    inside: str

    def __str__(self) -> str:
        is_special = self.revision is None or self.revision.startswith("refs/")
        revision = "" if self.revision is None else f"@{self.revision if is_special else quote(self.revision, safe='')}"
        return f"{HUB}{self.repository}{revision}{'/' if self.inside else ''}{self.inside}"


class HubUnreachableError(ValueError):
    """The hub cannot be reached, or does not answer as it should."""


class MissingFileError(ValueError):
    """A repository without a file of this name."""


class HubFiles(NamedTuple):
    """Files of a repository: the commit, bytes and digests by path. A digest is as in `is_damaged`; a server may not state it."""

    commit: str
    sizes: dict[str, int]
    digests: dict[str, str]


def parse(name: str) -> Address:
    """The parts of an address; a `/` in the name of a branch is `%2F`. Raises ValueError if it has no owner or no name, or if its folder is
    not inside the repository."""
    found = _ADDRESS.fullmatch(name.removeprefix(HUB).strip("/"))
    if found is None:
        raise ValueError(f"{name}: expected {HUB}OWNER/NAME[@REVISION][/FOLDER]")
    owner, repository, revision, inside = found.groups()
    parts = [part for part in (inside or "").split("/") if part not in ("", ".")]
    if ".." in (owner, repository, *parts):
        raise ValueError(f"{name}: leads out of the repository: remove '..'")
    return Address(f"{owner}/{repository}", unquote(revision) if revision else None, "/".join(parts))


def files(address: Address) -> HubFiles:
    """All files of a repository. Raises HubUnreachableError, and ValueError if there is no such repository or no permission for it."""
    from huggingface_hub import HfApi

    info = _attempts(address, lambda: HfApi().model_info(address.repository, revision=address.revision, files_metadata=True))
    found = info.siblings or []
    digests = {file.rfilename: file.blob_id if file.lfs is None else file.lfs.sha256 for file in found}
    stated = {name: digest for name, digest in digests.items() if digest is not None}
    return HubFiles(str(info.sha), {file.rfilename: file.size or 0 for file in found}, stated)


def cached(address: Address, path: str) -> bool:
    """Whether a file of a commit is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(address.repository, path, revision=address.revision), str)


def cache_folder() -> Path:
    """The folder of the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def download(address: Address, path: str, *, again: bool = False, bar: Any = None) -> Path:
    """Download one file, if it is not in the cache, or `again`. bar: a class like tqdm's.

    Raises MissingFileError, and other ValueErrors.
    """
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {} if bar is None else {"tqdm_class": bar}
    settings = {"revision": address.revision, "force_download": again, **options}
    try:
        return Path(_attempts(address, lambda: hf_hub_download(address.repository, path, **settings)))
    except MissingFileError:
        raise MissingFileError(f"{address}: has no file {path}") from None


def snapshot(address: Address, patterns: Sequence[str]) -> Path:
    """The folder in the cache of a repository's commit, with the files of these patterns downloaded. Raises ValueError."""
    from huggingface_hub import snapshot_download

    revision: dict[str, Any] = {} if address.revision is None else {"revision": address.revision}
    return Path(_attempts(address, lambda: snapshot_download(address.repository, allow_patterns=list(patterns), **revision)))


def commit_of(path: Path) -> str | None:
    """The commit of a file or folder in the cache; None if it is not in the cache."""
    parts = path.absolute().parts
    after = parts[parts.index("snapshots") + 1 :] if "snapshots" in parts else ()
    return after[0] if after and len(after[0]) == _COMMIT else None


def is_damaged(file: Path, *, stated: str | None = None) -> bool:
    """Whether a file in the cache differs from the digest that the hub states: sha256 of a large file, git's of another.

    stated: that of the repository's list of files; None: the one by which the cache names the file. Files elsewhere are not known.
    """
    stated = file.resolve().name if stated is None else stated
    if commit_of(file) is None or not set(stated) <= set("0123456789abcdef"):
        return False
    if len(stated) == _SHA256:
        return _digest(file, hashlib.sha256()) != stated
    if len(stated) == _COMMIT:  # a file in git: the digest of a header and the content
        return _digest(file, hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)) != stated
    return False


def refusal(address: Address, error: BaseException) -> ValueError:
    """The one-line error for a repository that cannot be used."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    chain = list(_chain(error))
    if (found := _refusal_of_disk(address, chain)) is not None:
        return found
    page = f"{constants.ENDPOINT}/{address.repository}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN), then run the same command again"
    local = "give a local folder with config.json and safetensors instead"
    if _has(chain, RevisionNotFoundError):
        return ValueError(f"{address}: {page} has no branch, tag or commit {address.revision or 'main'}")
    if _has(chain, RemoteEntryNotFoundError):
        return MissingFileError(f"{address}: a file is missing there")
    is_gated, statuses = _has(chain, GatedRepoError), _statuses(chain)
    if not is_gated and _has(chain, RepositoryNotFoundError):
        return ValueError(f"{address}: there is no {page}, or it is private: check its name; if it is private, {log_in}; or {local}")
    if not is_gated and 401 in statuses and get_token() is not None:
        return ValueError(f"{address}: the hub does not accept your token (HF_TOKEN, or that of `hf auth login`): {log_in}; or {local}")
    if is_gated or statuses & {401, 403}:
        return ValueError(f"{address}: needs permission: accept the licence at {page}, {log_in}; or {local}")
    root = chain[-1] if str(chain[-1]) else error
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else " ".join(f"{type(root).__name__}: {root}".split())[:200]
    again = "unset it" if constants.HF_HUB_OFFLINE else "run the same command later"
    in_cache = f"not all of it is in the cache {cache_folder()}"
    return HubUnreachableError(f"{address} cannot be downloaded ({why}), and {in_cache}: {again}, or {local}")


def _refusal_of_disk(address: Address, chain: Sequence[BaseException]) -> ValueError | None:
    """The error if the cache cannot be written."""
    numbers = {error.errno for error in chain if isinstance(error, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        remedy = "make room, or set HF_HOME to a folder on another disk, then run the same command again: it keeps complete files"
        return ValueError(f"{address}: no space is left for the hub's cache {cache_folder()}: {remedy}")
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return ValueError(f"{address}: the hub's cache {cache_folder()} cannot be written: set HF_HOME to a folder of your own")
    return None


def _attempts(address: Address, action: Callable[[], Result]) -> Result:
    """The action's result; it is repeated after errors that may pass. Raises ValueError."""
    waits = list(RETRY_SECONDS)
    while True:
        try:
            return action()
        except Exception as error:  # anything that the hub, its cache and the network raise
            if not waits or not _may_pass(error):
                raise refusal(address, error) from error
            log.warning("%s: %s: trying again in %g s", address, " ".join(str(error).split())[:120], waits[0])
        time.sleep(waits.pop(0))


def _may_pass(error: BaseException) -> bool:
    chain = list(_chain(error))
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    return bool(_statuses(chain) & _PASSING_STATUSES or names & set(_PASSING_ERRORS)) or any(_SHORT_FILE in str(each) for each in chain)


def _statuses(chain: Sequence[BaseException]) -> set[int | None]:
    """HTTP statuses of errors."""
    return {getattr(getattr(each, "response", None), "status_code", None) for each in chain}


def _has(chain: Sequence[BaseException], kind: type[BaseException]) -> bool:
    return any(isinstance(each, kind) for each in chain)


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
