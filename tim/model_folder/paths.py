"""Paths of the codec, the text encoder and its tokenizer in a model folder: relative if the models move together with it."""

from __future__ import annotations

import json
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
FOLDERS = ("codec", "text_encoder", "tokenizer")  # sub-folders of copied models
DIFFUSERS_FOLDERS = ("vae", "text_encoder", "tokenizer")


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


def copied(
    codec: Section, text: Section | None, *, folders: tuple[str, str, str], up: str
) -> tuple[Section, Section | None, dict[str, Location]]:
    """The sections for a folder with copies of the models, and the models to copy, by sub-folder.

    folders: sub-folders of codec, text encoder and tokenizer; up: prefix that leads from config.json to them. Raises ValueError if a model
    is missing.
    """
    codec_folder, text_folder, tokenizer_folder = folders
    models: dict[str, Location] = {}
    codec = dict(codec)
    if codec.get("path") is not None:
        models[codec_folder] = codecs.location(codec["kind"], codec["path"])
        codec["path"] = up + codec_folder
    if text is not None and text.get("path") is not None:
        text = dict(text)
        models[text_folder] = encoders.location(text["kind"], text["path"])
        tokenizer = encoders.tokenizer_location(text["kind"], text["path"], tokenizer_path=text.get("tokenizer"))
        text["path"] = up + text_folder
        if tokenizer is not None and tokenizer != models[text_folder].folder:
            models[tokenizer_folder] = Location(tokenizer, None)
            text["tokenizer"] = up + tokenizer_folder
    return codec, text, models


def copy(location: Location, target: Path) -> None:
    """Copy the files of a model: descriptions, and all weights or the given weights file."""
    target.mkdir()
    for file in weight_files.files(location):
        shutil.copyfile(file, target / file.name)


def pipeline_index(folder: Path, *, part: str) -> str:
    """Content of `model_index.json`: library and class of each sub-folder of a diffusers pipeline."""
    index: dict[str, Any] = {"_class_name": "TransitionPipeline", part: ["tim", "TransitionTransformer"]}
    vae, text_encoder, tokenizer = DIFFUSERS_FOLDERS
    for name, library, file, key in (
        (vae, "diffusers", "config.json", "_class_name"),
        (text_encoder, "transformers", "config.json", "architectures"),
        (tokenizer, "transformers", "tokenizer_config.json", "tokenizer_class"),
    ):
        path = folder / name / file
        found = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
        if (folder / name).is_dir():
            index[name] = [library, found[0] if isinstance(found, list) and found else found]
    return json.dumps(index, indent=2) + "\n"


def _mapped(section: Section, change: Callable[[str], str]) -> Section:
    paths = {key: section[key] for key in _KEYS if section.get(key) is not None and not str(section[key]).startswith(HUB)}
    return {**section, **{key: change(str(path)) for key, path in paths.items()}}
