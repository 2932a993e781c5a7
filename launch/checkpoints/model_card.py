"""README.md of an exported model: what it is, what it was trained on, and how."""

from __future__ import annotations

from typing import Any

import yaml

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import Checkpoint
from launch.checkpoints.evaluation_results import evaluation_folder, read_results, table
from launch.config.schema import Config

_SECTIONS = ("plan", "codec", "text", "network", "objective", "train")


def model_card(config: Config, found: Checkpoint, *, weights: str, dtype: str, parameters: int) -> str:
    """The card of a model exported from a checkpoint, in Markdown with a header as on the Hugging Face hub."""
    is_text = config.condition == "text"
    header = {"library_name": "tim", "pipeline_tag": "text-to-image" if is_text else "unconditional-image-generation"}
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {'Text-to-image' if is_text else 'Class-to-image'} Transition Model",
        "",
        "| | |",
        "| --- | --- |",
        f"| weights | {weights}, {dtype} |",
        f"| parameters | {parameters:,} |",
        f"| steps | {found.metadata.step:,} of {config.train.steps:,} |",
        *(f"| {name} | {value} |" for name, value in _trained(found).items()),
        f"| codec | {config.codec.kind} |",
        f"| conditioned on | {f'text ({config.text.kind})' if is_text else 'classes'} |",
        f"| transport | {config.objective.transport} |",
        "",
        "## Training data",
        "",
        "| corpus | digest |",
        "| --- | --- |",
        *(f"| {name} | `{digest}` |" for name, digest in _corpora(config, found).items()),
        "",
        *_evaluation(found),
        "## Recipe",
        "",
        "```yaml",
        _recipe(config),
        "```",
        "",
        "## Use",
        "",
        "```python",
        "from tim import Generator",
        "",
        'images = Generator.from_pretrained("FOLDER")(PROMPT, height=512, width=768)',
        "```",
        "",
    ]
    return "\n".join(lines)


def _trained(found: Checkpoint) -> dict[str, str]:
    """Images and tokens trained, if the checkpoint counts them."""
    total = _state(found).get("meter", {}).get("total", {})
    return {f"{name} trained": f"{total[name]:,}" for name in ("images", "tokens") if name in total}


def _corpora(config: Config, found: Checkpoint) -> dict[str, str]:
    """Digest of each corpus by name, as the checkpoint's plan has them."""
    identities = _state(found).get("data", {}).get("inputs", {}).get("corpora", [])
    if identities:
        return {str(identity[0]): str(identity[1]) for identity in identities}
    return {str(corpus.name or corpus.path): "unknown" for corpus in config.corpus}


def _evaluation(found: Checkpoint) -> list[str]:
    """The table of the run's evaluation of this step, if there is one."""
    rows = read_results(evaluation_folder(found.folder.parents[1], found.metadata.step))
    if not rows:
        return []
    images = max(row["images"] for row in rows)
    about = (
        f"By `tim eval`, averaged weights, {images:,} images for each number of steps; in brackets 95 % intervals. "
        "Compare distances only with those of as many images of the same corpus."
    )
    return ["## Evaluation", "", about, "", *table(rows), ""]


def _recipe(config: Config) -> str:
    """The sections that affect the weights, without values at their defaults."""
    content = config.model_dump(mode="json", include=set(_SECTIONS), exclude_defaults=True)
    return yaml.safe_dump({name: content[name] for name in _SECTIONS if name in content}, sort_keys=False).strip()


def _state(found: Checkpoint) -> dict[str, Any]:
    """The trainer's state; empty in checkpoints that hold weights only."""
    return checkpoint.read_trainer_state(found.folder) if (found.folder / checkpoint.TRAINER_STATE).is_file() else {}
