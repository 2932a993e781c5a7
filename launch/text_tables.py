"""Format results of commands as text tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

BAR_WIDTH = 32
_PIPED = 100_000  # columns where the output is not a terminal: nothing is wrapped


def describe_input_counts(out: str | Path, facts: Mapping[str, Any]) -> str:
    """Numbers of kept and rejected inputs, one line per reason."""
    lines = [f"{out}: {facts['kept']} of {facts['inputs']} inputs kept, in {count(facts['shards'], 'shard')}"]
    rejected = sorted(facts["rejected"].items(), key=lambda item: (-item[1], item[0]))
    if rejected:
        lines += ["rejected:", *_columns({reason: str(number) for reason, number in rejected})]
    return "\n".join([*lines, *(f"note: {note}" for note in facts["notes"])])


def describe_features(out: Path, facts: Mapping[str, Any]) -> str:
    """Contents of a features folder, and one line per rejection reason."""
    captions = f" with {count(facts['captions'], 'caption')}" if facts["captions"] else ""
    what = f"{count(facts['samples'], 'sample')}{captions} in {count(facts['shards'], 'shard')}, {facts['bytes'] / 1e6:.1f} MB"
    lines = [f"{out}: {what}"]
    if facts.get("cut"):
        lines.append(f"{facts['cut']} of {count(facts['captions'], 'caption')} are longer than text.max_tokens and were truncated")
    if facts["rejected"]:
        lines += ["could not be encoded:", *_columns({reason: str(number) for reason, number in facts["rejected"].items()})]
    return "\n".join(lines)


def describe_scores(corpus: str, facts: Mapping[str, Any]) -> str:
    """Number of scored samples, and mean scores."""
    earlier = facts["samples"] - facts["computed"]
    lines = [f"{corpus}: {count(facts['samples'], 'sample')} scored{f', {earlier} of them earlier' if earlier else ''}"]
    if facts["unreadable"]:
        lines.append(f"note: {facts['unreadable']} could not be read and have no scores")
    if facts["duplicates"] is not None:
        lines.append(f"semantic duplicates: {facts['duplicates']}")
    return "\n".join([*lines, *_columns({f"mean {name}": f"{mean:.4g}" for name, mean in facts["means"].items()})])


def describe_annotation(corpus: str, table: Path, facts: Mapping[str, Any], *, on: str) -> str:
    """Number of samples matched by a table, and unused rows with examples."""
    new = ", ".join(facts["columns"])
    lines = [f"{corpus}: {facts['matched']:,} of {count(facts['samples'], 'sample')} in {table}; new: {new}"]
    for number, examples, what in (
        (facts["unmatched"], facts["unmatched_examples"], f"{on} values of the table are not in the corpus"),
        (facts["damaged"], facts["damaged_examples"], "rows of the table could not be used"),
    ):
        if number:
            more = ", …" if number > len(examples) else ""
            lines.append(f"note: {number:,} {what}: {', '.join(examples)}{more}")
    return "\n".join(lines)


def describe_recipes(summaries: Mapping[str, str]) -> str:
    """Name of each recipe, and what it is."""
    return "\n".join([*_columns(summaries), "", "Print one: tim recipes show NAME"])


def describe_plan(summary: Mapping[str, Any]) -> str:
    """Format a summary of `pipeline.planning.summary.plan_summary`."""
    input_counts = summary["account"]
    steps, ranks = len(summary["steps"]), summary["ranks"]
    left_out = sum(input_counts["left_out"].values())
    facts = {
        "fill": f"{summary['fill']:.1%} of {count(summary['packs_per_step'], 'pack')} of {summary['tokens_per_pack']} tokens per step",
        "utilisation": f"{summary['utilisation']:.1%} of {count(ranks, 'rank')}"
        + (f" ({summary['utilisation_lockstep']:.1%} if they synchronise in every pack: ZeRO-2 and 3)" if ranks > 1 else ""),
        "cost": f"(n + {summary['gamma']:g} · n²/6·{summary['width']}) · "
        + ", ".join(f"{factor:.3g} ({kind})" for kind, factor in summary["cost_factors"].items()),
        "images per step": f"{summary['samples_per_step']:.1f}",
        "planned": f"{count(summary['samples'], 'image')} in {count(steps, 'step')} from step {summary['steps'][0]['index']}, "
        f"{summary['epochs']:.2f} epochs",
        "samples": f"{input_counts['samples']} of {input_counts['rows']} in the corpus",
        "left out": ", ".join([str(left_out), *(f"{reason} {number}" for reason, number in input_counts["left_out"].items())]),
        "scaled down": f"{input_counts['downscaled']} (none is scaled up); cropping to multiples of {summary['stride']} pixels removes "
        f"{input_counts['cropped_pixels']:.1%}",
    }
    if captions := summary.get("captions"):
        share = f"{captions['cut']} of {captions['sampled']} in a sample"
        facts["captions cut"] = f"{share}, at text.max_tokens {captions['max_tokens']}; the longest has {captions['longest']} tokens"
    if summary["groups"] > 1:
        facts["shards"] = f"in {summary['groups']} groups; each rank reads 1/{summary['groups_apart']} of them"
    lines = _columns(facts)
    if summary["added_packs"]:
        added = count(summary["added_packs"], "empty pack")
        lines.append(f"note: plan.packs_per_step {summary['packs_per_step']} is not a multiple of {ranks} ranks: {added} added per step")
    if summary["smaller_than_a_step"]:
        lines.append("note: the corpus is smaller than a step, so samples repeat within a step")
    if len(summary["corpora"]) > 1:
        lines += ["", "corpora", *_columns({corpus["name"]: _describe_corpus(corpus) for corpus in summary["corpora"]})]
    if len(summary["schedule"]) > 1:
        lines += ["", "schedule", *_columns({f"from step {stage['step']}": _describe_stage(stage) for stage in summary["schedule"]})]
    tokens = {f"{size} to {2 * int(size) - 1}": images for size, images in input_counts["tokens"].items()}
    lines += ["", "tokens per image", *histogram(tokens), "", "width : height", *histogram(input_counts["aspects"])]
    return "\n".join(lines)


def _describe_corpus(corpus: Mapping[str, Any]) -> str:
    left_out = ", ".join(f"{reason} {number}" for reason, number in corpus["left_out"].items())
    return (
        f"{corpus['share']:.1%} of the images, {corpus['epochs']:.2f} epochs of {corpus['samples']} samples; "
        f"left out: {left_out or 'none'} of {corpus['rows']}"
    )


def _describe_stage(stage: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in stage["shares"].items())
    kinds = f"r = t in {stage['diffusion_share']:.0%} and r = 0 in {stage['consistency_share']:.0%} of the images"
    return f"at most {stage['max_tokens']} tokens per image, {count(stage['packs_per_step'], 'pack')} per step; {shares}; {kinds}"


def describe_bench(data: Mapping[str, Any]) -> str:
    """Format benchmark results, one line per figure; groups are indented."""
    lines = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            lines += [
                f"  {name.replace('_', ' ')}",
                *(f"  {line}" for line in _columns({key: _figure(item) for key, item in value.items()})),
            ]
        else:
            lines += _columns({name.replace("_", " "): _figure(value)})
    return "\n".join(lines)


def describe_fit(data: Mapping[str, Any]) -> str:
    """Format the fitted cost model as lines for a config."""
    factors = ", ".join(f"{factor:.3f}" for factor in data["cost_factors"])
    return "\n".join(
        [
            f"# {data['device']}, {data['precision']}, width {data['width']}: largest error {data['largest_error']:.1%}",
            "plan:",
            f"  gamma: {data['gamma']:.3f}",
            f"  cost_factors: [{factors}] # r = t, r = 0, r < t",
        ]
    )


def histogram(counts: Mapping[str, int]) -> list[str]:
    """One line per bin: label, bar, count."""
    if not counts:
        return []
    label_width = max(len(label) for label in counts)
    largest = max(counts.values())
    bars = {label: "█" * max(1, round(number / largest * BAR_WIDTH)) for label, number in counts.items()}
    return [f"  {label:>{label_width}}  {bars[label]:<{BAR_WIDTH}} {number}" for label, number in counts.items()]


def count(number: int, noun: str) -> str:
    """`count(2, "shard")` → "2 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_figure(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _columns(facts: Mapping[str, str]) -> list[str]:
    """A line for each fact; on a terminal, long ones are wrapped beside their names."""
    width = max((len(name) for name in facts), default=0)
    columns = get_terminal_size().columns if sys.stdout.isatty() else _PIPED
    room = max(40, columns - width - 4)
    lines = []
    for name, text in facts.items():
        first, *rest = wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {name:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in rest)]
    return lines
