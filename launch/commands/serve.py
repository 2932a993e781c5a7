"""`tim serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from launch.command_options import Debug, Json
from launch.console import session
from launch.sampling import typed_options as options
from tim.model_kinds import MODEL_FORMS

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The model: {MODEL_FORMS}.")]
Host = Annotated[str, typer.Option(help="Address to listen at. Others than those of this machine alone need a password.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen at; 0: any free one.")]
Password = Annotated[str | None, typer.Option(help="Password of page and API. Default: that of the variable TIM_PASSWORD, or none.")]
PasswordFile = Annotated[Path | None, typer.Option(metavar="FILE", help="File whose first line is the password.")]
NoPassword = Annotated[bool, typer.Option("--no-password", help="Let other machines in without a password.")]
AllowHost = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Further host name of this server; may be repeated.")]
Proxy = Annotated[list[str] | None, typer.Option(metavar="ADDRESS", help="Proxy whose X-Forwarded headers count; may be repeated.")]
MaxSide = Annotated[int, typer.Option(min=16, max=65_536, help="Limit of a side of an image, in pixels.")]
MaxMegapixels = Annotated[float, typer.Option(min=0.001, max=16, help="Limit of the area; 1 is 1024 x 1024 pixels.")]
MaxSteps = Annotated[int, typer.Option(min=1, max=10_000, help="Limit of the sampling steps.")]
MaxPrompt = Annotated[int, typer.Option(min=1, max=1_000_000, help="Limit of a prompt, in characters.")]
MaxCount = Annotated[int, typer.Option(min=1, max=1000, help="Limit of the images of a request.")]
MaxUpload = Annotated[int, typer.Option(min=1, max=1000, metavar="MB", help="Limit of an uploaded file.")]
MaxQueue = Annotated[int, typer.Option(min=1, max=10_000, help="Limit of the requests that wait.")]
MaxPerClient = Annotated[int, typer.Option(min=1, max=10_000, help="Limit of the requests of one client that wait.")]
PerMinute = Annotated[int, typer.Option("--requests-per-minute", min=1, max=100_000, help="Limit of the requests of one client.")]


def serve(
    context: typer.Context,
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    password: Password = None,
    password_file: PasswordFile = None,
    no_password: NoPassword = False,
    allow_host: AllowHost = None,
    proxy: Proxy = None,
    max_side: MaxSide = 4096,
    max_megapixels: MaxMegapixels = 16.0,
    max_steps: MaxSteps = 128,
    max_prompt: MaxPrompt = 4000,
    max_count: MaxCount = 16,
    max_upload: MaxUpload = 64,
    max_queue: MaxQueue = 64,
    max_per_client: MaxPerClient = 4,
    per_minute: PerMinute = 60,
    recipe: options.Recipe = None,
    codec: options.Codec = None,
    text: options.Text = None,
    tokenizer: options.TextTokenizer = None,
    lora: options.Loras = None,
    device: options.Device = None,
    dtype: options.Precision = None,
    memory_gb: options.MemoryGB = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw images in the browser and over a JSON API.

    The page is at the address that is printed, the API at /api, its reference at /docs. Only this machine can connect unless --host says
    otherwise. Nothing is sent anywhere.

    Example: tim serve runs/first --port 7860
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.sampling.model_source import ModelOptions
        from launch.serving.command import ServeOptions, run
        from launch.serving.limits import Limits

        if debug:
            logging.getLogger("launch.serving").setLevel(logging.DEBUG)
        limits = Limits(
            max_side=max_side,
            max_pixels=int(max_megapixels * 1024 * 1024),
            max_steps=max_steps,
            max_prompt=max_prompt,
            max_count=max_count,
            max_upload_mb=max_upload,
            max_queue=max_queue,
            max_per_client=max_per_client,
            requests_per_minute=per_minute,
        )
        served = ServeOptions(host, port, password, password_file, allow_host or (), no_password, proxy or (), limits)
        run(served, model=ModelOptions.typed(model, options.TypedModel.of(context.params)), console=console)
