"""The arguments and options of `tim eval`, as typed; those of models are the options of `tim sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch.sampling.typed_options import TypedModel
from tim.model_kinds import MODEL_FORMS

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_FORMS}.")]
Corpus = Annotated[str | None, typer.Option(metavar="CORPUS", help="The prepared corpus whose images are the real ones.")]
Compare = Annotated[tuple[str, str] | None, typer.Option(metavar="MODEL MODEL", help="Two models, instead of MODEL: which is better?")]
Steps = Annotated[str, typer.Option(metavar="N[,N]...", help="Numbers of sampling steps.")]
Images = Annotated[int | None, typer.Option(min=8, metavar="N", help="Images for each number of steps. Default: 512, or all samples.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the choice of samples and the noise.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, metavar="N", help="Largest area of an image. Default: that of the run's plan.")]
Features = Annotated[
    list[str] | None,
    typer.Option(
        metavar="EXTRACTOR",
        help="pixels (no weights), inception=FILE, open_clip=FOLDER, open_clip=ARCHITECTURE:FILE or hf=FOLDER; may be repeated. "
        "Default: pixels.",
    ),
]
Metrics = Annotated[str | None, typer.Option(metavar="NAME[,NAME]...", help="Metrics. Default: all that the features and prompts allow.")]
Clip = Annotated[str | None, typer.Option(metavar="EXTRACTOR", help="Model of the CLIP score, in a form of --features.")]
Memorised = Annotated[int, typer.Option(min=0, metavar="N", help="Images of the corpus among which to look for copies; 0: do not look.")]
Resamples = Annotated[int, typer.Option(min=8, metavar="N", help="Resamples for an interval.")]
SaveImages = Annotated[bool, typer.Option("--save-images", help="Keep all images, not only those of the grid.")]
RealFeatures = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Instead of MODEL: features of real images, .npy or .safetensors, a row for each image.")
]
GeneratedFeatures = Annotated[Path | None, typer.Option(metavar="FILE", help="With --real-features: those of generated images.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]


@dataclass(frozen=True, slots=True)
class Typed(TypedModel):
    """The values of a command line, by the names of the options."""

    model: str | None
    corpus: str | None
    compare: tuple[str, str] | None
    steps: str
    guidance: str | None
    images: int | None
    seed: int
    max_pixels: int | None
    features: list[str] | None
    metrics: str | None
    clip: str | None
    memorised: int
    resamples: int
    save_images: bool
    real_features: Path | None
    generated_features: Path | None
    out: Path
    processes: int | None
