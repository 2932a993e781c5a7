"""Results of the evaluations of a run's checkpoints, which `launch.evaluating` makes: for metrics and model cards.

RUN/evaluations/step-000500/eval.json is written by `tim eval`. Rows of all images count here; those of size and aspect bins do not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EVALUATIONS, RESULT = "evaluations", "eval.json"
PREFIX = "eval/"  # of columns in metrics.jsonl
STEP = f"{PREFIX}step"  # column with the step of the evaluated weights
_ALL = "all"
_NEEDED = {"metric", "features", "steps", "value", "low", "high", "bin", "better", "images"}
_NUMBERS = ("steps", "value", "low", "high", "images")
_NO_NAME = re.compile(r"[^\w.-]+", re.ASCII)  # characters that MLflow does not take in the name of a metric


def evaluation_folder(run_dir: Path, step: int) -> Path:
    return run_dir / EVALUATIONS / f"step-{step:06d}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Rows of all images in an evaluation's folder; none if it is not finished or cannot be read."""
    try:
        rows = json.loads((folder / RESULT).read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if row.keys() >= _NEEDED and row["bin"] == _ALL and all(_is_number(row[name]) for name in _NUMBERS)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Values by column: `eval/frechet_pixels/steps4`, with the guidance scale if there are several."""
    several = len({row.get("guidance") for row in rows}) > 1
    return {f"{PREFIX}{_name(row)}/steps{row['steps']}{_scale(row) if several else ''}": row["value"] for row in rows}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line for each metric, a column for each number of steps, with 95 % intervals."""
    several = len({row.get("guidance") for row in rows}) > 1
    settings = list(dict.fromkeys((row["steps"], row.get("guidance")) for row in rows))
    cells: dict[str, dict[Any, str]] = {}
    for row in rows:
        features = f" ({row['features']})" if row["features"] else ""
        name = f"{row['metric']}{features}, {row['better']} is better"
        cells.setdefault(name, {})[row["steps"], row.get("guidance")] = f"{row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"
    titles = [f"{steps} step{'s' * (steps != 1)}{f', guidance {guidance:g}' if several else ''}" for steps, guidance in settings]
    lines = [f"| metric | {' | '.join(titles)} |", f"| --- |{' --- |' * len(titles)}"]
    return [*lines, *(f"| {name} | {' | '.join(of.get(setting, '') for setting in settings)} |" for name, of in cells.items())]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _name(row: Mapping[str, Any]) -> str:
    features = _NO_NAME.sub("-", str(row["features"])).strip("-")
    return f"{row['metric']}{f'_{features}' if features else ''}"


def _scale(row: Mapping[str, Any]) -> str:
    return f"-cfg{row['guidance']:g}" if row.get("guidance") is not None else ""
