"""The frame of benchmarks beside other tools: all take turns, of each the best turn counts, and whoever fails is named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from pipeline.progress import Progress

Rates = dict[str, dict[str, float]]  # what was measured → by whom → how many a second
OURS, BOUND = "tim", "bare decoder"


def run_interleaved(
    runs: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, missing: dict[str, str], progress: Progress
) -> Rates:
    """The highest rates of each run by its name; `missing` gets the reason of one that raises ChildProcessError."""
    best: dict[str, dict[str, float]] = defaultdict(dict)
    for turn in range(repeats):
        for position, (name, run) in enumerate(runs.items()):
            progress("measuring", turn * len(runs) + position, repeats * len(runs))
            try:
                for what, rate in run().items():
                    best[what][name] = max(best[what].get(name, 0.0), rate)
            except ChildProcessError as error:
                missing[name] = str(error)
    return best


def compare(best: Rates, *, others: Collection[str]) -> dict[str, float]:
    """Our rates beside the bare decoder's, and beside the best of the `others`."""
    found: dict[str, float] = {}
    for what, rates in best.items():
        suffix = "" if what == "images_per_second" else "_by_cpu_second"
        found[f"share_of_bare_decoder{suffix}"] = rates[OURS] / rates[BOUND]
        theirs = [rate for name, rate in rates.items() if name in others]
        if theirs:
            found[f"tim_over_best_other{suffix}"] = rates[OURS] / max(theirs)
    return found
