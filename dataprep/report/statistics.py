"""Statistics of a corpus, with a few examples of each kind, computed over its tables with one shard in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.report.caption_lengths import beyond_usual, sample_captions
from dataprep.report.charts import Histogram
from dataprep.row_schema import SEMANTIC_DUPLICATE, TABLE_COLUMNS
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.sidecars import TAKEDOWN
from pipeline.planning.plan_statistics import count_samples
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.planning.summary import plan_summary
from pipeline.progress import Progress, no_progress
from pipeline.size_rule import target_sizes
from pipeline.streams.corpus_view import CorpusView

KEPT_EXAMPLES, REJECTED_EXAMPLES, PAIRS = 24, 6, 8
MAX_SCORES = 24  # numeric columns that are drawn
MAX_STEPS, RANKS = 20, 8  # of the plan
SAMPLED_CAPTIONS = 500  # rows whose captions are tokenized
WIDTH = 1152  # of the network that the plan is for, as in the published XL networks
LOOKALIKES: Mapping[str, str] = {"near_duplicate_of": "near", SEMANTIC_DUPLICATE: "semantic"}
"""Column that names the kept image of a duplicate → kind of duplicate."""

_LOG_FINEST = -2  # a quarter of an octave
_SHOWN = (
    *("key", "source", "path", "reason", "detail", "caption", "captions", "label", "width", "height"),
    *("thumbnail", "image_offset", "image_length", TAKEDOWN, *LOOKALIKES),
)


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the tables, as a report shows it. `image`: a JPEG thumbnail, if there is one; else `location` is that of the image."""

    path: str
    caption: str
    height: int
    width: int
    key: str = ""
    reason: str = ""
    detail: str = ""
    image: bytes = b""
    location: tuple[str, int, int] | None = None  # tar, offset, length


@dataclass(slots=True)
class Lookalikes:
    """Duplicates by one column of `LOOKALIKES`: the number of kept ones, and pairs of (duplicate, kept image)."""

    kept: int = 0
    pairs: list[tuple[Example, Example | None]] = field(default_factory=list)


@dataclass(slots=True)
class CorpusStatistics:
    """Counts and examples of one corpus. `scores`: by numeric column. `lookalikes`: by column of `LOOKALIKES`."""

    name: str
    manifest: Mapping[str, Any]
    plan: dict[str, Any]  # of `pipeline.planning.summary`, or {"error": why there is none}
    by_source: dict[str, Counter[str]] = field(default_factory=dict)  # source → reason ("" if kept) → number
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (⌊2·log2 width⌋, ⌊2·log2 height⌋)
    pixels: Histogram = field(default_factory=lambda: Histogram(finest=_LOG_FINEST))  # log2
    aspects: Histogram = field(default_factory=lambda: Histogram(finest=_LOG_FINEST))  # log2 of width / height
    tokens: Histogram = field(default_factory=lambda: Histogram(finest=_LOG_FINEST))  # log2
    caption_lengths: Histogram = field(default_factory=lambda: Histogram(finest=_LOG_FINEST))  # log2 of characters
    captions: Histogram = field(default_factory=lambda: Histogram(finest=0))  # per image
    without_caption: int = 0
    sampled_captions: int = 0
    long_captions: int = 0  # of the sampled ones: more tokens of CLIP than text.max_tokens by default
    classes: Counter[int] = field(default_factory=Counter)
    scores: dict[str, Histogram] = field(default_factory=dict)
    scores_left_out: int = 0
    kept: list[Example] = field(default_factory=list)
    rejected: dict[str, list[Example]] = field(default_factory=dict)
    lookalikes: dict[str, Lookalikes] = field(default_factory=lambda: {column: Lookalikes() for column in LOOKALIKES})


def plan_of(stride: int, *, max_tokens: int) -> PlanConfig:
    """The plan of the report: packs of four times the largest image, eight packs per step."""
    return PlanConfig(stride=stride, max_tokens=max_tokens, tokens_per_pack=4 * max_tokens)


