"""The error for a preparation that kept no input, with examples for each reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from dataprep.examine.row_chunks import CHUNK_SIZE, ChunkTables
from dataprep.row_schema import TAKEN_DOWN
from dataprep.shards.layout import DUPLICATE, DUPLICATE_OF, NEAR_DUPLICATE, SCHEMA_MISMATCH, TAKEN_DOWN_COPY, Plan
from dataprep.shards.manifest import InputCounts
from pipeline.errors import DetailedError

_EXAMPLES = 3  # of each reason
_MAX_CHARACTERS = 300  # of a path or detail

Example = Mapping[str, str]


class NothingKept(DetailedError):
    """No input could be kept. `lines`: input counts, up to three examples of each reason, and the notes."""

    def __init__(self, counts: InputCounts, *, examples: Mapping[str, Sequence[Example]]) -> None:
        super().__init__(
            f"no usable image among {counts.inputs} inputs ({format_counts(counts.rejected)}): nothing was written",
            lines=tuple(_lines(counts, examples=examples)),
            data={**asdict(counts), "examples": {reason: list(shown) for reason, shown in examples.items()}},
        )
        self.counts = counts


def find_examples(tables: ChunkTables, *, plan: Plan) -> dict[str, list[Example]]:
    """Reason → source, path and detail of the first inputs that were rejected for it."""
    found: dict[str, list[Example]] = {}
    missing = {reason: min(count, _EXAMPLES) for reason, count in plan.rejected.items()}
    for chunk, table in enumerate(tables):
        rows = table.select(["source", "path", "reason", "detail"]).to_pylist()
        for index, row in enumerate(rows):
            reason, detail = _verdict(row, position=chunk * CHUNK_SIZE + index, plan=plan)
            if missing.get(reason, 0) > 0:
                missing[reason] -= 1
                example = {"source": row["source"], "path": row["path"], "detail": detail}
                found.setdefault(reason, []).append({name: text[:_MAX_CHARACTERS] for name, text in example.items()})
        if not any(missing.values()):
            break
    return dict(sorted(found.items()))


def format_counts(rejected: Mapping[str, int]) -> str:
    """Numbers of rejected inputs by reason, in one line."""
    return ", ".join(f"{reason} {number}" for reason, number in rejected.items()) or "there is none"


def example_lines(examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """One line per example: source, path and problem."""
    return [
        f"{example['source']}/{example['path']}: {example['detail'] or reason}" for reason, shown in examples.items() for example in shown
    ]


def _verdict(row: Mapping[str, str], *, position: int, plan: Plan) -> tuple[str, str]:
    """Reason and detail of an input; the plan has those of duplicates."""
    if row["reason"]:
        return row["reason"], row["detail"]
    for reason, original in ((DUPLICATE, int(plan.exact[position])), (NEAR_DUPLICATE, int(plan.near[position]))):
        if original >= 0:
            name = plan.references.id(original) if original < len(plan.references) else "another input"
            return reason, f"{DUPLICATE_OF[reason]} {name}"
    if plan.taken_down[position]:
        return TAKEN_DOWN, TAKEN_DOWN_COPY
    return SCHEMA_MISMATCH, plan.schema_mismatches.get(position, "")


def _lines(counts: InputCounts, *, examples: Mapping[str, Sequence[Example]]) -> Iterator[str]:
    yield f"0 of {counts.inputs} inputs kept"
    for reason, number in sorted(counts.rejected.items(), key=lambda item: (-item[1], item[0])):
        yield f"  {reason}  {number}"
        yield from (f"    {line}" for line in example_lines({reason: examples.get(reason, ())}))
    yield from (f"note: {note}" for note in counts.notes)
