"""Filters: small named rules on what one input is, each a threshold of the config, each counted by its own name.

A rule is a line of `RULES` and a key of `FilterConfig`. A key that begins with `min_` asks for at least so much, one with `max_` for at
most so much; without a value the rule is off, and what it would have measured is not measured. Rules are asked in their order, cheap ones
first, and the first that objects gives the reason. Scores and other columns that the sources bring are filtered by `where`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dataprep.row_schema import FILTER_PREFIX
from pipeline.corpus.record_fields import Value
from pipeline.corpus.row_filter import Where

_MEASURED_PIXELS = 1 << 20  # larger images are measured at a whole fraction of their sides, so that thresholds mean the same for all


class FilterConfig(BaseModel):
    """Limits, those of the upright image where it has sides.

    `side` is of the shorter one in `min_side` and of the longer one in `max_side`, aspect = longer / shorter, bytes are the input file's,
    captions are measured after cleaning, and of several the first. `min_sharpness`: variance of the Laplacian of the luma, in levels²
    (blurred photographs have less than about 50). `min_contrast`: standard deviation of the luma in levels of 255; a flat image has 0.
    `where`: names and expressions over the sources' columns (`pipeline.corpus.row_filter`), such as {clip: similarity >= 0.28}.
    An input that lacks a column that is asked for is rejected; one that no source has at all is taken for a mistake.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side: int = Field(default=16, ge=1)
    max_side: int | None = Field(default=None, ge=1)
    max_aspect: float = Field(default=8.0, ge=1.0)
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    min_bytes: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    min_caption_characters: int | None = Field(default=None, ge=1)
    max_caption_characters: int | None = Field(default=None, ge=1)
    min_caption_words: int | None = Field(default=None, ge=1)
    max_caption_words: int | None = Field(default=None, ge=1)
    min_contrast: float | None = Field(default=None, ge=0, le=128)
    min_sharpness: float | None = Field(default=None, ge=0)
    where: dict[str, str] = Field(default_factory=dict)

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: dict[str, str]) -> dict[str, str]:
        for name, expression in where.items():
            if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"where: {name!r} is no name for a filter: letters, digits, - and _ make one")
            if name in {rule.name for rule in RULES}:
                raise ValueError(f"where: {name} is the name of a filter that is there: choose another one")
            Where(expression)
        return where


@dataclass(slots=True)
class Subject:
    """One input under judgement: the upright image (H, W, 3) uint8, its file's size, its first caption, its source's further columns.

    `measured` collects what rules have measured of it that belongs into the table.
    """

    pixels: NDArray[np.uint8]
    bytes: int
    caption: str
    extra: Mapping[str, Value]
    measured: dict[str, float] = field(default_factory=dict)
    _luma: NDArray[np.int64] | None = None

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def luma(self) -> NDArray[np.int64]:
        if self._luma is None:
            self._luma = _measured_luma(self.pixels)
        return self._luma


@dataclass(frozen=True, slots=True)
class Rule:
    """A threshold: its key in `FilterConfig`, what it limits in words and as a number, its reason in `REASONS` if it has one, and
    the column of the tables that the measure goes into, if any."""

    key: str
    what: str
    of: Callable[[Subject], float]
    reason: str = ""
    column: str = ""

    @property
    def name(self) -> str:
        """What its rejections are counted as, after `filter:`."""
        return self.key.replace("_", "-")

    def objection(self, subject: Subject, *, limit: float) -> tuple[str, str] | None:
        """The (reason, detail) for which the subject is rejected, None if it passes."""
        value = self.of(subject)
        if self.column:
            subject.measured[self.column] = value
        is_least = self.key.startswith("min_")
        if value >= limit if is_least else value <= limit:
            return None
        side = "below" if is_least else "above"
        detail = f"{subject.width}x{subject.height}: {self.what} {value:.6g}, {side} filters.{self.key}={limit:.6g}"
        return self.reason or FILTER_PREFIX + self.name, detail


def aspect(subject: Subject) -> float:
    return max(subject.height, subject.width) / min(subject.height, subject.width)


