"""`tim finetune`: fine-tune a model on a folder of images with one command."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import split_overrides
from launch.command_options import Debug, Json
from launch.console import session
from launch.logs.startup import STARTUP
from launch.text_tables import count
from tim.model_kinds import MODEL_FORMS


def finetune(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES... [KEY=VALUE]...",
            help="Image folders, lists or shards as for tim prepare, or a prepared corpus; and overrides of the training config.",
        ),
    ],
    base: Annotated[str, typer.Option("--from", metavar="MODEL", help=f"The model, which describes itself: {MODEL_FORMS}.")],
    out: Annotated[Path, typer.Option(help="Run folder: new, or of an earlier call, which is continued. The new model is OUT/model.")],
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters (LoRA) instead of all weights, which needs less memory.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model on your own images.

    Prepares the images, encodes them, and trains with defaults that follow from the model and the number of images. Run the same command
    again to continue. Settings of the preparation: prepare a corpus with tim prepare, and give it as IMAGES.

    Example: tim finetune photos --from models/base --out runs/mine

    Example: tim finetune photos --from models/base --out runs/mine --lora train.steps=800 text.caption_dropout=0.05
    """
    with session(as_json=as_json, debug=debug) as console, STARTUP.shown("importing torch"):
        from launch.finetune_job import finetune as run

        sources, overrides = split_overrides(images)
        if not sources:
            raise ValueError("no images: give a folder, for example tim finetune photos --from models/base --out runs/mine")
        done = run(sources, base=base, out=out, lora=lora, overrides=overrides, debug=debug, console=console)
        following = shlex.join(["tim", "sample", str(done.run_dir), "--prompt", "PROMPT", "--size", "WIDTHxHEIGHT"])
        data = {"run": done.run_dir, **{name: value for name, value in asdict(done).items() if name not in ("run_dir", "last_row")}}
        console.result(
            f"{done.model}: fine-tuned for {count(done.steps, 'step')} on {count(done.images, 'image')}\nNext: {following}",
            data={**data, "last": done.last_row},
        )
