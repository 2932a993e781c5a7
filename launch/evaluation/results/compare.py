"""Two models on the same samples and noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launch.evaluation.bins import ALL
from launch.evaluation.job import Evaluated
from launch.evaluation.options import EvalOptions
from launch.evaluation.results.report import FORMAT, Report, facts
from launch.evaluation.results.rows import title_of
from launch.evaluation.results.tables import value_with_margin
from launch.evaluation.results.verdicts import Difference, difference_of
from pipeline.storage.atomic import publish_text


def compare(models: Sequence[Evaluated], reports: Sequence[Report], options: EvalOptions) -> tuple[str, dict[str, Any]]:
    """Difference of every metric, at each number of steps and guidance; writes compare.json and compare.md. Returns the text for the
    screen, and the JSON.

    The settings of both models are matched in order: without --guidance, each has its own scale.
    """
    (first, second), out = models, options.out
    one, other = (each.measured[ALL] for each in reports)
    settings = list(zip(first.settings, second.settings, strict=True))
    differences = [
        (before.guidance, difference_of(measure, before, one[measure][before], after, other[measure][after]))
        for measure in one
        for before, after in settings
        if measure in other
    ]
    lines = [_line(each, first_guidance=guidance) for guidance, each in differences]
    data = {
        "format": FORMAT,
        "models": [facts(each, options) for each in (first, second)],
        "differences": [{**asdict(each), "steps": each.second, "first_guidance": guidance} for guidance, each in differences],
    }
    header = f"B ({second.facts.name}) minus A ({first.facts.name}), with 95 % intervals of the paired difference"
    table = [
        "| metric | steps | guidance | B − A | better |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    publish_text(out / "compare.md", f"# {header}\n\n" + "\n".join(table) + "\n")
    publish_text(out / "compare.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    text = [f"{metric}, {steps} steps, guidance {guidance}: {value}, {better}" for metric, steps, guidance, value, better in lines]
    return "\n".join([header, *text, "", str(out / "compare.md")]), data


def _line(difference: Difference, *, first_guidance: float) -> tuple[str, str, str, str, str]:
    better = {"better": "B is better", "worse": "A is better", "unclear": "no difference within the interval"}[difference.outcome]
    value = value_with_margin(difference.value, difference.low, difference.high)
    guidance = " and ".join(f"{each:g}" for each in dict.fromkeys((first_guidance, difference.guidance)))
    return title_of(difference.metric, difference.features), str(difference.second), guidance, value, better
