"""Run benchmarks of several tools interleaved: the best run of each counts, and failures are recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from pipeline.progress import Progress

Rates = dict[str, dict[str, float]]  # metric → tool → rate per second
OURS, BOUND = "tim", "bare decoder"


def run_interleaved(
    runs: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, missing: dict[str, str], progress: Progress
) -> Rates:
    """Highest rates of each tool. Adds the reason to `missing` if a run raises ChildProcessError."""
    best: dict[str, dict[str, float]] = defaultdict(dict)
    for turn in range(repeats):
        for position, (name, run) in enumerate(runs.items()):
            progress("measuring", turn * len(runs) + position, repeats * len(runs))
            try:
                for metric, rate in run().items():
                    best[metric][name] = max(best[metric].get(name, 0.0), rate)
            except ChildProcessError as error:
                missing[name] = str(error)
    return best


def relative_rates(best: Rates, *, others: Collection[str]) -> dict[str, float]:
    """Our rates relative to the bare decoder and to the best of the `others`."""
    ratios: dict[str, float] = {}
    for metric, rates in best.items():
        suffix = "" if metric == "images_per_second" else "_by_cpu_second"
        ratios[f"share_of_bare_decoder{suffix}"] = rates[OURS] / rates[BOUND]
        theirs = [rate for name, rate in rates.items() if name in others]
        if theirs:
            ratios[f"tim_over_best_other{suffix}"] = rates[OURS] / max(theirs)
    return ratios
