"""`report.html`: the contents of a corpus. One file that needs no network; the same corpus gives the same bytes.

Captions may be hostile HTML: the templates escape all data, and the page's Content-Security-Policy forbids scripts and requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich import filesize

from dataprep.examine.thumbnails import thumbnails
from dataprep.report.caption_lengths import USUAL_TOKENS
from dataprep.report.charts import Histogram, histogram, sizes
from dataprep.report.statistics import LOOKALIKES, CorpusStatistics, Example, compute_statistics, plan_of
from dataprep.report.templates import render_template, shown
from dataprep.shards.manifest import REPORT
from dataprep.workers.pool import LocalPool, Pool
from pipeline.corpus.corpus import Corpus, read_manifest
from pipeline.corpus.sidecars import Sidecar, read_sidecars
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import publish_text

_MAX_SOURCES = 40
_ASPECTS = {-2: "1:4", -1: "1:2", 0: "1:1", 1: "2:1", 2: "4:1"}


class ReportConfig(BaseModel):
    """The plan that the report shows: `stride` pixels per token side, at most `max_tokens` per image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stride: int = Field(default=32, ge=1)
    max_tokens: int = Field(default=1024, ge=1)


def report(
    corpora: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    config: ReportConfig,
    workers: int = 1,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the report of a corpus, or of two side by side, to the file `out`, by default report.html of the first corpus.

    Returns the file, its size in bytes and, for each corpus, the number of kept images and the planned fill.
    Raises ValueError if a corpus is damaged or is not a corpus.
    """
    assert 1 <= len(corpora) <= 2, corpora
    folders = [Path(corpus).absolute() for corpus in corpora]
    manifests = [read_manifest(folder) for folder in folders]
    page = folders[0] / REPORT if out is None else Path(out)
    if not page.parent.is_dir():
        raise ValueError(f"{page}: there is no folder {page.parent}")
    with LocalPool(workers) as pool:
        found = [
            corpus_statistics(folder, manifest=manifest, config=config, pool=pool, sidecars=read_sidecars(str(folder)), progress=progress)
            for folder, manifest in zip(folders, manifests, strict=True)
        ]
    if len({folder.name for folder in folders}) == 2:
        for each, folder in zip(found, folders, strict=True):
            each.name = folder.name  # two corpora of the same sources have the same name
    publish_text(page, render(found, config=config))
    return {
        "report": page,
        "bytes": page.stat().st_size,
        "corpora": [
            {"corpus": corpus, "kept": each.manifest["totals"]["kept"], "fill": each.plan.get("fill")}
            for corpus, each in zip(corpora, found, strict=True)
        ],
    }


def corpus_statistics(
    corpus: str | Path,
    *,
    manifest: dict[str, Any],
    config: ReportConfig,
    pool: Pool,
    sidecars: tuple[Sidecar, ...] = (),
    progress: Progress = no_progress,
) -> CorpusStatistics:
    """Counts and examples, with images, of the corpus in a folder or at a URL. `manifest` need not be written yet.

    `sidecars`: columns added to the corpus; they may lack the newest shards.
    """
    opened = Corpus.of_manifest(manifest, folder=str(corpus), check_shards=False, sidecars=sidecars, partial=True)
    found = compute_statistics(opened, manifest=manifest, plan=plan_of(config.stride, max_tokens=config.max_tokens), progress=progress)
    pairs = [pair for alike in found.lookalikes.values() for pair in alike.pairs]
    examples = [*found.kept, *(example for pair in pairs for example in pair if example)]
    locations = dict.fromkeys(example.location for example in examples if example.location)
    images = dict(zip(locations, thumbnails(list(locations), pool=pool), strict=True))

    def with_image(example: Example) -> Example:
        return replace(example, image=images[example.location]) if example.location else example

    found.kept = [with_image(example) for example in found.kept]
    for alike in found.lookalikes.values():
        alike.pairs = [(with_image(one), other and with_image(other)) for one, other in alike.pairs]
    return found


def render(found: Sequence[CorpusStatistics], *, config: ReportConfig) -> str:
    """The page about one corpus, or two side by side."""
    names = _names(found)
    return render_template(
        "report.html.jinja",
        title=" and ".join(names),
        corpora=[_corpus(each, name=name, suffix=f" of {name}" * (len(found) > 1)) for name, each in zip(names, found, strict=True)],
        header=["", *names] if len(names) > 1 else [],
        duplicate_kinds=LOOKALIKES,
        outcomes=_outcomes(found),
        size_charts=_size_charts(found, names=names),
        plan=plan_of(config.stride, max_tokens=config.max_tokens),
        token_charts=[histogram("Tokens of an image", _series(found, names, lambda each: each.tokens), label=_power, is_log=True)],
        plan_rows=_plan_rows(found),
        caption_charts=_caption_charts(found, names=names),
        caption_rows=_caption_rows(found),
        score_charts=_score_charts(found, names=names),
        scores_left_out=max(each.scores_left_out for each in found),
    )


def _names(found: Sequence[CorpusStatistics]) -> list[str]:
    names = [shown(each.name) for each in found]
    return names if len(set(names)) == len(names) else [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]


def _corpus(each: CorpusStatistics, *, name: str, suffix: str) -> dict[str, Any]:
    """Values of one corpus for the template. `suffix` distinguishes its headings from those of the other corpus."""
    counts = each.manifest["rejected"]
    sources = sorted(each.by_source.items(), key=lambda item: (-item[1].total(), item[0]))
    return {
        "name": name,
        "suffix": suffix,
        "kept": each.manifest["totals"]["kept"],
        "inputs": each.manifest["totals"]["inputs"],
        "size": filesize.decimal(each.manifest["totals"]["bytes"]),
        "shards": len(each.manifest["shards"]),
        "sources": len(sources),
        "by_source": [_source_row(source, counts=counts) for source, counts in sources[:_MAX_SOURCES]],
        "more_sources": len(sources) - _MAX_SOURCES,
        "notes": each.manifest["notes"],
        "plan_error": each.plan.get("error"),
        "examples": each.kept,
        "rejected": [(reason, counts.get(reason, len(examples)), examples) for reason, examples in sorted(each.rejected.items())],
        "lookalikes": each.lookalikes,
    }


def _source_row(source: str, *, counts: Counter[str]) -> tuple[str, ...]:
    rejected = ", ".join(f"{reason} {number:,}" for reason, number in sorted(counts.items()) if reason)
    return shown(source), f"{counts.total():,}", f"{counts['']:,}", rejected


def _rejection_counts(each: CorpusStatistics) -> Counter[str]:
    """Rejected inputs by reason, under today's names, so that corpora of different versions can be compared."""
    counts: Counter[str] = Counter()
    for reason, number in each.manifest["rejected"].items():
        counts["damaged" if reason == "truncated" else reason] += number
    return counts


def _outcomes(found: Sequence[CorpusStatistics]) -> list[tuple[str, list[int]]]:
    """(outcome, number of inputs in each corpus): kept, the reasons for rejection, and all inputs."""
    rejected = [_rejection_counts(each) for each in found]
    reasons = sorted({reason for counts in rejected for reason in counts})
    reasons.sort(key=lambda reason: -max(counts[reason] for counts in rejected))
    return [
        ("kept", [each.manifest["totals"]["kept"] for each in found]),
        *((reason, [counts[reason] for counts in rejected]) for reason in reasons),
        ("inputs", [each.manifest["totals"]["inputs"] for each in found]),
    ]


def _size_charts(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> list[str]:
    suffixes = [f", {name}" * (len(found) > 1) for name in names]
    return [
        *(sizes(f"Width and height{suffix}", each.sizes) for suffix, each in zip(suffixes, found, strict=True)),
        histogram("Pixels", _series(found, names, lambda each: each.pixels), label=_pixels, is_log=True),
        histogram("Width : height", _series(found, names, lambda each: each.aspects), label=_aspect, is_log=True),
    ]


def _plan_rows(found: Sequence[CorpusStatistics]) -> list[tuple[str, ...]]:
    """Facts of the plans of all corpora; none if a corpus has no plan."""
    facts = [_plan_facts(each.plan) for each in found]
    return [(name, *(values[name] for values in facts)) for name in facts[0] if all(facts)]


def _plan_facts(plan: Mapping[str, Any]) -> dict[str, str]:
    if "error" in plan:
        return {}
    input_counts = plan["account"]
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in input_counts["left_out"].items())
    return {
        "fill of the packs": f"{plan['fill']:.1%}",
        f"busy, of {plan['ranks']} ranks": f"{plan['utilisation']:.1%}",
        "packs per step": f"{plan['packs_per_step']}",
        "images per step": f"{plan['samples_per_step']:.1f}",
        "tokens an epoch": f"{input_counts['tokens_per_epoch']:,}",
        "scaled down": f"{input_counts['downscaled']:,} (none is scaled up)",
        "cut off by the crop": f"{input_counts['cropped_pixels']:.1%} of the pixels",
        "left out": left_out or "none",
    }


def _caption_charts(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> list[str]:
    lengths = _series(found, names, lambda each: each.caption_lengths)
    return [
        histogram("Characters of the first caption", lengths, label=_power, is_log=True),
        histogram("Captions of an image", _series(found, names, lambda each: each.captions), label=_number, is_whole=True),
    ]


def _caption_rows(found: Sequence[CorpusStatistics]) -> list[tuple[str, ...]]:
    facts = {
        f"captions of more than {USUAL_TOKENS} tokens (CLIP's, the usual text.max_tokens), of a sample": [
            f"{each.long_captions:,} of {each.sampled_captions:,}" * bool(each.sampled_captions) for each in found
        ],
        "without a caption": [f"{each.without_caption:,}" for each in found],
        "with a class": [f"{each.classes.total():,}" * bool(each.classes) for each in found],
        "classes": [f"{len(each.classes):,}" * bool(each.classes) for each in found],
        "images of the rarest and the commonest class": [
            f"{min(each.classes.values()):,} and {max(each.classes.values()):,}" if each.classes else "" for each in found
        ],
    }
    return [(name, *values) for name, values in facts.items() if any(values)]


def _score_charts(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> list[str]:
    columns = sorted({column for each in found for column in each.scores})
    return [
        histogram(shown(column), _series(found, names, lambda each, column=column: each.scores.get(column, Histogram())), label=_number)
        for column in columns
    ]


def _series(found: Sequence[CorpusStatistics], names: Sequence[str], pick: Callable[[CorpusStatistics], Histogram]) -> dict[str, Histogram]:
    return {name: pick(each) for name, each in zip(names, found, strict=True)}


def _pixels(power: float) -> str:
    """ "1.0 MP" of log2(pixels)."""
    pixels = 2.0**power
    return f"{pixels / 2**20:.3g} M" if pixels >= 2**20 else f"{pixels / 2**10:.3g} k" if pixels >= 2**10 else f"{pixels:.3g}"


def _power(power: float) -> str:
    number = 2.0**power
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


def _aspect(power: float) -> str:
    if power in _ASPECTS:
        return _ASPECTS[int(power)]
    ratio = 2.0 ** abs(power)
    return f"{ratio:.3g}:1" if power > 0 else f"1:{ratio:.3g}"


def _number(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 1e15 or not math.isfinite(number) else f"{number:.2e}"
