"""The result of an evaluation: computed from what was measured, and written beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from launch.console import Console
from launch.evaluation.bins import ALL, bins_of
from launch.evaluation.job import Evaluated
from launch.evaluation.options import EvalOptions
from launch.evaluation.results.memorised import memorised, memorised_line
from launch.evaluation.results.plot import plot
from launch.evaluation.results.rows import Measurements, Row, measure, rows_of, warnings_of
from launch.evaluation.results.tables import column_titles, markdown_tables, screen_table
from launch.evaluation.results.verdicts import Verdict, summary_of, verdicts_of
from launch.evaluation.samples import Sample, real_images
from launch.evaluation.store import GRID_ROWS
from launch.sampling.image_grid import grid
from pipeline.storage.atomic import publish, publish_text
from pipeline.storage.shard_reader import ShardReader

FORMAT = 1


class Report(NamedTuple):
    """text: for the screen; data: the JSON; measured: all numbers by bin."""

    text: str
    data: dict[str, Any]
    measured: Measurements


def report(evaluated: Evaluated, options: EvalOptions, *, console: Console) -> Report:
    """Compute all numbers, and write eval.json, eval.md, eval.png and grid.png.

    Raises OSError if a file cannot be written.
    """
    folder, samples = evaluated.store.folder, evaluated.samples
    bins = bins_of(samples)
    distances = evaluated.scorers.distances
    real = {name: features[: len(samples)] for name, features in evaluated.real().features.items()}
    generated = {setting: evaluated.generated(setting) for setting in evaluated.settings}
    with console.progress() as progress:
        measurements = measure(real, generated, distances=distances, bins=bins, resamples=options.resamples, report=progress)
    rows, verdicts = rows_of(measurements), verdicts_of(measurements[ALL])
    warnings = warnings_of(rows, bins=bins)
    found = memorised(evaluated) if options.memorised else None
    summary = summary_of(verdicts)
    lines = [*([summary] if summary else []), *([memorised_line(found)] if found else [])]
    data = {
        **facts(evaluated, options),
        "rows": [asdict(row) for row in rows],
        "warnings": warnings,
        "summary": summary,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "memorised": found,
    }
    files = {name: str(folder / name) for name in ("eval.json", "eval.md", "eval.png", "grid.png")}
    plot(rows, out=folder / "eval.png")
    _write_grid(samples[:GRID_ROWS], evaluated, out=folder / "grid.png", titles=column_titles(rows))
    publish_text(folder / "eval.md", _markdown(data, rows, verdicts, lines=lines))
    publish_text(folder / "eval.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    text = _screen(data, rows, verdicts, lines=lines, files=list(files.values()))
    return Report(text, {**data, "files": files}, measurements)


def facts(evaluated: Evaluated, options: EvalOptions) -> dict[str, Any]:
    """What was evaluated, as plain JSON."""
    return {
        "format": FORMAT,
        "model": {"path": evaluated.facts.name, "digest": evaluated.facts.digest},
        "corpus": {"path": options.corpus, "digest": evaluated.corpus.digest},
        "images": len(evaluated.samples),
        "seed": options.seed,
        "steps": list(dict.fromkeys(setting.steps for setting in evaluated.settings)),
        "guidance": list(dict.fromkeys(setting.guidance for setting in evaluated.settings)),
        "features": {each.name: each.preprocessing for each in evaluated.scorers.extractors},
    }


def _screen(data: dict[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict], *, lines: Sequence[str], files: Sequence[str]) -> str:
    title = f"{data['model']['path']}: {data['images']} images per column, with 95 % intervals"
    texts = [f"  {verdict.text}" for verdict in verdicts]
    warnings = [f"warning: {line}" for line in data["warnings"]]
    return "\n".join([screen_table(rows, title=title), "", *warnings, *lines[:1], *texts, *lines[1:], "", *files])


def _markdown(data: dict[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict], *, lines: Sequence[str]) -> str:
    about = f"{data['images']} images per number, of the samples of `{data['corpus']['path']}`, seed {data['seed']}, with 95 % intervals."
    points = [f"- {text}" for text in (*(verdict.text for verdict in verdicts), *(f"Warning: {line}" for line in data["warnings"]))]
    parts = [f"# Evaluation of {data['model']['path']}", about, markdown_tables(rows), *lines, "\n".join(points)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _write_grid(samples: Sequence[Sample], evaluated: Evaluated, *, out: Path, titles: Sequence[str]) -> None:
    """Rows: the first samples; columns: the real image, and each setting."""
    reader = ShardReader()
    rows: list[list[Image.Image]] = [[image] for image in real_images(samples, reader=reader)]
    reader.close()
    for setting in evaluated.settings:
        for index, row in enumerate(rows):
            with Image.open(evaluated.store.image(setting.name, index)) as image:
                row.append(image.convert("RGB"))
    labels = [f"{sample.width}x{sample.height}: {sample.prompt}" for sample in samples]
    with publish(out) as stream:
        grid(rows, row_labels=labels, column_labels=["real", *titles]).save(stream, format="PNG")
