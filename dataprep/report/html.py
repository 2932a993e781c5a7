"""`report.html`: what is in a corpus, in images. One file that needs no network, the same bytes for the same corpus.

Everything that comes from the data is escaped, and the page forbids itself scripts and requests: captions may be hostile HTML.
"""

from __future__ import annotations

import base64
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dataprep.examine.thumbnails import thumbnails
from dataprep.report.caption_lengths import USUAL_TOKENS
from dataprep.report.charts import Histogram, data_table, histogram, sizes
from dataprep.report.statistics import LOOKALIKES, CorpusStatistics, Example, Lookalikes, compute_statistics, plan_of
from dataprep.shards.manifest import REPORT
from dataprep.workers.pool import LocalPool, Pool
from pipeline.corpus.corpus import Corpus, read_manifest
from pipeline.corpus.sidecars import Sidecar, read_sidecars
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import publish_text, size_in_words

_LONGEST_TEXT = 300  # characters of a caption, path or message that are shown
_MAX_SOURCES = 40
_ASPECTS = {-2: "1:4", -1: "1:2", 0: "1:1", 1: "2:1", 2: "4:1"}


class ReportConfig(BaseModel):
    """What the report plans for: `stride` pixels per token side, at most `max_tokens` an image."""

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
    """Write the report of a corpus, or of two side by side, to the file `out`; of one by default to its report.html.

    Returns the file, its bytes, and for each corpus what is kept and the fill that the planner expects.
    Raises ValueError if one is no corpus or is damaged.
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
            each.name = folder.name  # what the reader calls them: two corpora of the same sources have the same name
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
    """Counts and examples with their images of the corpus in a folder or at a URL, whose manifest may not have been written yet.

    `sidecars`: what it got later; of shards that are newer than these they say nothing.
    """
    opened = Corpus.of_manifest(manifest, folder=str(corpus), check_shards=False, sidecars=sidecars, partial=True)
    found = compute_statistics(opened, manifest=manifest, plan=plan_of(config.stride, max_tokens=config.max_tokens), progress=progress)
    pairs = [pair for alike in found.lookalikes.values() for pair in alike.pairs]
    examples = [*found.kept, *(example for pair in pairs for example in pair if example)]
    places = dict.fromkeys(example.place for example in examples if example.place)
    images = dict(zip(places, thumbnails(list(places), pool=pool), strict=True))

    def seen(example: Example) -> Example:
        return replace(example, image=images[example.place]) if example.place else example

    found.kept = [seen(example) for example in found.kept]
    for alike in found.lookalikes.values():
        alike.pairs = [(seen(one), other and seen(other)) for one, other in alike.pairs]
    return found


def render(found: Sequence[CorpusStatistics], *, config: ReportConfig) -> str:
    """The page about one corpus, or two side by side."""
    names = _names(found)
    title = " and ".join(names)
    parts = [
        _section("account", "What became of the inputs", _input_counts(found, names=names)),
        _section("sizes", "Sizes", _sizes(found, names=names)),
        _section("plan", f"Tokens at stride {config.stride}, and what a plan makes of them", _plan(found, names=names, config=config)),
        _section("captions", "Captions and classes", _captions(found, names=names)),
    ]
    scores = _scores(found, names=names)
    if scores:
        parts.append(_section("scores", "Scores and further numbers", scores))
    for name, each in zip(names, found, strict=True):
        of = f" of {name}" if len(found) > 1 else ""
        parts.append(_section("kept", f"Kept{of}: {len(each.kept)} examples", _gallery(each.kept)))
        if each.rejected:
            parts.append(_section("rejected", f"Rejected{of}", _rejected(each)))
        for column, alike in each.lookalikes.items():
            if alike.pairs:
                kind = LOOKALIKES[column]
                parts.append(_section("duplicates", f"{kind.capitalize()} duplicates{of}, beside what they look like", _pairs(alike)))
    style = files("dataprep.report").joinpath("report.css").read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{_bdi(title)}</h1>{_headline(found, names=names)}</header>\n<main>{chr(10).join(parts)}</main></body></html>\n"
    )


def _names(found: Sequence[CorpusStatistics]) -> list[str]:
    names = [_shown(each.name) for each in found]
    return names if len(set(names)) == len(names) else [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]


def _headline(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> str:
    lines = []
    for colour, name, each in zip("ab", names, found, strict=False):
        key = f'<span class="key" style="background:var(--{colour})"></span>{_bdi(name)}: ' * (len(found) > 1)
        totals = each.manifest["totals"]
        shards, sources = len(each.manifest["shards"]), len(each.by_source)
        of = f" of {sources:,} sources" * (sources > 1)
        where = f"{shards:,} shard{'s' * (shards != 1)}, {size_in_words(totals['bytes'])}"
        lines.append(f"<p>{key}<strong>{totals['kept']:,}</strong> of {totals['inputs']:,} inputs{of} kept in {where}</p>")
    return "".join(lines)


def _rejected_today(each: CorpusStatistics) -> Counter[str]:
    """Reasons as they are called today, so that corpora of several versions can be compared."""
    counts: Counter[str] = Counter()
    for reason, number in each.manifest["rejected"].items():
        counts["damaged" if reason == "truncated" else reason] += number
    return counts


def _input_counts(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> str:
    rejected = [_rejected_today(each) for each in found]
    reasons = sorted({reason for counts in rejected for reason in counts})
    reasons.sort(key=lambda reason: -max(counts[reason] for counts in rejected))
    rows = [("kept", [each.manifest["totals"]["kept"] for each in found])]
    rows += [(reason, [counts[reason] for counts in rejected]) for reason in reasons]
    rows.append(("inputs", [each.manifest["totals"]["inputs"] for each in found]))
    lines = []
    for what, counts in rows:
        cells = ""
        for each, count in zip(found, counts, strict=True):
            share = count / max(1, each.manifest["totals"]["inputs"])
            bar = f'<span class="bar {"good" if what == "kept" else "bad"}" style="width:{100 * share:.2f}%"></span>' * (
                what != "inputs" and count > 0
            )
            cells += f'<td>{count:,}</td><td>{share:.1%}</td><td class="wide">{bar}</td>'
        lines.append(f'<tr><th scope="row">{_bdi(what)}</th>{cells}</tr>')
    head = "".join(f'<th scope="colgroup" colspan="3">{_bdi(name)}</th>' for name in names)
    head = f"<thead><tr><td></td>{head}</tr></thead>" * (len(found) > 1)
    parts = [f'<table class="bars">{head}<tbody>{"".join(lines)}</tbody></table>']
    for name, each in zip(names, found, strict=True):
        for column, alike in each.lookalikes.items():
            if alike.kept:
                what = f"{alike.kept:,} of the kept are marked as {LOOKALIKES[column]} duplicates of others"
                parts.append(f"<p>{_of(name, found)}{what}; a plan with <code>where: \"{column} == ''\"</code> leaves them out.</p>")
        if len(each.by_source) > 1:
            parts.append(f"<p>{_bdi(name)}</p>" * (len(found) > 1) + _by_source(each))
        parts += [f"<p>{_of(name, found)}{_bdi(note)}</p>" for note in each.manifest["notes"]]
    return "".join(parts)


def _by_source(each: CorpusStatistics) -> str:
    sources = sorted(each.by_source.items(), key=lambda item: (-item[1].total(), item[0]))
    rows = [
        (
            _shown(source),
            f"{counts.total():,}",
            f"{counts['']:,}",
            ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()) if reason),
        )
        for source, counts in sources[:_MAX_SOURCES]
    ]
    more = f"<p>and {len(sources) - _MAX_SOURCES:,} more sources</p>" * (len(sources) > _MAX_SOURCES)
    return data_table(("source", "inputs", "kept", "rejected"), rows) + more


def _sizes(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> str:
    maps = [sizes(f"Width and height{_suffix(name, found)}", each.sizes) for name, each in zip(names, found, strict=True)]
    return _charts(
        *maps,
        histogram("Pixels", _series(found, names, lambda each: each.pixels), label=_pixels, is_log=True),
        histogram("Width : height", _series(found, names, lambda each: each.aspects), label=_aspect, is_log=True),
    )


def _plan(found: Sequence[CorpusStatistics], *, names: Sequence[str], config: ReportConfig) -> str:
    chart = histogram("Tokens of an image", _series(found, names, lambda each: each.tokens), label=_power, is_log=True)
    facts: dict[str, list[str]] = {}
    for each in found:
        for what, value in _plan_facts(each.plan).items():
            facts.setdefault(what, []).append(value)
    rows = [(what, *values) for what, values in facts.items() if len(values) == len(found)]
    table = data_table(_header(names), rows) if rows else ""
    problems = "".join(
        f"<p>{_of(name, found)}no plan: {_bdi(each.plan['error'])}</p>"
        for name, each in zip(names, found, strict=True)
        if "error" in each.plan
    )
    plan = plan_of(config.stride, max_tokens=config.max_tokens)
    about = (
        f"<p>At most {plan.max_tokens:,} tokens of {config.stride} × {config.stride} pixels an image, {plan.tokens_per_pack:,} a pack, "
        f"at most {plan.packs_per_step} packs a step: <code>tim plan</code> shows the same for a config of yours.</p>"
    )
    return about + _charts(chart) + table + problems


def _plan_facts(plan: Mapping[str, Any]) -> dict[str, str]:
    if "error" in plan:
        return {}
    input_counts = plan["account"]
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in input_counts["left_out"].items())
    return {
        "fill of the packs": f"{plan['fill']:.1%}",
        f"busy, of {plan['ranks']} ranks": f"{plan['utilisation']:.1%}",
        "packs a step": f"{plan['packs_per_step']}",
        "images a step": f"{plan['samples_per_step']:.1f}",
        "tokens an epoch": f"{input_counts['tokens_per_epoch']:,}",
        "scaled down": f"{input_counts['downscaled']:,} (none is scaled up)",
        "cut off by the crop": f"{input_counts['cropped_pixels']:.1%} of the pixels",
        "left out": left_out or "none",
    }


def _captions(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> str:
    charts = _charts(
        histogram("Characters of the first caption", _series(found, names, lambda each: each.caption_lengths), label=_power, is_log=True),
        histogram("Captions of an image", _series(found, names, lambda each: each.captions), label=_number, is_whole=True),
    )
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
    return charts + data_table(_header(names), [(what, *values) for what, values in facts.items() if any(values)])


def _scores(found: Sequence[CorpusStatistics], *, names: Sequence[str]) -> str:
    columns = sorted({column for each in found for column in each.scores})
    charts = [
        histogram(_shown(column), _series(found, names, lambda each, column=column: each.scores.get(column, Histogram())), label=_number)
        for column in columns
    ]
    more = max(each.scores_left_out for each in found)
    return _charts(*charts) + (f"<p>{more:,} more columns of numbers are not drawn.</p>" if more else "")


def _rejected(each: CorpusStatistics) -> str:
    parts = []
    for reason, examples in sorted(each.rejected.items()):
        count = each.manifest["rejected"].get(reason, len(examples))
        parts.append(f"<div><h3>{_bdi(reason)} <small>{count:,}</small></h3>{_gallery(examples)}</div>")
    return f'<div class="reasons">{"".join(parts)}</div>'


def _pairs(alike: Lookalikes) -> str:
    gone = '<div class="card"><div class="blank">not in this corpus</div></div>'
    return "".join(
        f'<div class="pair">{_card(duplicate)}{_card(original) if original else gone}</div>' for duplicate, original in alike.pairs
    ).join(('<div class="pairs">', "</div>"))


def _gallery(examples: Sequence[Example]) -> str:
    return f'<div class="gallery">{"".join(map(_card, examples))}</div>'


def _card(example: Example) -> str:
    caption = _shown(example.caption)
    if example.image:
        encoded = base64.b64encode(example.image).decode("ascii")
        image = f'<img alt="{_text(caption) or "no caption"}" src="data:image/jpeg;base64,{encoded}">'
    else:
        image = '<div class="blank">no image</div>'
    size = f"{example.width}×{example.height}" if example.width else ""
    lines = [f"<p>{_bdi(caption)}</p>" * bool(caption), f'<p class="why">{_bdi(example.detail)}</p>' * bool(example.detail)]
    return f'<div class="card">{image}{"".join(lines)}<p class="place">{size} {_bdi(example.path or example.key)}</p></div>'


def _section(name: str, title: str, inside: str) -> str:
    return f'<section class="{name}"><h2>{_bdi(title)}</h2>{inside}</section>'


def _header(names: Sequence[str]) -> tuple[str, ...]:
    """Of a table with a column for each corpus: there is nothing to say about a single one."""
    return ("", *names) if len(names) > 1 else ("", "")


def _charts(*drawn: str) -> str:
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def _series(found: Sequence[CorpusStatistics], names: Sequence[str], pick: Callable[[CorpusStatistics], Histogram]) -> dict[str, Histogram]:
    return {name: pick(each) for name, each in zip(names, found, strict=True)}


def _suffix(name: str, found: Sequence[CorpusStatistics]) -> str:
    return f", {name}" if len(found) > 1 else ""


def _of(name: str, found: Sequence[CorpusStatistics]) -> str:
    return f"{_bdi(name)}: " if len(found) > 1 else ""


def _shown(text: str) -> str:
    """Bounded, and without what could turn the text around it: controls and the marks of writing direction."""
    kept = "".join(character for character in text[: 2 * _LONGEST_TEXT] if unicodedata.category(character)[0] != "C")
    return kept if len(kept) <= _LONGEST_TEXT else kept[:_LONGEST_TEXT] + "…"


def _text(text: str) -> str:
    return escape(_shown(text), quote=True)


def _bdi(text: str) -> str:
    return f"<bdi>{_text(text)}</bdi>"


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
