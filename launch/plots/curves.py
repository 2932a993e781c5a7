"""Read curves from the metrics of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launch.checkpoints.evaluation_results import PREFIX, STEP
from launch.checkpoints.run_folder import METRICS
from launch.training.metrics import read_rows

EVALUATIONS = "eval"  # stands for all columns of evaluations
Axis = Literal["step", "images", "hours"]
Row = Mapping[str, Any]

_SMOOTHED = 60  # standard deviations of the smoothing in a curve


@dataclass(frozen=True, slots=True)
class Points:
    """Points of a column, in the order of steps."""

    x: list[float]
    y: list[float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A column of a run. validation: the same loss on held-out images, of the weights and of their EMA; restarts: where it was resumed."""

    run: str
    column: str
    points: Points
    validation: dict[str, Points]
    restarts: list[float]

    @property
    def is_validation(self) -> bool:
        return self.column.startswith("validation_")

    def to_json(self) -> dict[str, Any]:
        y = self.points.y
        measured = {weights: {"points": len(points.x), "last": points.y[-1]} for weights, points in self.validation.items()}
        figures = {"points": len(y), "last": y[-1], "least": min(y), "most": max(y)} if y else {"points": 0}
        return {"run": self.run, "column": self.column, **figures, "validation": measured, "restarts": self.restarts}


def read_curves(runs: Sequence[Path], *, columns: Sequence[str], axis: Axis) -> dict[str, list[Curve]]:
    """Curves by column, one for each run.

    Raises ValueError if a folder has no metrics, or no run has numbers in a column; it names the columns that there are.
    """
    rows = {name: _rows(run) for name, run in zip(_names(runs), runs, strict=True)}
    known = sorted({name for of_run in rows.values() for row in of_run for name, value in row.items() if _is_number(value)})
    found = [name for column in columns for name in (_of_evaluations(known) if column == EVALUATIONS else [column])]
    for column in found or columns:
        if column not in known:
            raise ValueError(f"--what {column}: no run has numbers in such a column; there are: {', '.join(known)}")
    return {column: [_curve(of_run, run=name, column=column, axis=axis) for name, of_run in rows.items()] for column in found}


def _of_evaluations(known: Sequence[str]) -> list[str]:
    return [name for name in known if name.startswith(PREFIX) and name != STEP]


def smoothed(values: Sequence[float]) -> list[float]:
    """Average over neighbours on both sides, with Gaussian weights. Few values are returned as they are."""
    deviation = len(values) / _SMOOTHED
    if deviation < 1:
        return list(values)
    reach = int(3 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    sums, totals = (np.convolve(each, weights)[reach:-reach] for each in (np.asarray(values), np.ones(len(values))))
    return (sums / totals).tolist()


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{run}: has no {METRICS}; give the run_dir of a training run that has logged a step")
    try:
        return sorted(read_rows(path), key=lambda row: row["step"])  # rows of evaluations come late
    except ValueError as error:
        raise ValueError(f"{path}: not lines of JSON: {error}") from error


def _curve(rows: Sequence[Row], *, run: str, column: str, axis: Axis) -> Curve:
    named = {"weights": f"validation_{column}", "EMA": f"validation_{column}_ema"}
    validation = {weights: points for weights, name in named.items() if (points := _points(rows, name, axis=axis)).x}
    return Curve(run, column, _points(rows, column, axis=axis), validation, list(_restarts(rows, axis=axis)))


def _points(rows: Sequence[Row], column: str, *, axis: Axis) -> Points:
    found = [(_position(row, axis), float(row[column])) for row in rows if _is_number(row.get(column))]
    return Points([x for x, _ in found], [y for _, y in found])


def _restarts(rows: Sequence[Row], *, axis: Axis) -> Iterator[float]:
    """Positions of the last rows before a restart."""
    for before, row in pairwise(rows):
        if row.get("restarts", 0) > before.get("restarts", 0):
            yield _position(before, axis)


def _position(row: Row, axis: Axis) -> float:
    return row["seconds"] / 3600 if axis == "hours" else float(row[axis])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names(runs: Sequence[Path]) -> list[str]:
    """Names of the run folders; their paths if two have the same name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
