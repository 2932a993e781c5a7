"""`tim sample`."""

from __future__ import annotations

from pathlib import Path

import typer

from launch.command_options import Debug, Json, names_given, typed_again
from launch.console import session
from launch.sampling import typed_options as options


def sample(
    context: typer.Context,
    model: options.Model = None,
    texts: options.Texts = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    classes: options.Classes = None,
    size: options.Size = None,
    aspect: options.Aspect = None,
    megapixels: options.Megapixels = None,
    steps: options.Steps = None,
    guidance: options.Scales = None,
    seed: options.Seeds = "0",
    count: options.Count = None,
    zipped: options.Zipped = False,
    negative: options.Negative = None,
    interval: options.Interval = None,
    times: options.Times = None,
    stochasticity: options.Stochasticity = 0.0,
    image: options.InitialImage = None,
    mask: options.Mask = None,
    extend: options.Extend = None,
    strength: options.Strength = None,
    feather: options.Feather = 8,
    interpolate: options.Interpolate = 0,
    variations: options.Variations = 0,
    variation_share: options.Share = 0.2,
    like: options.Like = None,
    out: options.Out = Path("samples"),
    format: options.Format = "png",
    quality: options.Quality = None,
    lossless: options.Lossless = False,
    no_metadata: options.NoMetadata = False,
    layout: options.BenchmarkLayout = None,
    overwrite: options.Overwrite = False,
    recipe: options.Recipe = None,
    codec: options.Codec = None,
    text: options.Text = None,
    tokenizer: options.TextTokenizer = None,
    lora: options.Loras = None,
    device: options.Device = None,
    dtype: options.Precision = None,
    memory_gb: options.MemoryGB = None,
    processes: options.Processes = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sample images at any size.

    Draws every prompt at every size, number of steps, guidance scale and seed, packed together. Each image is written when it is finished,
    and listed in samples.jsonl; grid.png has all of them. The same command goes on with a list that was cut short.

    Example: tim sample runs/first "a red fox" --size 512x128,256x256 --steps 1,4,8 --out samples
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.sampling.command import run

        typed = options.Typed.of({**context.params, "given": names_given(context)})
        run(typed, arguments=typed_again(context), console=console)
