"""Names of the averaged weights in a checkpoint: `ema` is the first, `ema-0.9999` another one. Their decays are in trainer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FIRST = "ema"


def average_kinds(decays: Sequence[float]) -> list[str]:
    """Kinds of fragment files of the averages with these decays."""
    return [FIRST, *(f"{FIRST}-{decay:g}" for decay in decays[1:])]


def saved_decays(folder: Path) -> list[float]:
    """Decays of a checkpoint's averages, in order. Empty if it was written by a version that stored one average without its decay."""
    state = folder / "trainer.json"
    return json.loads(state.read_text(encoding="utf-8")).get("ema", []) if state.is_file() else []


def weights_in_words(folder: Path, ema: bool | float) -> str:
    """Which weights `kind_of` reads, for model cards."""
    if ema is False:
        return "weights"
    decay = next(iter(saved_decays(folder)), None) if ema is True else ema
    return "averaged weights" if decay is None else f"averaged weights (decay {decay:g})"


def kind_of(folder: Path, ema: bool | float) -> str:
    """Kind of the weights to read: the latest (`ema` false), the first average (true), or that of a decay.

    Raises ValueError listing the decays that the checkpoint has.
    """
    if isinstance(ema, bool):
        return FIRST if ema else "weights"
    decays = saved_decays(folder)
    if ema not in decays:
        known = ", ".join(f"{decay:g}" for decay in decays) or "one without its decay (leave --ema out)"
        raise ValueError(f"{folder}: no average with decay {ema:g}; available: {known}")
    return average_kinds(decays)[decays.index(ema)]
