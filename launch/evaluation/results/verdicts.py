"""Whether quality rises with every step, and which of two models is better, within intervals.

Both are paired: the images of two settings or models belong to the same samples and start from the same noise, so what differs between
samples cancels in the difference of two numbers. Intervals of single numbers may overlap where the difference is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from launch.evaluation.results.resampling import Measurement
from launch.evaluation.results.rows import Measure, better_of, title_of
from launch.evaluation.store import Setting
from launch.text_tables import count
from tim.metrics.intervals import LEVEL

Outcome = Literal["better", "worse", "unclear"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A number minus that of `first`, with its interval: of another setting (steps), or of another model. outcome: of the second."""

    metric: str
    features: str
    guidance: float
    first: int
    second: int
    value: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Verdict:
    """What more steps do to a metric at a guidance scale, in a line. outcome: rises or falls in quality with every step, or neither."""

    metric: str
    features: str
    guidance: float
    text: str
    outcome: Literal["better with every step", "worse somewhere", "unclear"]
    differences: tuple[Difference, ...]


def difference_of(measure: Measure, before: Setting, one: Measurement, after: Setting, other: Measurement) -> Difference:
    """What is measured of `other` images minus that of `one`, of the same samples."""
    found = other.minus(one)
    sign = -1 if better_of(measure[0]) == "lower" else 1
    low, high = sorted((sign * found.low, sign * found.high))
    outcome: Outcome = "better" if low > 0 else "worse" if high < 0 else "unclear"
    return Difference(*measure, after.guidance, before.steps, after.steps, found.value, found.low, found.high, outcome)


def verdicts_of(measured: Mapping[Measure, Mapping[Setting, Measurement]]) -> list[Verdict]:
    """A verdict for each metric and guidance scale; none for a single number of steps. measured: of all images."""
    verdicts = []
    for measure, by_setting in measured.items():
        guidances = list(dict.fromkeys(setting.guidance for setting in by_setting))
        for guidance in guidances:
            settings = sorted(setting for setting in by_setting if setting.guidance == guidance)
            pairs = [difference_of(measure, one, by_setting[one], other, by_setting[other]) for one, other in pairwise(settings)]
            name = title_of(*measure) + (f" with guidance {guidance:g}" if len(guidances) > 1 else "")
            if pairs:
                verdicts.append(_verdict(pairs, name=name))
    return verdicts


def _verdict(differences: Sequence[Difference], *, name: str) -> Verdict:
    """differences: of one metric and guidance, by steps."""
    one = differences[0]
    worse, unclear = ([each for each in differences if each.outcome == outcome] for outcome in ("worse", "unclear"))
    whole = f"from {one.first} to {differences[-1].second}"
    if worse:
        verb, where = "rises" if worse[0].value > 0 else "falls", f"{_ranges(worse)} steps"
        if len(worse) == len(differences) > 1:
            where = f"with every step {whole}"
        outcome, text = "worse somewhere", f"{name} {verb} {where}, which is worse"
    elif unclear:
        some = "better with more steps, but " if len(unclear) < len(differences) else ""
        outcome, text = "unclear", f"{name}: {some}no difference within the {LEVEL:.0%} interval {_ranges(unclear)} steps"
    else:
        verb = "rises" if one.value > 0 else "falls"
        outcome, text = "better with every step", f"{name} {verb} with every step {whole}, within {LEVEL:.0%} intervals"
    return Verdict(one.metric, one.features, one.guidance, text, outcome, tuple(differences))


def _ranges(differences: Sequence[Difference]) -> str:
    """Such as "from 1 to 2, from 2 to 4 and from 4 to 8"."""
    *others, last = [f"from {each.first} to {each.second}" for each in differences]
    return f"{', '.join(others)} and {last}" if others else last


def summary_of(verdicts: Sequence[Verdict]) -> str | None:
    """Whether quality rises with every step, in one line; None without verdicts. A metric counts once, whatever the guidance scales."""
    if not verdicts:
        return None
    steps = [each for verdict in verdicts for each in verdict.differences]
    whole = f"from {min(each.first for each in steps)} to {max(each.second for each in steps)}"
    outcomes: dict[Measure, set[str]] = {}
    for verdict in verdicts:
        outcomes.setdefault((verdict.metric, verdict.features), set()).add(verdict.outcome)
    worse = sum("worse somewhere" in each for each in outcomes.values())
    rising = sum(each == {"better with every step"} for each in outcomes.values())
    within, number = f"within {LEVEL:.0%} intervals", len(outcomes)
    metrics = count(number, "metric")
    if worse:
        return f"Quality does not rise with every step {whole}: {worse} of {metrics} get{'s' * (worse == 1)} worse somewhere."
    if rising == number:
        return f"Quality rises with every step {whole}, by every metric, {within}."
    if not rising:
        return f"No metric gets worse {whole} steps, but none gets better with every step, {within}."
    return f"Quality rises with every step {whole} by {rising} of {metrics}; no metric gets worse, {within}."
