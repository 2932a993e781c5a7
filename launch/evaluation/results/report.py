"""The result of an evaluation: computed from what was measured, and written beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from launch.console import Console
from launch.evaluation.bins import ALL, bins_of
from launch.evaluation.job import Evaluated
from launch.evaluation.options import EvalOptions
from launch.evaluation.results.memorised import memorised, memorised_line
from launch.evaluation.results.plot import plot
from launch.evaluation.results.reference import reference_rows
from launch.evaluation.results.rows import Measurements, Row, measure, rows_of, title_of, warnings_of
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
    all_real = evaluated.real()
    real = {name: features[: len(samples)] for name, features in all_real.features.items()}
    generated = {setting: evaluated.generated(setting) for setting in evaluated.settings}
    with console.progress() as progress:
        measurements = measure(real, generated, distances=distances, bins=bins, resamples=options.resamples, report=progress)
    rows, verdicts = rows_of(measurements), verdicts_of(measurements[ALL])
    reference = reference_rows(all_real, count=len(samples), distances=distances, bins=bins, resamples=options.resamples)
    warnings = [*warnings_of(rows, bins=bins), *_without_score(evaluated.scorers.scores, measurements)]
    found = memorised(evaluated) if options.memorised else None
    summary = summary_of(verdicts)
    lines = [*([summary] if summary else []), *([memorised_line(found)] if found else [])]
    data = {
        **facts(evaluated, options),
        "rows": [asdict(row) for row in rows],
        "reference": [asdict(row) for row in reference],
        "warnings": warnings,
        "summary": summary,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "memorised": found,
    }
    files = {name: str(folder / name) for name in ("eval.json", "eval.md", "eval.png", "grid.png")}
    plot(rows, real=reference, out=folder / "eval.png")
    _write_grid(samples[:GRID_ROWS], evaluated, out=folder / "grid.png", titles=column_titles(rows))
    publish_text(folder / "eval.md", _markdown(data, rows, verdicts, real=reference, lines=lines))
    publish_text(folder / "eval.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    text = _screen(data, rows, verdicts, real=reference, lines=lines, files=list(files.values()))
    return Report(text, {**data, "files": files}, measurements)


def facts(evaluated: Evaluated, options: EvalOptions) -> dict[str, Any]:
    """What was evaluated, as plain JSON."""
    model, scorers = evaluated.facts, evaluated.scorers
    clip = () if scorers.clip is None else (scorers.clip,)
    return {
        "format": FORMAT,
        "model": {"path": model.name, "digest": model.digest, "loras": [asdict(lora) for lora in model.loras]},
        "machine": {"device": model.device, "dtype": model.dtype, "tim": version("tim"), "torch": version("torch")},
        "corpus": {"path": options.corpus, "digest": evaluated.corpus.digest},
        "images": len(evaluated.samples),
        "max_pixels": options.max_pixels,
        "seed": options.seed,
        "resamples": options.resamples,
        "steps": list(dict.fromkeys(setting.steps for setting in evaluated.settings)),
        "guidance": list(dict.fromkeys(setting.guidance for setting in evaluated.settings)),
        "features": {each.name: each.preprocessing for each in scorers.extractors},
        "extractors": {each.name: each.digest for each in (*scorers.extractors, *clip)},
        "clip": scorers.clip.name if scorers.clip is not None else None,
    }


def _without_score(scores: Sequence[str], measurements: Measurements) -> list[str]:
    """Which scores have no number, because too few images have one."""
    return [f"{title_of(name)}: left out, fewer than two images have it" for name in scores if (name, "") not in measurements[ALL]]


def _screen(
    data: dict[str, Any],
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    *,
    real: Sequence[Row],
    lines: Sequence[str],
    files: Sequence[str],
) -> str:
    title = f"{data['model']['path']}: {data['images']} images per column, with 95 % intervals"
    texts = [f"  {verdict.text}" for verdict in verdicts]
    warnings = [f"warning: {line}" for line in data["warnings"]]
    table = screen_table(rows, real=real, title=title)
    return "\n".join([table, "", *_about(data, real), *warnings, *lines[:1], *texts, *lines[1:], "", *files])


def _markdown(data: dict[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict], *, real: Sequence[Row], lines: Sequence[str]) -> str:
    about = f"{data['images']} images per number, of the samples of `{data['corpus']['path']}`, seed {data['seed']}, with 95 % intervals."
    points = [f"- {text}" for text in (*(verdict.text for verdict in verdicts), *(f"Warning: {line}" for line in data["warnings"]))]
    texts = ["\n".join([about, *_about(data, real)]), markdown_tables(rows, real=real), *lines, "\n".join(points)]
    parts = [f"# Evaluation of {data['model']['path']}", *texts]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _about(data: dict[str, Any], real: Sequence[Row]) -> list[str]:
    """What the column of the real images has, and the model of the CLIP score, without which it says nothing."""
    kinds = {
        "distances of as many other real images of the corpus": any(row.features for row in real),
        "scores of the real images": any(not row.features for row in real),
    }
    found = [kind for kind, is_there in kinds.items() if is_there]
    clip = [f"CLIP score: of {data['clip']}."] if data["clip"] else []
    return [*([f"real: {', and '.join(found)}."] if found else []), *clip]


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
