"""The arguments and options of `tim sample`, as typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from tim.model_kinds import MODEL_FORMS, Dtype

if TYPE_CHECKING:
    from typing_extensions import Self

FormatName: TypeAlias = Literal["png", "jpeg", "webp", "avif"]
LayoutName: TypeAlias = Literal["geneval", "geneval2", "dpg", "mjhq"]

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_FORMS}. Default: that of --like.")]
Texts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts.")]
Prompt = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be repeated.")]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE|-", help="Prompts of a txt, jsonl, csv or parquet file, with settings per row, or of standard input."),
]
Classes = Annotated[
    list[int] | None, typer.Option("--class", min=0, metavar="ID", help="Class to sample, for a class model; may be repeated.")
]
Size = Annotated[str | None, typer.Option(metavar="WxH[,WxH]...", help="Widths and heights in pixels, each drawn exactly.")]
Aspect = Annotated[str | None, typer.Option(metavar="W:H", help="Instead of --size: the aspect ratio, for example 21:9.")]
Megapixels = Annotated[float | None, typer.Option(metavar="N", help="With --aspect: the area; 1 is 1024 x 1024 pixels. Default: 1.")]
Steps = Annotated[str | None, typer.Option(metavar="N[,N]...", help="Numbers of sampling steps. Default: the model's.")]
Scales = Annotated[str | None, typer.Option(metavar="S[,S]...", help="Guidance scales; 1: no guidance. Default: the model's.")]
Seeds = Annotated[str, typer.Option(metavar="N[,N]...", help="Random seeds; equal seeds give equal images.")]
Count = Annotated[int | None, typer.Option(min=1, help="Number of images per prompt, with seeds S, S + 1, and so on. Default: 1.")]
Zipped = Annotated[bool, typer.Option("--zip", help="The n-th prompt with the n-th size, steps, guidance and seed.")]
Negative = Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt. Default: the unconditional input.")]
Interval = Annotated[
    str | None, typer.Option(metavar="LOW,HIGH", help="Times at which guidance acts, as shares of the noisiest time, ends included.")
]
Times = Annotated[str | None, typer.Option(metavar="T,T[,T]...", help="Sampling times instead of --steps: 1 (noise) to 0 for ot_fm.")]
Stochasticity = Annotated[float, typer.Option(min=0, help="Noise added in all but the first and the last step; ot_fm only.")]
InitialImage = Annotated[Path | None, typer.Option(metavar="FILE", help="Image to start from.")]
Mask = Annotated[Path | None, typer.Option(metavar="FILE", help="With --image: what is white is drawn anew, what is black stays.")]
Extend = Annotated[str | None, typer.Option(metavar="L,T,R,B", help="With --image: pixels to add at the left, top, right and bottom.")]
Strength = Annotated[
    float | None, typer.Option(metavar="X", help="With --image: share of noise to start from, up to 1. Default: 0.6; with --mask 1.")
]
Feather = Annotated[int, typer.Option(min=0, metavar="PIXELS", help="Half the width of the soft transition inside the mask.")]
Interpolate = Annotated[int, typer.Option(min=0, metavar="N", help="Number of images between each two prompts.")]
Variations = Annotated[int, typer.Option(min=0, metavar="N", help="Number of images near that of each seed, in its place.")]
Share = Annotated[float, typer.Option(min=0, max=1, metavar="X", help="With --variations: distance, 0 (the same) to 1 (unrelated).")]
Like = Annotated[Path | None, typer.Option(metavar="IMAGE", help="Repeat an image that tim sample wrote, from its metadata.")]
Out = Annotated[Path, typer.Option(help="Folder for the images.")]
Format = Annotated[FormatName, typer.Option(help="Format of the files.")]
Quality = Annotated[int | None, typer.Option(min=1, max=100, help="Of JPEG, WebP and AVIF. Default: the format's.")]
Lossless = Annotated[bool, typer.Option("--lossless", help="With --format webp: lose nothing.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Write no prompt and no settings into the files.")]
BenchmarkLayout = Annotated[LayoutName | None, typer.Option(help="Name the files as the evaluator of a benchmark reads them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Draw images again that are in the folder.")]
Recipe = Annotated[str | None, typer.Option(metavar="NAME", help="With a weight file: the recipe or YAML file of its network.")]
Codec = Annotated[str | None, typer.Option(metavar="[KIND=]PATH", help="Path of the codec, instead of the model's.")]
Text = Annotated[str | None, typer.Option(metavar="[KIND=]PATH", help="Path of the text encoder, instead of the model's.")]
TextTokenizer = Annotated[str | None, typer.Option(metavar="PATH", help="Path of the tokenizer. Default: that of the text encoder.")]
Loras = Annotated[
    list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="LoRA file or PEFT folder to merge, and its strength; may be repeated.")
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N. Default: the GPU if there is one.")]
Precision = Annotated[
    Dtype | None, typer.Option(help="Precision of the network's matrix products. Default: fp16 on a GPU, fp32 on the CPU.")
]
MemoryGB = Annotated[float | None, typer.Option(metavar="GB", help="Limit of the memory for activations. Slower where it binds.")]
Processes = Annotated[int | None, typer.Option(min=1, help="Number of processes that share the images. Default: one per GPU, or 1.")]


@dataclass(frozen=True, slots=True)
class TypedModel:
    """The values of the options that say what a model is made of and how it runs; of every command that draws."""

    recipe: str | None
    codec: str | None
    text: str | None
    tokenizer: str | None
    lora: list[str] | None
    device: str | None
    dtype: Dtype | None
    memory_gb: float | None

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Self:
        """From all parameters of the command."""
        return cls(**{field.name: parameters[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Typed(TypedModel):
    """The values of a command line, by the names of the options above.

    given: names of those that are not defaults.
    """

    given: frozenset[str]
    model: str | None
    texts: list[str] | None
    prompt: list[str] | None
    prompts: str | None
    classes: list[int] | None
    size: str | None
    aspect: str | None
    megapixels: float | None
    steps: str | None
    guidance: str | None
    seed: str
    count: int | None
    zipped: bool
    negative: str | None
    interval: str | None
    times: str | None
    stochasticity: float
    image: Path | None
    mask: Path | None
    extend: str | None
    strength: float | None
    feather: int
    interpolate: int
    variations: int
    variation_share: float
    like: Path | None
    out: Path
    format: FormatName
    quality: int | None
    lossless: bool
    no_metadata: bool
    layout: LayoutName | None
    overwrite: bool
    processes: int | None

    def option(self, name: str) -> str:
        """The option of a name, as it is typed."""
        return {"zipped": "--zip", "classes": "--class"}.get(name, f"--{name.replace('_', '-')}")
