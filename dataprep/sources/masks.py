"""Loss masks beside the images of a folder, as trainers name them: `a.mask.png` or `a-masklabel.png` (OneTrainer) beside `a.jpg`, and
`masks/a.png` or another folder with the same names (kohya's sd-scripts, ai-toolkit, diffusion-pipe)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from dataprep.sources.files.file_listing import Listing
from dataprep.sources.files.paths import base_name, join, list_files
from dataprep.sources.raw_sample import RawMask
from pipeline.bounded_counter import MAX_NAMES, listed
from pipeline.corpus.record_fields import IMAGE_EXTENSIONS
from pipeline.errors import one_line

_SUFFIXES = (".mask.png", "-masklabel.png")
_FOLDERS = ("masks", "mask")
_IMAGES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


class FolderMasks:
    """The masks of an image folder.

    `path`: the folder or its URL, with these `files`. `elsewhere`: a folder with further masks, each with the relative path of its image
    and any image extension. A folder `masks` or `mask` holds masks if the folder above has an image of the same name. Raises ValueError if
    `elsewhere` cannot be listed.
    """

    def __init__(self, path: str, *, files: Listing, elsewhere: str | None = None) -> None:
        self._path = path
        self._files = files
        self._folders = frozenset(_mask_folders(files))
        self._has_named = any(file.lower().endswith(_SUFFIXES) for file in files)  # few folders have masks: the others cost nothing
        self._elsewhere = elsewhere
        self._others = None if elsewhere is None else _list(elsewhere)
        self._used: set[str] = set()
        self._used_elsewhere: set[str] = set()

    def holds(self, file: str) -> bool:
        """Whether a file of the folder is a mask, by its name or its folder."""
        if self._has_named and file.lower().endswith(_SUFFIXES):
            return True
        return bool(self._folders) and file[: len(file) - len(base_name(file))] in self._folders

    def of(self, image: str) -> RawMask | None:
        """The mask of an image, if it has one. Those with their own name in the image's folder come first."""
        stem = os.path.splitext(image)[0]
        for file in self._candidates(image, stem=stem):
            self._used.add(file)
            return RawMask(name=file, file=join(self._path, file))
        if self._others is not None and self._elsewhere is not None:
            for file in _same_stem(self._others, stem):
                self._used_elsewhere.add(file)
                return RawMask(name=join(self._elsewhere, file), file=join(self._elsewhere, file))
        return None

    def notes(self) -> list[str]:
        """A sentence on masks without an image. Complete once every image was asked for."""
        has_masks = self._has_named or self._folders
        orphans = [file for file in self._files if self.holds(file) and file not in self._used] if has_masks else []
        others = [file for file in self._others or () if file.lower().endswith(_IMAGES) and file not in self._used_elsewhere]
        folder = base_name((self._elsewhere or "").rstrip("/"))
        orphans += [f"{folder}/{file}" for file in others]
        named = listed(orphans[:MAX_NAMES], count=len(orphans))
        return [f"{len(orphans)} mask(s) without an image of the same name were left out: {named}"] if orphans else []

    def digest(self) -> str:
        """Digest of the names and sizes of masks elsewhere, "" without such."""
        return "" if self._others is None else self._others.digest().hexdigest()

    def _candidates(self, image: str, *, stem: str) -> Iterator[str]:
        if self._has_named:
            beside = f"{stem}{_SUFFIXES[0]}", f"{image}{_SUFFIXES[0]}", f"{stem}{_SUFFIXES[1]}"
            yield from (name for name in beside if name in self._files)
        name = base_name(stem)
        folder = stem[: len(stem) - len(name)]
        for inner in _FOLDERS:
            if f"{folder}{inner}/" in self._folders:
                yield from _same_stem(self._files, f"{folder}{inner}/{name}")


def _list(folder: str) -> Listing:
    try:
        return list_files(folder)
    except OSError as error:
        raise ValueError(f"columns.masks={folder}: {one_line(error)}") from error


def _mask_folders(files: Listing) -> Iterator[str]:
    """The folders named like masks whose parent has an image of the same name as one in them."""
    folders = dict(files.folders())
    for folder, names in folders.items():
        parent, _, name = folder.rstrip("/").rpartition("/")
        parent = f"{parent}/" if parent else ""
        if name in _FOLDERS and parent in folders:
            stems = {os.path.splitext(each)[0] for each in folders[parent] if each.lower().endswith(_IMAGES)}
            if any(os.path.splitext(each)[0] in stems for each in names if each.lower().endswith(_IMAGES)):
                yield folder


def _same_stem(files: Listing, stem: str) -> Iterator[str]:
    return (file for file in files.starting(f"{stem}.") if file.lower().endswith(_IMAGES) and os.path.splitext(file)[0] == stem)
