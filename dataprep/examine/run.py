"""Pass 1 over all inputs, in chunks of 1,024, by one run or by the parts of a job array. Finished chunks are skipped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dataprep.examine.examine import PIECE_BYTES, PIECE_SIZE, Piece, Rules, examine_piece
from dataprep.examine.row_chunks import CHUNK_SIZE, chunk_path, write_chunk
from dataprep.sources.raw_sample import RawSample
from dataprep.workers.pool import Pool
from pipeline.progress import Progress
from pipeline.storage.atomic import publish_text
from pipeline.workers.pool import WorkerDied

_MARKER = re.compile(r"examined-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class JobPart:
    """Part `number` (from 1) of `of` parts, with every `of`-th chunk. A run that is not split is part 1 of 1."""

    number: int = 1
    of: int = 1

    def has(self, chunk: int) -> bool:
        return chunk % self.of == self.number - 1

    @property
    def marker(self) -> str:
        return f"examined-{self.number}-of-{self.of}.json"


@dataclass(frozen=True, slots=True)
class Examined:
    """Result of pass 1: inputs and chunks of all parts together, notes of the sources, and `replaced`: reason → number of rows of the
    corpus that retried inputs replace."""

    inputs: int
    chunks: int
    notes: list[str]
    replaced: Mapping[str, int]

    def save(self, work: Path, *, part: JobPart) -> None:
        publish_text(work / part.marker, json.dumps(asdict(self)))


def examined_before(work: Path) -> Examined | None:
    """The result of pass 1 if all its parts are finished, None if none is. Raises RuntimeError if only some are."""
    done: dict[int, set[int]] = {}
    for path in work.glob("examined-*.json"):
        if match := _MARKER.fullmatch(path.name):
            done.setdefault(int(match[2]), set()).add(int(match[1]))
    for of, numbers in done.items():
        if len(numbers) == of:
            return Examined(**json.loads((work / JobPart(1, of).marker).read_text("utf-8")))
    if done:
        of, numbers = max(done.items())
        missing = sorted(set(range(1, of + 1)) - numbers)
        named = ", ".join(f"{number}/{of}" for number in missing[:10]) + (", …" if len(missing) > 10 else "")
        raise RuntimeError(f"{len(missing)} part(s) are unfinished: run part {named} (again) before the merge")
    return None


def examine_all(
    samples: Iterable[RawSample],
    *,
    part: JobPart,
    work: Path,
    rules: Rules,
    pool: Pool,
    expected: int | None,
    progress: Progress,
) -> tuple[int, int]:
    """Examine the chunks of a part that have no table in `work` yet. Returns (inputs, chunks) of all parts together.

    `expected`: number of inputs, None if unknown. `progress` is called with ("examine", inputs so far, expected).
    """
    remaining = iter(samples)
    chunks = drawn = passed = kept = rejected = 0

    def pieces() -> Iterator[Piece]:
        nonlocal chunks, drawn, passed
        following = next(remaining, None)
        while following is not None:
            table, is_due = chunk_path(work, chunks), part.has(chunks)
            chunks += 1
            if not is_due or table.exists():
                passed += 1 + sum(1 for _ in islice(remaining, CHUNK_SIZE - 1))
                following = next(remaining, None)
                continue
            room = CHUNK_SIZE
            while room and following is not None:
                members = [following, *_rest_of_piece(islice(remaining, min(room, PIECE_SIZE) - 1), first=following)]
                following = next(remaining, None)
                room -= len(members)
                drawn += len(members)
                yield Piece(samples=tuple(members), table=table, ends_chunk=not room or following is None, rules=rules)

    def show(examined: int) -> None:
        progress("examine", passed + examined, expected, note=f"{kept:,} kept, {rejected:,} rejected")

    rows: list[dict[str, Any]] = []
    for examined in pool.map(examine_piece, pieces(), retry=_after_crash, on_items=show):
        rows += examined.rows
        fit = sum(not row["reason"] for row in examined.rows)
        kept, rejected = kept + fit, rejected + len(examined.rows) - fit
        if examined.ends_chunk:
            write_chunk(examined.table, rows)
            rows = []
    show(drawn)
    return drawn + passed, chunks


def _rest_of_piece(samples: Iterator[RawSample], *, first: RawSample) -> Iterator[RawSample]:
    """The samples after the first, up to the memory limit of a piece."""
    held = len(first.data or b"")
    while held < PIECE_BYTES and (sample := next(samples, None)) is not None:
        held += len(sample.data or b"")
        yield sample


def _after_crash(piece: Piece, death: WorkerDied) -> Piece:
    """After a worker died at an input: the piece with the input as suspect or, at the second death, rejected as `crashed`."""
    if death.at in piece.suspects:
        return replace(piece, crashed=piece.crashed | {death.at})
    return replace(piece, suspects=piece.suspects | {death.at})
