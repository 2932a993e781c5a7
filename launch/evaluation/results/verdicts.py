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
        for guidance in dict.fromkeys(setting.guidance for setting in by_setting):
            settings = sorted(setting for setting in by_setting if setting.guidance == guidance)
            pairs = [difference_of(measure, one, by_setting[one], other, by_setting[other]) for one, other in pairwise(settings)]
            if pairs:
                verdicts.append(_verdict(pairs))
    return verdicts


def _verdict(differences: Sequence[Difference]) -> Verdict:
    """differences: of one metric and guidance, by steps."""
    one = differences[0]
    metric = title_of(one.metric, one.features)
    worse, unclear = ([each for each in differences if each.outcome == outcome] for outcome in ("worse", "unclear"))
    whole = f"from {one.first} to {differences[-1].second}"
    if worse:
        verb = "rises" if worse[0].value > 0 else "falls"
        outcome, text = "worse somewhere", f"{metric} {verb} {_ranges(worse)} steps, which is worse"
    elif unclear:
        same = "no difference within" if len(unclear) == len(differences) else "better with more steps, but no difference within"
        outcome, text = "unclear", f"{metric}: {same} the {LEVEL:.0%} interval {_ranges(unclear)} steps"
    else:
        verb = "rises" if one.value > 0 else "falls"
        outcome, text = "better with every step", f"{metric} {verb} with every step {whole}, within {LEVEL:.0%} intervals"
    return Verdict(one.metric, one.features, one.guidance, text, outcome, tuple(differences))


def _ranges(differences: Sequence[Difference]) -> str:
    return " and ".join(f"from {each.first} to {each.second}" for each in differences)


def summary_of(verdicts: Sequence[Verdict]) -> str | None:
    """Whether quality rises with every step, in one line; None without verdicts."""
    if not verdicts:
        return None
    steps = [each for verdict in verdicts for each in verdict.differences]
    first, last = min(each.first for each in steps), max(each.second for each in steps)
    worse = [verdict for verdict in verdicts if verdict.outcome == "worse somewhere"]
    rising = [verdict for verdict in verdicts if verdict.outcome == "better with every step"]
    if worse:
        return f"Quality does not rise with every step from {first} to {last}: {len(worse)} of {len(verdicts)} metrics get worse somewhere."
    if len(rising) == len(verdicts):
        return f"Quality rises with every step from {first} to {last}, by every metric, within {LEVEL:.0%} intervals."
    number = "no metric" if not rising else f"{len(rising)} of {len(verdicts)} metrics"
    return f"Quality rises with every step from {first} to {last} by {number}; no metric gets worse, within {LEVEL:.0%} intervals."
