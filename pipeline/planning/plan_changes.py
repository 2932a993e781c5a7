"""Differences between the inputs of a plan and those of a saved plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.streams.corpus_view import CorpusView


@dataclass(frozen=True, slots=True)
class PlanChange:
    """One difference: the input (`plan.max_tokens`, `corpus photos`), and a description of the change."""

    key: str
    description: str

    def __str__(self) -> str:
        return f"{self.key} {self.description}"


class PlanChangedError(ValueError):
    """A saved plan has different inputs. `changes` lists them."""

    def __init__(self, changes: Sequence[PlanChange]) -> None:
        self.changes = tuple(changes)
        listed = ", ".join(map(str, changes))
        super().__init__(f"the saved state is of another plan: {listed}; restore the saved settings, or replan from this step")


def counts_of(sources: Sequence[CorpusView]) -> dict[str, dict[str, int]]:
    """Samples and excluded keys of each corpus. Stored in a plan's state to describe later changes."""
    return {source.name: {"samples": source.corpus.count, "excluded": source.excluded} for source in sources}


def loss_weights_of(sources: Sequence[CorpusView]) -> dict[str, float]:
    """Loss weights of the corpora that have one other than 1."""
    return {source.name: source.loss_weight for source in sources if source.loss_weight != 1}


def loss_weight_changes(state: Mapping[str, Any], *, sources: Sequence[CorpusView]) -> list[PlanChange]:
    """Differences between the loss weights of `sources` and those in a saved state, for corpora that the saved plan had, too."""
    saved, known = state.get("loss_weights", {}), state.get("counts", {})
    pairs = [(source, saved.get(source.name, 1.0)) for source in sources if source.name in known]
    return [
        PlanChange(f"corpus {source.name}:", f"loss_weight was {before:g} and is {source.loss_weight:g}")
        for source, before in pairs
        if before != source.loss_weight
    ]


def plan_changes(state: Mapping[str, Any], *, inputs: Mapping[str, Any], sources: Sequence[CorpusView]) -> list[PlanChange]:
    """Differences between `inputs`, those of a plan over `sources`, and the inputs in a saved state.

    Raises ValueError if a corpus's table is needed and cannot be read.
    """
    saved = state["inputs"]
    changes = []
    for key in sorted({*saved, *inputs} - {"corpora"}):
        before, after = saved.get(key), inputs.get(key)
        if before != after:
            changes.append(PlanChange(key, f"was {_format(before)} and is {_format(after)}"))
    if saved.get("corpora") != inputs["corpora"]:
        changes += _corpus_changes(saved.get("corpora", []), counts=state.get("counts", {}), sources=sources)
    return changes


def _corpus_changes(saved: Sequence[Any], *, counts: Mapping[str, Any], sources: Sequence[CorpusView]) -> list[PlanChange]:
    before = {identity[0]: identity for identity in saved}
    names = [source.name for source in sources]
    changes = [PlanChange(f"corpus {name}:", "was in the saved plan and is missing") for name in before if name not in names]
    for source in sources:
        if source.name not in before:
            changes.append(PlanChange(f"corpus {source.name}:", f"is new, {source.corpus.count} samples"))
        elif before[source.name] != source.identity:
            differences = _differences(before[source.name], counts=counts.get(source.name, {}), source=source)
            changes += [PlanChange(f"corpus {source.name}:", each) for each in differences]
    if not changes:
        changes.append(PlanChange("corpus:", f"their order was {', '.join(before)} and is {', '.join(names)}"))
    return changes


def _differences(identity: Sequence[Any], *, counts: Mapping[str, int], source: CorpusView) -> list[str]:
    """Differences between a corpus and the saved one of the same name, with this `identity` and these `counts`."""
    differences = []
    if identity[1] != source.identity[1]:
        differences.append(_content_change(counts.get("samples"), after=source.corpus.count))
    before, after = (each[2] if len(each) > 2 else {} for each in (identity, source.identity))
    settings = [key for key in ("weight", "repeats", "cap", "where", "validation.share") if before.get(key) != after.get(key)]
    differences += [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in settings]
    if before.get("exclude") != after.get("exclude"):
        differences.append(f"exclude had {counts.get('excluded', 'other') if 'exclude' in before else 'no'} keys and has {source.excluded}")
    old, new = (each.get("sidecars") or {} for each in (before, after))
    marks = source.takedown_sidecar
    if marks is not None and old.get(marks) != new.get(marks):
        differences.append(f"takedowns changed, {source.count_takedowns()} samples are marked now")
    other = [name for name in sorted({*old, *new} - {marks}) if old.get(name) != new.get(name)]
    if other:
        differences.append(f"sidecar {', '.join(other)} has changed, is new, or was removed")
    return differences


def _content_change(before: int | None, *, after: int) -> str:
    if before is None or before == after:
        return f"its shards or captions differ ({after} samples)"
    return f"had {before} samples and has {after}, {abs(after - before)} {'added' if after > before else 'fewer'}"


def _format(value: Any) -> str:
    """A value as written in a config, without null keys."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_format(each)}' for key, each in value.items() if each is not None)}}}"
    return repr(value)
