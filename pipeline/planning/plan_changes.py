"""What differs between the inputs of a plan and those of a saved one, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.streams.corpus_view import CorpusView


@dataclass(frozen=True, slots=True)
class PlanChange:
    """One difference: the input (`plan.max_tokens`, `corpus photos`), and what it was and is."""

    key: str
    said: str

    def __str__(self) -> str:
        return f"{self.key} {self.said}"


class PlanChangedError(ValueError):
    """A saved plan has other inputs than this one. `changes` says which."""

    def __init__(self, changes: Sequence[PlanChange]) -> None:
        self.changes = tuple(changes)
        listed = ", ".join(map(str, changes))
        super().__init__(f"the saved state is of another plan: {listed}; resume with the saved settings, or replan from here")


def counts_of(sources: Sequence[CorpusView]) -> dict[str, dict[str, int]]:
    """Of each corpus, the numbers that a later plan's changes are told by: samples, and excluded keys. Kept in a plan's state."""
    return {source.name: {"samples": source.corpus.count, "excluded": source.excluded} for source in sources}


def plan_changes(state: Mapping[str, Any], *, inputs: Mapping[str, Any], sources: Sequence[CorpusView]) -> list[PlanChange]:
    """How `inputs`, those of a plan over `sources`, differ from those in the state of another plan.

    Raises ValueError if a corpus's tables have to be read for it and cannot be.
    """
    saved = state["inputs"]
    changes = []
    for key in sorted({*saved, *inputs} - {"corpora"}):
        before, after = saved.get(key), inputs.get(key)
        if before != after:
            changes.append(PlanChange(key, f"was {_shown(before)} and is {_shown(after)}"))
    if saved.get("corpora") != inputs["corpora"]:
        changes += _corpus_changes(saved.get("corpora", []), counts=state.get("counts", {}), sources=sources)
    return changes


def _corpus_changes(saved: Sequence[Any], *, counts: Mapping[str, Any], sources: Sequence[CorpusView]) -> list[PlanChange]:
    before = {identity[0]: identity for identity in saved}
    names = [source.name for source in sources]
    changes = [PlanChange(f"corpus {name}:", "was trained on and is not given") for name in before if name not in names]
    for source in sources:
        if source.name not in before:
            changes.append(PlanChange(f"corpus {source.name}:", f"is new, {source.corpus.count} samples"))
        elif before[source.name] != source.identity:
            told = _told(before[source.name], counts=counts.get(source.name, {}), source=source)
            changes += [PlanChange(f"corpus {source.name}:", each) for each in told]
    if not changes:
        changes.append(PlanChange("corpus:", f"their order was {', '.join(before)} and is {', '.join(names)}"))
    return changes


def _told(identity: Sequence[Any], *, counts: Mapping[str, int], source: CorpusView) -> list[str]:
    """How a corpus differs from the one of this name and `identity`, of which `counts` are known."""
    told = []
    if identity[1] != source.identity[1]:
        told.append(_content(counts.get("samples"), after=source.corpus.count))
    before, after = (each[2] if len(each) > 2 else {} for each in (identity, source.identity))
    settings = [key for key in ("weight", "repeats", "cap", "where") if before.get(key) != after.get(key)]
    told += [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in settings]
    if before.get("exclude") != after.get("exclude"):
        told.append(f"exclude had {counts.get('excluded', 'other') if 'exclude' in before else 'no'} keys and has {source.excluded}")
    old, new = (each.get("sidecars") or {} for each in (before, after))
    marks = source.takedown_sidecar
    if marks is not None and old.get(marks) != new.get(marks):
        told.append(f"samples were taken down, {source.count_takedowns()} are marked now")
    other = [name for name in sorted({*old, *new} - {marks}) if old.get(name) != new.get(name)]
    if other:
        told.append(f"sidecar {', '.join(other)} has other values, is new, or is gone")
    return told


def _content(before: int | None, *, after: int) -> str:
    if before is None or before == after:
        return f"its shards or captions are others ({after} samples)"
    return f"had {before} samples and has {after}, {abs(after - before)} {'added' if after > before else 'fewer'}"


def _shown(value: Any) -> str:
    """As a config says it, without keys that say nothing."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in value.items() if each is not None)}}}"
    return repr(value)