def compute_statistics(
    corpus: Corpus, *, manifest: Mapping[str, Any], plan: PlanConfig, progress: Progress = no_progress
) -> CorpusStatistics:
    """Read all tables, and plan as `tim plan` does. `progress`: ("report", shards read, shards).

    Raises ValueError if a table is missing or damaged.
    """
    statistics = CorpusStatistics(name=corpus.name, manifest=manifest, plan=_expected(corpus, plan=plan))
    numbers = _numbers(corpus.schema)
    statistics.scores = {name: Histogram() for name in numbers[:MAX_SCORES]}
    statistics.scores_left_out = len(numbers) - len(statistics.scores)
    columns = [*(name for name in _SHOWN if name in corpus.schema.names), *statistics.scores]
    wanted = {corpus.count * (2 * index + 1) // (2 * KEPT_EXAMPLES) for index in range(KEPT_EXAMPLES)}
    named: dict[str, list[tuple[Example, str]]] = {column: [] for column in LOOKALIKES}  # with the key of the kept image
    seen = 0
    for number, shard in enumerate(corpus.shards):
        kept = corpus.read(number, columns=columns)
        _count_kept(statistics, kept, plan=plan)
        statistics.kept += [_example(kept, row - seen, tar=shard.path) for row in sorted(wanted) if seen <= row < seen + shard.count]
        seen += shard.count
        rejected = corpus.read_rejected(number, columns=_SHOWN)
        _count_rejected(statistics, rejected)
        for column, examples in named.items():
            found = _named(kept, column)
            statistics.lookalikes[column].kept += len(found)
            for rows, pairs in ((kept, found), (rejected, _named(rejected, column))):
                examples += [(_example(rows, row, tar=shard.path), key) for row, key in pairs[: PAIRS - len(examples)]]
        progress("report", number + 1, len(corpus.shards))
    captions = sample_captions([corpus], most=SAMPLED_CAPTIONS)
    statistics.sampled_captions, statistics.long_captions = len(captions), beyond_usual(captions)
    originals = _find(corpus, keys={key for examples in named.values() for _, key in examples})
    for column, examples in named.items():
        statistics.lookalikes[column].pairs = [(example, originals.get(key)) for example, key in examples]
    return statistics


def _expected(corpus: Corpus, *, plan: PlanConfig) -> dict[str, Any]:
    """The plan of an epoch, or of its first steps. A small corpus gets fewer packs per step, so that it is not repeated within one."""
    try:
        input_counts = count_samples([CorpusView(corpus)], rule=plan.size_rule)
        packs = input_counts["tokens_per_epoch"] // plan.tokens_per_pack
        if not packs:
            return {"error": f"all images together have {input_counts['tokens_per_epoch']:,} tokens, which fill no pack"}
        fitting = plan.model_copy(update={"packs_per_step": min(packs, plan.packs_per_step)})
        planner = Planner([corpus], plan=fitting, seed=0, width=WIDTH, diffusion_share=0.5, consistency_share=0.1)
        return plan_summary(planner, steps=min(packs // fitting.packs_per_step, MAX_STEPS), ranks=RANKS)
    except ValueError as error:
        return {"error": str(error)}


def _numbers(schema: pa.Schema) -> list[str]:
    """Names of the extra columns with numbers or booleans."""

    def is_numeric(kind: pa.DataType) -> bool:
        return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

    return [each.name for each in schema if each.name not in TABLE_COLUMNS and each.name != TAKEDOWN and is_numeric(each.type)]


def _count_kept(statistics: CorpusStatistics, kept: pa.Table, *, plan: PlanConfig) -> None:
    heights, widths = (pc.fill_null(kept[name], 0).to_numpy().astype(np.int64) for name in ("height", "width"))
    known = (heights > 0) & (widths > 0)
    heights, widths = heights[known], widths[known]
    log_heights, log_widths = np.log2(heights), np.log2(widths)
    statistics.pixels.add(log_heights + log_widths)
    statistics.aspects.add(log_widths - log_heights)
    cells, counts = np.unique(np.floor(2 * np.stack([log_widths, log_heights], axis=1)).astype(np.int64), axis=0, return_counts=True)
    statistics.sizes.update({(int(column), int(row)): int(count) for (column, row), count in zip(cells, counts, strict=True)})
    targets = target_sizes(heights, widths=widths, rule=plan.size_rule)
    statistics.tokens.add(np.log2(targets.tokens[targets.left_out == 0]))
    lengths = pc.fill_null(pc.call_function("utf8_length", [kept["caption"]]), 0).to_numpy().astype(np.float64)
    has_caption = lengths > 0
    statistics.caption_lengths.add(np.log2(lengths[has_caption]))
    statistics.without_caption += int((~has_caption).sum())
    captions = pc.fill_null(pc.call_function("list_value_length", [kept["captions"]]), 0).to_numpy().astype(np.float64)
    statistics.captions.add(captions[has_caption])
    statistics.classes.update(label for label in kept["label"].to_pylist() if label is not None)
    for name, scores in statistics.scores.items():
        scores.add(kept[name].cast(pa.float64(), safe=False).to_numpy())
    for source in _texts(kept, "source"):
        statistics.by_source.setdefault(source, Counter())[""] += 1


def _count_rejected(statistics: CorpusStatistics, rejected: pa.Table) -> None:
    reasons = rejected["reason"].to_pylist()
    for reason, source in zip(reasons, _texts(rejected, "source"), strict=True):
        statistics.by_source.setdefault(source, Counter())[reason] += 1
    has_image = rejected["thumbnail"].is_valid().to_pylist() if "thumbnail" in rejected.column_names else [False] * len(reasons)
    for reason in set(reasons):
        rows = [row for row, other in enumerate(reasons) if other == reason]
        chosen = sorted(rows, key=lambda row: not has_image[row])[:REJECTED_EXAMPLES]
        found = statistics.rejected.get(reason, []) + [_example(rejected, row) for row in chosen]
        statistics.rejected[reason] = sorted(found, key=lambda example: not example.image)[:REJECTED_EXAMPLES]


def _named(rows: pa.Table, column: str) -> list[tuple[int, str]]:
    """(row, key of the kept image) of the rows that are duplicates."""
    return [(row, key) for row, key in enumerate(_texts(rows, column)) if key]


def _texts(rows: pa.Table, name: str) -> list[str]:
    """A text column, "" for missing values."""
    return [text or "" for text in rows[name].to_pylist()] if name in rows.column_names else [""] * rows.num_rows


def _example(rows: pa.Table, row: int, *, tar: str = "") -> Example:
    """An example from a row. `tar`: the tar of its image, unless it was rejected. Of a takedown, only the key is shown."""
    (found,) = rows.slice(row, 1).to_pylist()
    key = found.get("key") or ""
    if found.get(TAKEDOWN):
        return Example(key=key, path="", caption="", height=0, width=0, detail="taken down")
    return Example(
        key=key,
        path="/".join(filter(None, (found.get("source"), found.get("path")))),
        caption=found.get("caption") or "",
        height=found.get("height") or 0,
        width=found.get("width") or 0,
        reason=found.get("reason") or "",
        detail=found.get("detail") or "",
        image=found.get("thumbnail") or b"",
        location=(tar, found["image_offset"], found["image_length"]) if tar and key and found["image_offset"] is not None else None,
    )


def _find(corpus: Corpus, *, keys: set[str]) -> dict[str, Example]:
    """The kept samples with these keys. A key begins with the name of its shard."""
    found: dict[str, Example] = {}
    columns = [name for name in _SHOWN if name in corpus.schema.names]
    for number, shard in enumerate(corpus.shards):
        mine = {key for key in keys if key.startswith(shard.table.removesuffix(".parquet"))}
        if mine:
            kept = corpus.read(number, columns=columns)
            rows = (row for row, key in enumerate(kept["key"].to_pylist()) if key in mine)
            found.update({(example := _example(kept, row, tar=shard.path)).key: example for row in rows})
    return found