def contrast(subject: Subject) -> float:
    """Standard deviation of the luma, in levels of 255."""
    return round(_variance(subject.luma) ** 0.5, 2)


def sharpness(subject: Subject) -> float:
    """Variance of the luma's Laplacian (4 neighbours), in levels²; 0 for images of fewer than 3 rows or columns."""
    luma = subject.luma
    if min(luma.shape) < 3:
        return 0.0
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return round(_variance(laplacian), 2)


RULES = (
    Rule("min_side", "shorter side", lambda subject: min(subject.height, subject.width), reason="too-small"),
    Rule("max_side", "longer side", lambda subject: max(subject.height, subject.width)),
    Rule("max_aspect", "aspect", aspect, reason="aspect"),
    Rule("min_pixels", "pixels", lambda subject: subject.height * subject.width),
    Rule("max_pixels", "pixels", lambda subject: subject.height * subject.width),
    Rule("min_bytes", "bytes", lambda subject: subject.bytes),
    Rule("max_bytes", "bytes", lambda subject: subject.bytes),
    Rule("min_caption_characters", "caption's characters", lambda subject: len(subject.caption)),
    Rule("max_caption_characters", "caption's characters", lambda subject: len(subject.caption)),
    Rule("min_caption_words", "caption's words", lambda subject: len(subject.caption.split())),
    Rule("max_caption_words", "caption's words", lambda subject: len(subject.caption.split())),
    Rule("min_contrast", "contrast", contrast, column="contrast"),
    Rule("min_sharpness", "sharpness", sharpness, column="sharpness"),
)


class Filters:
    """The rules that a config switches on. `wanted`: by name in `where`, the columns that sources must bring."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        limits = ((rule, getattr(config, rule.key)) for rule in RULES)
        self._limits = [(rule, float(limit)) for rule, limit in limits if limit is not None]
        self._wheres = [(name, Where(expression)) for name, expression in config.where.items()]
        self.wanted = {name: set(where.columns) - {"height", "width", *where.optional} for name, where in self._wheres}

    def rejection(self, subject: Subject) -> tuple[str, str] | None:
        """The (reason, detail) of the first rule that objects, None if none does."""
        told = {"height": subject.height, "width": subject.width, **subject.extra}
        for name, where in self._wheres:
            values = {column: told.get(column) for column in where.columns}
            if not _holds(where, values):
                said = ", ".join(f"{column} is {'missing' if value is None else value}" for column, value in values.items())
                return FILTER_PREFIX + name, f"{said}: filters.where.{name} asks for {where.text}"
        return next((found for rule, limit in self._limits if (found := rule.objection(subject, limit=limit))), None)


def _holds(where: Where, values: Mapping[str, Value]) -> bool:
    """Of one row; what does not fit the expression's types as it is may be a number in a text, as CSV files have them, or is unknown."""
    for row in (values, {name: _number(value) for name, value in values.items()}):
        with suppress(ValueError):
            return bool(where.rows(_one_row(row))[0])
    return False


def _number(value: Value) -> Value:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _one_row(values: Mapping[str, Value]) -> pa.Table:
    columns = {}
    for name, value in values.items():
        if isinstance(value, (int, float, bool, type(None))):
            columns[name] = pa.array([value], pa.bool_() if isinstance(value, bool) else pa.float64())
        else:
            columns[name] = pa.array([value if isinstance(value, str) else json.dumps(value)])
    return pa.table(columns)


def _measured_luma(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Luma in whole levels, of large images at a whole fraction of their sides."""
    image = Image.fromarray(pixels)
    factor = int(np.ceil((image.width * image.height / _MEASURED_PIXELS) ** 0.5))
    return np.asarray((image.reduce(factor) if factor > 1 else image).convert("L")).astype(np.int64)


def _variance(values: NDArray[np.int64]) -> float:
    """Summed in whole numbers, so that every machine finds the same."""
    count = values.size
    return (count * int((values * values).sum()) - int(values.sum()) ** 2) / count**2
