"""Filters: named thresholds on the properties of one input. Rejections are counted by rule.

A rule is a line of `RULES` and a key of `FilterConfig`. A `min_` key sets a lower limit, a `max_` key an upper one; without a value the
rule is off and its property is not measured. Rules are applied in order, cheap ones first, and the first that fails gives the reason.
Scores and other columns of the sources are filtered by `where`.
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

_MEASURED_PIXELS = 1 << 20  # larger images are reduced by a whole factor first, so that thresholds mean the same for all


class FilterConfig(BaseModel):
    """Limits on inputs. Sizes are those of the upright image.

    `min_side` limits the shorter side, `max_side` the longer one; aspect = longer / shorter; bytes are those of the input file; of several
    captions, the first is measured, after cleaning. `min_sharpness`: variance of the Laplacian of the luma, in levels² (blurred photographs
    have less than about 50). `min_contrast`: standard deviation of the luma in levels of 255; a flat image has 0. `where`: names and
    expressions over the columns of the sources (`pipeline.corpus.row_filter`), such as {clip: similarity >= 0.28}. An input without a
    required column is rejected; a column that no source has is an error.
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
                raise ValueError(f"where: {name!r} is not a name for a filter: use letters, digits, - and _")
            if name in {rule.name for rule in RULES}:
                raise ValueError(f"where: {name} is the name of a built-in filter: choose another one")
            Where(expression)
        return where


@dataclass(slots=True)
class Subject:
    """An input to filter: the upright image (H, W, 3) uint8, its file size, its first caption, the extra columns of its source.

    `measured`: values that rules measured and that are stored in the table.
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
    """A threshold: its key in `FilterConfig`, the name and value of the limited property, its reason for rejection if it is not
    `filter:NAME`, and the table column for the measured value, if any."""

    key: str
    what: str
    of: Callable[[Subject], float]
    reason: str = ""
    column: str = ""

    @property
    def name(self) -> str:
        """The name in the reason `filter:NAME`."""
        return self.key.replace("_", "-")

    def rejection(self, subject: Subject, *, limit: float) -> tuple[str, str] | None:
        """(reason, detail) if the subject is rejected, None if it passes."""
        value = self.of(subject)
        if self.column:
            subject.measured[self.column] = value
        is_lower_limit = self.key.startswith("min_")
        if value >= limit if is_lower_limit else value <= limit:
            return None
        side = "below" if is_lower_limit else "above"
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
    """The rules that are on. `wanted`: name in `where` → columns that the sources must have."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        limits = ((rule, getattr(config, rule.key)) for rule in RULES)
        self._limits = [(rule, float(limit)) for rule, limit in limits if limit is not None]
        self._wheres = [(name, Where(expression)) for name, expression in config.where.items()]
        self.wanted = {name: set(where.columns) - {"height", "width", *where.optional} for name, where in self._wheres}

    def rejection(self, subject: Subject) -> tuple[str, str] | None:
        """(reason, detail) of the first rule that rejects the subject, None if it passes."""
        row = {"height": subject.height, "width": subject.width, **subject.extra}
        for name, where in self._wheres:
            values = {column: row.get(column) for column in where.columns}
            if not _holds(where, values):
                stated = ", ".join(f"{column} is {'missing' if value is None else value}" for column, value in values.items())
                return FILTER_PREFIX + name, f"{stated}: filters.where.{name} asks for {where.text}"
        return next((found for rule, limit in self._limits if (found := rule.rejection(subject, limit=limit))), None)


def _holds(where: Where, values: Mapping[str, Value]) -> bool:
    """Whether a row passes. Values of the wrong type are retried as numbers, which CSV files hold as text, or else as missing."""
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
    """Luma in whole levels; large images are reduced by a whole factor."""
    image = Image.fromarray(pixels)
    factor = int(np.ceil((image.width * image.height / _MEASURED_PIXELS) ** 0.5))
    return np.asarray((image.reduce(factor) if factor > 1 else image).convert("L")).astype(np.int64)


def _variance(values: NDArray[np.int64]) -> float:
    """Computed in integers, so that all machines give the same result."""
    count = values.size
    return (count * int((values * values).sum()) - int(values.sum()) ** 2) / count**2
