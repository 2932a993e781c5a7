"""Paths of the codec, the text encoder and its tokenizer in a model folder: relative if the models move together with it."""

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
    """A section of a model spec, with paths inside `home` made relative to `folder`, which is also inside `home`."""
    root = home.resolve()

    def shorten(path: str) -> str:
        is_inside = os.path.isabs(path) and Path(path).resolve().is_relative_to(root)
        return os.path.relpath(Path(path).resolve(), folder.resolve()) if is_inside else path

    return _mapped(section, shorten)


def absolute(section: Section, *, folder: Path) -> Section:
    """A section of a model spec with relative paths resolved against `folder`."""
    return _mapped(section, lambda path: os.path.normpath(folder.absolute() / path))


def copied(codec: Section, text: Section | None) -> tuple[Section, Section | None, dict[str, Location]]:
    """The sections for a folder with copies of the models, and the models to copy, by sub-folder.

    Raises ValueError if a model is missing.
    """
    models: dict[str, Location] = {}
    codec = dict(codec)
    if codec.get("path") is not None:
        models["codec"] = codecs.location(codec["kind"], codec["path"])
        codec["path"] = "codec"
    if text is not None and text.get("path") is not None:
        text = dict(text)
        models["text_encoder"] = encoders.location(text["kind"], text["path"])
        tokenizer = encoders.tokenizer_location(text["kind"], text["path"], tokenizer_path=text.get("tokenizer"))
        text["path"] = "text_encoder"
        if tokenizer is not None and tokenizer != models["text_encoder"].folder:
            models["tokenizer"] = Location(tokenizer, None)
            text["tokenizer"] = "tokenizer"
    return codec, text, models


def copy(location: Location, target: Path) -> None:
    """Copy the files of a model: descriptions, and all weights or the given weights file."""
    target.mkdir()
    for file in weight_files.files(location):
        shutil.copyfile(file, target / file.name)


def _mapped(section: Section, change: Callable[[str], str]) -> Section:
    paths = {key: section[key] for key in _KEYS if section.get(key) is not None and not str(section[key]).startswith(HUB)}
    return {**section, **{key: change(str(path)) for key, path in paths.items()}}
