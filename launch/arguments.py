"""Parse command-line arguments: overrides, sizes, step counts, times, guidance."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)

OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)
SIZE = re.compile(r"(\d+)[xX×](\d+)", re.ASCII)
MAX_PIXELS, MAX_SIDE = 4096 * 4096, 4 * 4096  # of an image, as in tim.sampling.requests, which imports torch


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into (positional arguments, overrides). `a.b=c` is an override unless a file or folder has this name."""
    overrides = [argument for argument in arguments if OVERRIDE.match(argument) and not Path(argument).exists()]
    return [argument for argument in arguments if argument not in overrides], overrides


def split_sources(arguments: Sequence[str], *, settings: Collection[str]) -> tuple[list[str], list[str]]:
    """Split into (sources, overrides). `NAME=VALUE` without a dot is an override if NAME is a setting, else a named source."""
    positional, overrides = split_overrides(arguments)
    named = [override for override in overrides if "." not in override.partition("=")[0] and override.partition("=")[0] not in settings]
    sources = [argument for argument in arguments if argument in positional or argument in named]
    return sources, [override for override in overrides if override not in named]


def one_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split `CONFIG [KEY=VALUE …]` into (config file or recipe, overrides).

    Raises:
        ValueError: no config, or more than one.
    """
    return _one(arguments, what="CONFIG (a YAML file, or a recipe listed by `tim recipes`) and KEY=VALUE overrides")


def one_corpus(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split `CORPUS [KEY=VALUE …]` into (corpus, overrides).

    Raises:
        ValueError: no corpus, or more than one.
    """
    return _one(arguments, what="CORPUS (a folder or URL written by `tim prepare` or `tim index`) and KEY=VALUE settings")


def _one(arguments: Sequence[str], *, what: str) -> tuple[str, list[str]]:
    positional, overrides = split_overrides(arguments)
    if len(positional) != 1:
        got = "none was given" if not positional else "got " + " ".join(positional)
        raise ValueError(f"expected one {what}: {got}")
    return positional[0], overrides


def one_of(value: str, *, option: str, known: tuple[Choice, ...]) -> Choice:
    """Return the value of an option as one of the `known` choices.

    Raises:
        ValueError: it is not one of them.
    """
    for choice in known:
        if choice == value:
            return choice
    raise ValueError(f"{option} {value}: expected {', '.join(known[:-1])} or {known[-1]}")


def parse_sizes(text: str, *, option: str = "--size", repeats: bool = False) -> list[tuple[int, int]]:
    """`"512x128,256x256"` (width × height) → [(128, 512), (256, 256)] (height, width), in pixels. option: its name in messages; repeats:
    keep a size that comes twice.

    Raises:
        ValueError: invalid syntax, a side of zero or above 16,384, or more than 4096² pixels.
    """
    sizes = []
    for part in _parts(text):
        match = SIZE.fullmatch(part)
        if match is None:
            raise ValueError(f"{option} {text}: '{part}' is not WIDTHxHEIGHT; write for example {option} 512x128,256x256")
        width, height = int(match[1]), int(match[2])
        if not width or not height:
            raise ValueError(f"{option} {text}: '{part}' has a side of zero pixels")
        if width * height > MAX_PIXELS:
            raise ValueError(f"{option} {text}: '{part}' exceeds the maximum of 4096 x 4096 pixels")
        check_sides(height, width, named=f"{option} {text}")
        sizes.append((height, width))
    return sizes if repeats else _distinct(sizes)


def check_sides(height: int, width: int, *, named: str) -> None:
    """Raise ValueError, which begins with `named`, if a side has more pixels than an image may have."""
    for side, pixels in (("width", width), ("height", height)):
        if pixels > MAX_SIDE:
            raise ValueError(f"{named}: {side} {pixels}: must be from 1 to {MAX_SIDE} pixels")


