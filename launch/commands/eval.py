"""`tim eval`."""

from __future__ import annotations

from pathlib import Path

import typer

from launch.command_options import Debug, Json, typed_again
from launch.console import session
from launch.evaluation import typed_options as options
from launch.sampling import typed_options as sampling


def eval(
    context: typer.Context,
    model: options.Model = None,
    corpus: options.Corpus = None,
    compare: options.Compare = None,
    steps: options.Steps = "1,2,4,8",
    guidance: sampling.Scales = None,
    images: options.Images = None,
    seed: options.Seed = 0,
    max_pixels: options.MaxPixels = None,
    features: options.Features = None,
    metrics: options.Metrics = None,
    clip: options.Clip = None,
    memorised: options.Memorised = 2048,
    resamples: options.Resamples = 64,
    save_images: options.SaveImages = False,
    real_features: options.RealFeatures = None,
    generated_features: options.GeneratedFeatures = None,
    out: options.Out = Path("evaluation"),
    recipe: sampling.Recipe = None,
    codec: sampling.Codec = None,
    text: sampling.Text = None,
    tokenizer: sampling.TextTokenizer = None,
    lora: sampling.Loras = None,
    device: sampling.Device = None,
    dtype: sampling.Precision = None,
    memory_gb: sampling.MemoryGB = None,
    processes: sampling.Processes = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure image quality by steps, size and aspect ratio.

    Draws samples of a corpus with their captions, at their own sizes, and compares features with those of the real images. Writes a table,
    a plot, a grid and eval.json. The same command goes on with an evaluation that was cut short.

    Example: tim eval runs/first --corpus corpus --steps 1,2,4,8 --out evaluation
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.evaluation.command import run

        run(options.Typed.of(context.params), arguments=typed_again(context), console=console)
