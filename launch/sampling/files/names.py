"""Names of sampled images, and whether an image is to be drawn.

    0003-a-red-fox-512x128-steps8-cfg2.5-seed0-1f0c9a2b.png

Number of the prompt in its list, its first words, size, steps, guidance, seed, and the start of the digest of all settings but device and
versions. Equal settings have equal names, so that a list that was cut short can go on; other settings have other names.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Literal, TypeAlias

from launch.sampling.files.image_files import NoSettings, is_complete, read_settings
from launch.sampling.files.settings import Settings

Decision: TypeAlias = Literal["draw", "skip", "refuse"]

_SLUG_CHARACTERS, _SLUG_BYTES = 40, 80  # with the longest numbers and a temporary suffix, a name stays below 255 bytes
_DIGEST_DIGITS = 8
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_SHOWN = 3  # names in a message


def file_name(settings: Settings, *, index: int, suffix: str) -> str:
    """The name of an image. index: number of its prompt in the list, from 0. suffix: with its dot."""
    parts = [f"{index:04d}", slug(settings.prompt), f"{settings.width}x{settings.height}"]
    steps = settings.steps if settings.times is None else len(settings.times) - 1
    if steps is not None:
        parts.append(f"steps{steps}")
    if settings.guidance is not None:
        parts.append(f"cfg{settings.guidance:g}")
    if settings.seed is not None:
        parts.append(f"seed{settings.seed}")
    return "-".join([*parts, settings.digest()[:_DIGEST_DIGITS]]) + suffix


def slug(prompt: str | int) -> str:
    """The first words of a prompt in letters, digits, `-` and `_`, in lower case, for file systems that ignore it."""
    if not isinstance(prompt, str):
        return f"class-{prompt}"
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt[: 8 * _SLUG_CHARACTERS]).casefold())
    words = re.sub(r"[^\w]+", "-", text).strip("-")[:_SLUG_CHARACTERS]
    cut = words.encode("utf-8", "ignore")[:_SLUG_BYTES].decode("utf-8", "ignore").rstrip("-")
    return cut or ("symbols" if prompt.strip() else "empty")


def check_file_name(name: str) -> str:
    """Return a name that a list gives to an image or a folder.

    Raises:
        ValueError: it is empty or too long, leads to another folder, or is not allowed on Windows.
    """
    if not name.strip() or len(name.encode("utf-8", "replace")) > 2 * _SLUG_BYTES:
        raise ValueError(f"{name[:40]!r} as the name of a file: expected 1 to {2 * _SLUG_BYTES} bytes")
    if _UNSAFE.search(name) or name.startswith(".") or name.endswith((".", " ")) or _RESERVED.fullmatch(name):
        raise ValueError(f"{name!r} as the name of a file: it has characters that file systems refuse, or is a reserved name; rename it")
    return name


def check_folder(folder: Path) -> None:
    """Raise ValueError if images cannot be written to a folder, or if it cannot be made, before anything is drawn."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        where = "is a file" if nearest == folder else f"{nearest} is a file"
        raise ValueError(f"--out {folder}: {where}; give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: {nearest} may not be written to; give another folder")


def decide(path: Path, settings: Settings, *, overwrite: bool = False, recorded: Settings | None = None) -> Decision:
    """Whether to draw an image: "draw", "skip" if it is there with the same settings, "refuse" if something else has its name.

    A file of the same settings whose end is missing is drawn again. Settings are compared without device and versions.

    Args:
        overwrite: draw whatever is there.
        recorded: the settings in `samples.jsonl`, for a file without metadata.
    """
    if path.is_dir():
        return "refuse"
    if overwrite or not path.exists():
        return "draw"
    try:
        found = read_settings(path)
    except NoSettings:
        found = recorded
    if found is None or found.request() != settings.request():
        return "refuse"
    return "skip" if is_complete(path) else "draw"


def plan_images(images: Mapping[Path, Settings], *, overwrite: bool = False, recorded: Mapping[Path, Settings] | None = None) -> list[Path]:
    """The paths of `images` that are to be drawn, in order. recorded: settings in `samples.jsonl`, by path.

    Raises:
        ValueError: other images have their names; names the first ones.
    """
    decisions = {
        path: decide(path, settings, overwrite=overwrite, recorded=(recorded or {}).get(path)) for path, settings in images.items()
    }
    refused = [path for path, decision in decisions.items() if decision == "refuse"]
    if refused:
        raise ValueError(f"{_listed(refused)} exists with other settings or none: give another --out, or --overwrite")
    return [path for path, decision in decisions.items() if decision == "draw"]


def check_distinct(paths: Iterable[PurePath]) -> None:
    """Raise ValueError if two images have the same path, also on a file system that ignores case."""
    seen: dict[str, PurePath] = {}
    for path in paths:
        if seen.setdefault(str(path).casefold(), path) is not path:
            raise ValueError(f"two images have the name {path}: give their prompts different ids, or one size, steps and guidance")


def _listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(str(path) for path in paths[:_SHOWN]) + more