def parse_steps(text: str, *, repeats: bool = False) -> list[int]:
    """`"1,2,4,8"` → [1, 2, 4, 8]. repeats: keep a number that comes twice.

    Raises:
        ValueError: a value is not a whole number, or below 1.
    """
    steps = []
    for part in _parts(text):
        if not re.fullmatch(r"[+-]?\d+", part, re.ASCII):
            raise ValueError(f"--steps {text}: '{part}' is not a whole number; write for example --steps 1,2,4,8")
        if int(part) < 1:
            raise ValueError(f"--steps {text}: sampling needs at least 1 step, not {int(part)}")
        steps.append(int(part))
    return steps if repeats else _distinct(steps)


def parse_scales(text: str, *, repeats: bool = False) -> list[float]:
    """`"1,2.5"` → [1.0, 2.5]: guidance scales. repeats: keep a scale that comes twice.

    Raises:
        ValueError: a value is not a finite number of at least 0.
    """
    try:
        scales = [float(part) for part in _parts(text)]
    except ValueError:
        scales = [math.nan]
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        raise ValueError(f"--guidance {text}: expected finite numbers of at least 0 (1: no guidance); write for example --guidance 1,2.5")
    return scales if repeats else _distinct(scales)


def parse_seeds(text: str, *, repeats: bool = False) -> list[int]:
    """`"0,7"` → [0, 7]. repeats: keep a seed that comes twice.

    Raises:
        ValueError: a value is not a whole number, or negative.
    """
    parts = _parts(text)
    if not all(re.fullmatch(r"\d{1,20}", part, re.ASCII) for part in parts):
        raise ValueError(f"--seed {text}: expected whole numbers of at least 0; write for example --seed 0,1,2")
    seeds = [int(part) for part in parts]
    return seeds if repeats else _distinct(seeds)


def parse_borders(text: str) -> tuple[int, int, int, int]:
    """`"64,0,64,0"` → pixels at the left, top, right and bottom.

    Raises:
        ValueError: not four whole numbers of at least 0.
    """
    parts = _parts(text)
    if len(parts) != 4 or not all(re.fullmatch(r"\d{1,6}", part, re.ASCII) for part in parts):
        raise ValueError(f"--extend {text}: expected pixels at the left, top, right and bottom; write for example --extend 64,0,64,0")
    left, top, right, bottom = (int(part) for part in parts)
    return left, top, right, bottom


def parse_times(text: str) -> list[float]:
    """`"1,0.6,0"` → [1.0, 0.6, 0.0]. The sampler checks them against the transport.

    Raises:
        ValueError: fewer than two numbers, or not decreasing.
    """
    times = _numbers(text, option="--times", example="1,0.6,0")
    if len(times) < 2 or times != sorted(set(times), reverse=True):
        raise ValueError(f"--times {text}: expected two or more decreasing numbers")
    return times


def parse_interval(text: str) -> tuple[float, float]:
    """`"0.2,0.7"` → (0.2, 0.7), as shares of the noisiest time.

    Raises:
        ValueError: not two increasing numbers in [0, 1].
    """
    ends = _numbers(text, option="--interval", example="0.2,0.7")
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        raise ValueError(
            f"--interval {text}: expected two numbers from 0 to 1, the smaller one first; write for example --interval 0.2,0.7"
        )
    return ends[0], ends[1]


def parse_part(text: str) -> tuple[int, int]:
    """`"3/16"` → (3, 16): part 3 of 16.

    Raises:
        ValueError: invalid syntax, or K is not in 1 … N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {text}: expected K/N with K from 1 to N, for example --part 3/16")
    return int(match[1]), int(match[2])


def check_prompts(prompts: Sequence[str], *, classes: Sequence[int]) -> Sequence[str | int]:
    """Return the given prompts: texts or classes.

    Raises:
        ValueError: neither, or both.
    """
    if bool(prompts) == bool(classes):
        given = "both were given" if prompts else "neither was given"
        raise ValueError(f"expected a PROMPT or --prompt TEXT, or --class ID for a class model: {given}")
    return prompts or classes


def _numbers(text: str, *, option: str, example: str) -> list[float]:
    try:
        numbers = [float(part) for part in _parts(text)]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{option} {text}: expected numbers; write for example {option} {example}")
    return numbers


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _distinct(values: list[T]) -> list[T]:
    return list(dict.fromkeys(values))
