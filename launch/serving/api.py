"""The JSON API: draw, follow, cancel, fetch. Every error is {"error": sentence}."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from launch.sampling.files.formats import image_format
from launch.sampling.files.image_files import encode_image
from launch.sampling.files.names import file_name
from launch.serving.answers import ErrorAnswer, ImageAnswer, JobAnswer, ModelAnswer, ParametersAnswer, StepAnswer
from launch.serving.drawing import DrawRequest
from launch.serving.jobs import Event, Failed, Finished, Job, Progress, Result, Waiting
from launch.serving.limits import Busy
from launch.serving.studio import Studio
from pipeline.errors import one_line

FormatName: TypeAlias = Literal["png", "jpeg", "webp", "avif"]
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The body is not JSON"},
    404: {"model": ErrorAnswer, "description": "Unknown, or dropped for newer ones"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    422: {"model": ErrorAnswer, "description": "A value cannot be used, or exceeds a limit"},
    429: {"model": ErrorAnswer, "description": "Too many requests; Retry-After says when to try again"},
    503: {"model": ErrorAnswer, "description": "The images could not be drawn, or the server is stopping"},
}
_POLL_SECONDS = 0.05
_QUIET_SECONDS = 15.0  # after which a stream of events sends a comment, so that proxies keep it open

JobId = Annotated[str, Path(max_length=64, description="The id that POST /api/draw returned.")]
ImageId = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$", description="The id of an image.")]
Wait = Annotated[bool, Query(description="Answer when the images are drawn; false: at once, with the job's id.")]
Embed = Annotated[bool, Query(description="Put the PNG files into the answer, in base64.")]
Previews = Annotated[bool, Query(description="Put small PNGs of the images so far into the events, in base64.")]


def api(studio: Studio) -> APIRouter:
    """The routes of the API."""
    router = APIRouter(prefix="/api", responses=ERRORS)
    _add_jobs(router, studio)
    _add_files(router, studio)
    return router


def _add_jobs(router: APIRouter, studio: Studio) -> None:
    """Requests and their state."""

    @router.get("/model")
    def model() -> ModelAnswer:
        """The model, its defaults, and the limits of this server."""
        return ModelAnswer.of(studio)

    @router.post("/draw", responses={202: {"model": JobAnswer, "description": "In the queue (wait=false)"}})
    async def draw(body: DrawRequest, request: Request, wait: Wait = True, embed: Embed = False) -> JobAnswer:
        """Draw images. A client that closes the connection cancels its request."""
        job = await run_in_threadpool(_refusing, lambda: studio.submit(body, client=client_of(request)))
        if not wait:
            return JSONResponse(_answer(job).model_dump(mode="json"), status_code=202)  # pyright: ignore[reportReturnType]
        event = await _end(job, request)
        if isinstance(event, Failed):
            raise HTTPException(503, event.sentence)
        return await run_in_threadpool(_answer, job, embed=embed)

    @router.get("/jobs/{job_id}")
    def job(job_id: JobId) -> JobAnswer:
        """The state of a job. One that nobody asks about for a minute is cancelled."""
        return _answer(_job(studio, job_id))

    @router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
    async def events(job_id: JobId, previews: Previews = False) -> StreamingResponse:
        """Server-sent events `waiting`, `progress`, and at the end `finished` or `failed`; the data of each is the state of the job."""
        return StreamingResponse(_stream(_job(studio, job_id), previews=previews), media_type="text/event-stream")

    @router.delete("/jobs/{job_id}")
    def cancel(job_id: JobId) -> JobAnswer:
        """Cancel a job: at once if it waits, at its next step if it is being drawn."""
        found = _job(studio, job_id)
        found.cancel()
        return _answer(found)


def _add_files(router: APIRouter, studio: Studio) -> None:
    """Images, and what they record."""

    @router.get("/images/{image_id}.{format}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
    def image(image_id: ImageId, format: FormatName, request: Request, download: bool = False) -> Response:
        """A drawn image as a file that records its parameters. Kept until newer images need the room."""
        found = studio.result(image_id)
        if found is None:
            raise HTTPException(404, "image: unknown, or dropped for newer ones")
        if format != "png":
            _refusing(lambda: studio.rate.take(client_of(request)))
        data = found.png if format == "png" else _refusing(lambda: _encoded(found, format))
        name = file_name(found.settings, index=0, suffix=f".{format}")
        disposition = f"{'attachment' if download else 'inline'}; filename*=utf-8''{quote(name)}"
        return Response(data, media_type=f"image/{format}", headers={"Content-Disposition": disposition})

    body_of_file = {"requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}

    @router.post("/parameters", openapi_extra=body_of_file)
    async def parameters(request: Request) -> ParametersAnswer:
        """The parameters that an image file records; the body is the file."""
        data = await request.body()

        def read() -> ParametersAnswer:
            studio.rate.take(client_of(request))
            return ParametersAnswer(settings=studio.uploads.settings(data, named="image").as_dict())

        return await run_in_threadpool(_refusing, read)


def client_of(request: Request) -> str:
    """Whose share of the queue a request takes: its address."""
    return request.client.host if request.client else ""


def _refusing(action: Callable[[], Any]) -> Any:
    """The result of an action. What it refuses is an answer to the client."""
    try:
        return action()
    except Busy as busy:
        code = 503 if busy.is_final else 429
        raise HTTPException(code, str(busy), headers={"Retry-After": str(busy.seconds)}) from busy
    except ValueError as error:
        raise HTTPException(422, one_line(error, limit=800)) from error


def _job(studio: Studio, job_id: str) -> Job:
    found = studio.job(job_id)
    if found is None:
        raise HTTPException(404, "job: unknown, or dropped for newer ones")
    return found


async def _end(job: Job, request: Request) -> Event:
    """Wait for the last event. Cancels the job if the client closes the connection."""
    while True:
        event = job.latest()[1]
        if isinstance(event, (Finished, Failed)):
            return event
        if await request.is_disconnected():
            job.cancel()
        await asyncio.sleep(_POLL_SECONDS)


async def _stream(job: Job, *, previews: bool) -> AsyncIterator[str]:
    """Server-sent events, up to the last one."""
    seen, quiet = -1, 0.0
    while True:
        version, event = job.latest()
        if version != seen:
            seen, quiet = version, 0.0
            answer = await run_in_threadpool(_answer, job, previews=previews)
            yield f"event: {type(event).__name__.lower()}\ndata: {answer.model_dump_json()}\n\n"
            if isinstance(event, (Finished, Failed)):
                return
        elif quiet >= _QUIET_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(_POLL_SECONDS)
        quiet += _POLL_SECONDS


def _answer(job: Job, *, embed: bool = False, previews: bool = False) -> JobAnswer:
    """The state of a job. embed: with the files of its images; previews: with small ones of those in hand."""
    event = job.latest()[1]
    results = event.results if isinstance(event, (Progress, Finished)) else ()
    progress = None
    if isinstance(event, Progress):
        small = [_base64(_png(preview)) for preview in event.previews] if previews else None
        progress = StepAnswer(image=event.image, images=event.images, step=event.step, steps=event.steps, previews=small)
    return JobAnswer(
        id=job.id,
        state=job.state,
        position=event.position if isinstance(event, Waiting) else None,
        progress=progress,
        images=[ImageAnswer.of(result, data=_base64(result.png) if embed else None) for result in results],
        error=event.sentence if isinstance(event, Failed) else None,
        remarks=list(job.remarks),
    )


def _encoded(result: Result, name: str) -> bytes:
    return encode_image(result.image, result.settings, form=image_format(name))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
