"""Paths of the codec, the text encoder and its tokenizer in a model folder: relative where the models are moved together with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tim import codecs
from tim.pretrained import weight_files
from tim.pretrained.weight_files import HUB, Location
from tim.text import encoders

Section: TypeAlias = dict[str, Any]
_KEYS = ("path", "tokenizer")


def relative(section: Section, *, folder: Path, home: Path) -> Section:
    """A section of a model's description with the paths that lie in `home` relative to `folder`, which lies in `home`, too."""
    root = home.resolve()

    def shorten(path: str) -> str:
        is_inside = os.path.isabs(path) and Path(path).resolve().is_relative_to(root)
        return os.path.relpath(Path(path).resolve(), folder.resolve()) if is_inside else path

    return _mapped(section, shorten)


def absolute(section: Section, *, folder: Path) -> Section:
    """The same with relative paths as they are from here."""
    return _mapped(section, lambda path: os.path.normpath(folder.absolute() / path))


def copied(codec: Section, words: Section | None) -> tuple[Section, Section | None, dict[str, Location]]:
    """The sections for a folder that holds copies of the models, and what is to be copied to which of its sub-folders.

    Raises ValueError where a model is not there.
    """
    models: dict[str, Location] = {}
    codec = dict(codec)
    if codec.get("path") is not None:
        models["codec"] = codecs.location(codec["kind"], codec["path"])
        codec["path"] = "codec"
    if words is not None and words.get("path") is not None:
        words = dict(words)
        models["text_encoder"] = encoders.location(words["kind"], words["path"])
        tokenizer = encoders.tokenizer_location(words["kind"], words["path"], tokenizer_path=words.get("tokenizer"))
        words["path"] = "text_encoder"
        if tokenizer is not None and tokenizer != models["text_encoder"].folder:
            models["tokenizer"] = Location(tokenizer, None)
            words["tokenizer"] = "tokenizer"
    return codec, words, models


def copy(location: Location, target: Path) -> None:
    """Copy the files of a model: those that describe it, and its weights or the file of them that was named."""
    target.mkdir()
    for file in weight_files.files(location):
        shutil.copyfile(file, target / file.name)


def _mapped(section: Section, change: Callable[[str], str]) -> Section:
    paths = {key: section[key] for key in _KEYS if section.get(key) is not None and not str(section[key]).startswith(HUB)}
    return {**section, **{key: change(str(path)) for key, path in paths.items()}}
