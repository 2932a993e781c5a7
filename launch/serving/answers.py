"""What the API answers with."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from launch.serving.jobs import Result, State
from launch.serving.studio import Studio


class ErrorAnswer(BaseModel):
    """Why a request was refused or failed."""

    error: Annotated[str, Field(description="One sentence.")]


class ImageAnswer(BaseModel):
    """A drawn image."""

    id: str
    url: Annotated[str, Field(description="Path of the PNG file on this server; .jpeg, .webp and .avif are there too.")]
    width: int
    height: int
    settings: Annotated[dict[str, Any], Field(description="The parameters that its file records; `tim sample --like FILE` repeats it.")]
    seconds: Annotated[float, Field(description="Since the pack began that it shared with its neighbours.")]
    evaluations: Annotated[int, Field(description="Network forwards, with those for guidance.")]
    neighbours: Annotated[int, Field(description="Other images in its pack.")]
    peak_memory_bytes: Annotated[int, Field(description="The most in use meanwhile: of the GPU, or of the server's process.")]
    data: Annotated[str | None, Field(description="The PNG file in base64, with embed=true.")] = None

    @classmethod
    def of(cls, result: Result, *, base: str, data: str | None) -> ImageAnswer:
        """base: path of a proxy in front of this server; data: the file in base64, if it is wanted."""
        return cls(
            id=result.image_id,
            url=f"{base}/api/images/{result.image_id}.png",
            width=result.settings.width,
            height=result.settings.height,
            settings=result.settings.as_dict(),
            seconds=round(result.seconds, 3),
            evaluations=result.evaluations,
            neighbours=result.neighbours,
            peak_memory_bytes=result.memory,
            data=data,
        )


class StepAnswer(BaseModel):
    """How far a job is."""

    image: Annotated[int, Field(description="Number of finished images.")]
    images: int
    step: Annotated[int, Field(description="Steps taken, in the pack in hand.")]
    steps: int
    previews: Annotated[list[str] | None, Field(description="Small PNGs of the pack's images so far, in base64.")] = None


class JobAnswer(BaseModel):
    """The state of a request."""

    id: str
    state: State
    position: Annotated[int | None, Field(description="Number of requests that are drawn before it.")] = None
    progress: StepAnswer | None = None
    images: Annotated[list[ImageAnswer], Field(description="Those that are finished.")] = []
    error: str | None = None
    remarks: Annotated[list[str], Field(description="For people, for example about a prompt that is cut.")] = []


class ParametersAnswer(BaseModel):
    """What an image file records."""

    settings: dict[str, Any]


class HealthAnswer(BaseModel):
    """The state of the server, with numbers since it started."""

    status: Annotated[Literal["ok", "stopping or failed"], Field(description="ok: it draws. Else the answer has status 503.")]
    version: Annotated[str, Field(description="Of tim.")]
    waiting: Annotated[int, Field(description="Number of requests in the queue.")]
    clients: Annotated[int, Field(description="Number of clients whose requests they are.")]
    is_drawing: Annotated[bool, Field(description="Whether a request is being drawn.")]
    finished: Annotated[int, Field(description="Number of requests that were drawn.")]
    cancelled: Annotated[int, Field(description="Number of requests that were cancelled while they were drawn.")]
    failed: Annotated[int, Field(description="Number of requests that could not be drawn.")]
    images: Annotated[int, Field(description="Number of images that were drawn.")]
    uptime_seconds: float

    @classmethod
    def of(cls, studio: Studio) -> HealthAnswer:
        """The state of a studio."""
        state = studio.status()._asdict()
        is_working, seconds = state.pop("is_working"), state.pop("seconds")
        return cls(status="ok" if is_working else "stopping or failed", version=version("tim"), uptime_seconds=round(seconds, 1), **state)


class ModelAnswer(BaseModel):
    """The model and the server."""

    name: str
    digest: Annotated[str, Field(description="sha256 of its description, with the digests of its weights.")]
    kind: Annotated[Literal["text", "class"], Field(description="Whether prompts are texts or classes.")]
    classes: Annotated[int | None, Field(description="Number of classes of a class model.")]
    defaults: Annotated[dict[str, Any], Field(description="Steps, guidance and interval of a request that names none.")]
    stride: Annotated[int, Field(description="Images are drawn at the next multiples of so many pixels, and cropped.")]
    device: str
    dtype: str
    limits: dict[str, int]

    @classmethod
    def of(cls, studio: Studio) -> ModelAnswer:
        """The model and the limits of a studio."""
        generator, facts = studio.generator, studio.facts
        return cls(
            name=facts.name,
            digest=facts.digest,
            kind="text" if generator.network.classes is None else "class",
            classes=generator.network.classes,
            defaults={name: generator.spec.sampling[name] for name in ("steps", "guidance", "interval")},
            stride=generator.stride,
            device=facts.device,
            dtype=facts.dtype,
            limits=asdict(studio.limits),
        )
