"""What people type, read: overrides among positional arguments, sizes, lists of step counts, guidance."""

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
MAX_PIXELS = 4096 * 4096


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(positional arguments, overrides). `a.b=c` is an override, unless a file or folder has exactly this name."""
    overrides = [argument for argument in arguments if OVERRIDE.match(argument) and not Path(argument).exists()]
    return [argument for argument in arguments if argument not in overrides], overrides


def split_sources(arguments: Sequence[str], *, settings: Collection[str]) -> tuple[list[str], list[str]]:
    """(sources, overrides): of `NAME=VALUE` without a dot, a name of the settings begins an override, every other one a source's path."""
    positional, overrides = split_overrides(arguments)
    named = [override for override in overrides if "." not in override.partition("=")[0] and override.partition("=")[0] not in settings]
    sources = [argument for argument in arguments if argument in positional or argument in named]
    return sources, [override for override in overrides if override not in named]


def one_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(config file or recipe, overrides) of a command that takes `CONFIG [KEY=VALUE …]`.

    Raises:
        ValueError: no config, or more than one.
    """
    return _one(arguments, what="CONFIG (a YAML file, or a name that `tim recipes` lists) and KEY=VALUE overrides")


def one_corpus(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(corpus, overrides) of a command that takes `CORPUS [KEY=VALUE …]`.

    Raises:
        ValueError: no corpus, or more than one.
    """
    return _one(arguments, what="CORPUS (a folder or URL that `tim prepare` or `tim index` wrote) and KEY=VALUE settings")


def _one(arguments: Sequence[str], *, what: str) -> tuple[str, list[str]]:
    positional, overrides = split_overrides(arguments)
    if len(positional) != 1:
        got = "nothing of the kind was given" if not positional else "got " + " ".join(positional)
        raise ValueError(f"expected one {what}: {got}")
    return positional[0], overrides


def one_of(value: str, *, option: str, known: tuple[Choice, ...]) -> Choice:
    """The one of the `known` values that an option was given.

    Raises:
        ValueError: it is none of them.
    """
    for choice in known:
        if choice == value:
            return choice
    raise ValueError(f"{option} {value}: expected {', '.join(known[:-1])} or {known[-1]}")


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`"512x128,256x256"` (width × height, as people say it) → [(128, 512), (256, 256)] (height, width), in pixels.

    Raises:
        ValueError: anything else, an empty side, or more than 4096² pixels.
    """
    sizes = []
    for part in _parts(text):
        match = SIZE.fullmatch(part)
        if match is None:
            raise ValueError(f"--size {text}: '{part}' is not WIDTHxHEIGHT; write for example --size 512x128,256x256")
        width, height = int(match[1]), int(match[2])
        if not width or not height:
            raise ValueError(f"--size {text}: '{part}' has a side of zero pixels")
        if width * height > MAX_PIXELS:
            raise ValueError(f"--size {text}: '{part}' has more than 4096 x 4096 pixels, the most that is supported")
        sizes.append((height, width))
    return _distinct(sizes)


def parse_steps(text: str) -> list[int]:
    """`"1,2,4,8"` → [1, 2, 4, 8].

    Raises:
        ValueError: no whole numbers, or one below 1.
    """
    steps = []
    for part in _parts(text):
        if not re.fullmatch(r"[+-]?\d+", part, re.ASCII):
            raise ValueError(f"--steps {text}: '{part}' is not a whole number; write for example --steps 1,2,4,8")
        if int(part) < 1:
            raise ValueError(f"--steps {text}: sampling needs at least 1 step, not {int(part)}")
        steps.append(int(part))
    return _distinct(steps)


def parse_times(text: str) -> list[float]:
    """`"1,0.6,0"` → [1.0, 0.6, 0.0]; what the transport makes of them is the sampler's to say.

    Raises:
        ValueError: fewer than two numbers, or not falling.
    """
    times = _numbers(text, option="--times", example="1,0.6,0")
    if len(times) < 2 or times != sorted(set(times), reverse=True):
        raise ValueError(f"--times {text}: two numbers or more are needed, each smaller than the one before")
    return times


def parse_interval(text: str) -> tuple[float, float]:
    """`"0.2,0.7"` → (0.2, 0.7), shares of the noisiest time.

    Raises:
        ValueError: not two numbers in [0, 1] that rise.
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
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {text}: expected K/N with K from 1 to N, for example --part 3/16")
    return int(match[1]), int(match[2])


def check_guidance(guidance: float) -> float:
    """A finite guidance scale of at least 0 (1 is no guidance).

    Raises:
        ValueError: anything else.
    """
    if not math.isfinite(guidance) or guidance < 0:
        raise ValueError(f"--guidance {guidance}: expected a finite number of at least 0 (1 is no guidance)")
    return guidance


def check_prompts(prompts: Sequence[str], *, classes: Sequence[int]) -> Sequence[str | int]:
    """What to draw: texts or classes, whichever were given.

    Raises:
        ValueError: none of them, or both.
    """
    if bool(prompts) == bool(classes):
        given = "both were given" if prompts else "neither was given"
        raise ValueError(f"expected --prompt TEXT, or --class ID for a model of classes: {given}")
    return prompts or classes


def round_sizes(sizes: Sequence[tuple[int, int]], *, stride: int) -> tuple[list[tuple[int, int]], list[str]]:
    """(Sizes with each side rounded down to a multiple of `stride`, one remark for each that changed). Heights first.

    Raises:
        ValueError: a side is shorter than the stride.
    """
    rounded, remarks = [], []
    for height, width in sizes:
        if min(height, width) < stride:
            raise ValueError(f"--size {width}x{height}: this model draws in squares of {stride} pixels, so no side can be shorter")
        size = height // stride * stride, width // stride * stride
        if size != (height, width):
            remarks.append(f"size {width}x{height} rounded down to {size[1]}x{size[0]}, multiples of this model's {stride} pixels")
        rounded.append(size)
    return _distinct(rounded), remarks


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
