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
from launch.sampling.files.names import file_name
from launch.serving.answers import ErrorAnswer, HealthAnswer, ImageAnswer, JobAnswer, ModelAnswer, ParametersAnswer, StepAnswer
from launch.serving.http.clients import client_of
from launch.serving.jobs import CANCELLED, STOPPING, Event, Failed, Finished, Job, Progress, Waiting
from launch.serving.limits import Busy
from launch.serving.requests import NotJson, parsed
from launch.serving.studio import Studio
from pipeline.errors import one_line

FormatName: TypeAlias = Literal["png", "jpeg", "webp", "avif"]
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The body is not JSON"},
    401: {"model": ErrorAnswer, "description": "No password, or a wrong one"},
    403: {"model": ErrorAnswer, "description": "An unknown host name, or a page of another site"},
    404: {"model": ErrorAnswer, "description": "Unknown, or dropped for newer ones"},
    408: {"model": ErrorAnswer, "description": "The body took too long to arrive"},
    409: {"model": ErrorAnswer, "description": "The request was cancelled"},
    413: {"model": ErrorAnswer, "description": "The body is too large"},
    415: {"model": ErrorAnswer, "description": "The body is not sent as application/json"},
    422: {"model": ErrorAnswer, "description": "A value cannot be used, or exceeds a limit"},
    429: {"model": ErrorAnswer, "description": "Too many requests; Retry-After says when to try again"},
    500: {"model": ErrorAnswer, "description": "The images could not be drawn"},
    503: {"model": ErrorAnswer, "description": "The server is stopping; Retry-After says when to try again"},
}
_BODY = "#/components/schemas/DrawRequest"  # see `launch.serving.app`
_MOST_EMBEDDED = 16 * 1024 * 1024  # pixels whose files are put into an answer
_POLL_SECONDS = 0.05
_QUIET_SECONDS = 15.0  # after which a stream of events sends a comment, so that proxies keep it open

JobId = Annotated[str, Path(max_length=64, description="The id that POST /api/draw returned.")]
ImageId = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$", description="The id of an image.")]
Wait = Annotated[bool, Query(description="Answer when the images are drawn; false: at once, with the job's id.")]
Embed = Annotated[bool, Query(description="Put the PNG files into the answer, in base64; up to 16,777,216 pixels in all.")]
Previews = Annotated[bool, Query(description="Put small PNGs of the images so far into the events, in base64.")]


def api(studio: Studio) -> APIRouter:
    """The routes of the API."""
    router = APIRouter(prefix="/api", responses=ERRORS)
    _add_state(router, studio)
    _add_jobs(router, studio)
    _add_files(router, studio)
    return router


def _add_jobs(router: APIRouter, studio: Studio) -> None:
    """Requests and their state."""

    body_of_request = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": _BODY}}}}}

    @router.post("/draw", responses={202: {"model": JobAnswer, "description": "In the queue (wait=false)"}}, openapi_extra=body_of_request)
    async def draw(request: Request, wait: Wait = True, embed: Embed = False) -> JobAnswer:
        """Draw images. A client that closes the connection cancels its request."""
        job = await _submitted(studio, request, is_embedded=embed and wait)
        if not wait:
            answer = _answer(job, base=_base(request))
            return JSONResponse(answer.model_dump(mode="json"), status_code=202)  # pyright: ignore[reportReturnType]
        event = await _end(job, request)
        if isinstance(event, Failed):
            headers = {"Retry-After": "60"} if event.sentence == STOPPING else None
            raise HTTPException({CANCELLED: 409, STOPPING: 503}.get(event.sentence, 500), event.sentence, headers=headers)
        return await run_in_threadpool(_answer, job, base=_base(request), embed=embed)

    @router.get("/jobs/{job_id}")
    def job(job_id: JobId, request: Request) -> JobAnswer:
        """The state of a job. One that nobody asks about for a minute is cancelled."""
        return _answer(_job(studio, job_id), base=_base(request))

    @router.get("/jobs/{job_id}/events", response_class=StreamingResponse)
    async def events(job_id: JobId, request: Request, previews: Previews = False) -> StreamingResponse:
        """Server-sent events `waiting`, `progress`, and at the end `finished` or `failed`; the data of each is the state of the job."""
        stream = _stream(_job(studio, job_id), base=_base(request), previews=previews)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})  # of nginx

    @router.delete("/jobs/{job_id}")
    def cancel(job_id: JobId, request: Request) -> JobAnswer:
        """Cancel a job: at once if it waits, at its next step if it is being drawn."""
        found = _job(studio, job_id)
        found.cancel()
        return _answer(found, base=_base(request))


def _add_files(router: APIRouter, studio: Studio) -> None:
    """Images, and what they record."""

    @router.get("/images/{image_id}.{format}", response_class=Response, responses={200: {"content": {"image/*": {}}}})
    def image(image_id: ImageId, format: FormatName, request: Request, download: bool = False) -> Response:
        """A drawn image as a file that records its parameters. Kept until newer images need the room."""
        form = image_format(format)
        found = studio.result(image_id)
        data = None
        if found is not None:
            data = found.png if format == "png" else _refusing(lambda: studio.encoded(image_id, form, client=client_of(request)))
        if found is None or data is None:
            raise HTTPException(404, "image: unknown, or dropped for newer ones")
        name = file_name(found.settings, index=0, suffix=f".{format}")
        disposition = f"{'attachment' if download else 'inline'}; filename*=utf-8''{quote(name)}"
        return Response(data, media_type=f"image/{format}", headers={"Content-Disposition": disposition})

    body_of_file = {"requestBody": {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}}

    @router.post("/parameters", openapi_extra=body_of_file)
    async def parameters(request: Request) -> ParametersAnswer:
        """The parameters that an image file records; the body is the file."""
        body, client = [await _received(request)], client_of(request)
        recorded = await run_in_threadpool(_refusing, lambda: studio.recorded_in(body.pop(), named="image", client=client))
        return ParametersAnswer(settings=recorded.settings.as_dict())


def _add_state(router: APIRouter, studio: Studio) -> None:
    """The model and the server."""

    @router.get("/model")
    def model() -> ModelAnswer:
        """The model, its defaults, and the limits of this server."""
        return ModelAnswer.of(studio)

    @router.get("/health", responses={503: {"model": HealthAnswer, "description": "The server does not draw: it is stopping, or failed"}})
    def health() -> HealthAnswer:
        """Whether the server draws, and its queue. For load balancers and monitoring."""
        answer = HealthAnswer.of(studio)
        if answer.status != "ok":
            return JSONResponse(answer.model_dump(mode="json"), status_code=503)  # pyright: ignore[reportReturnType]
        return answer


async def _submitted(studio: Studio, request: Request, *, is_embedded: bool) -> Job:
    """The body of a request in the queue. It is read here, so that nothing keeps its files while the request waits."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "the body is not JSON by its header: send it with Content-Type: application/json")
    body = [await _received(request)]  # taken out, so that the traceback of an error does not keep it
    most = _MOST_EMBEDDED if is_embedded else None
    return await run_in_threadpool(_refusing, lambda: studio.submit(parsed(body.pop()), client=client_of(request), max_pixels=most))


async def _received(request: Request) -> bytes:
    """The body of a request, of which the framework keeps no copy."""
    return b"".join([part async for part in request.stream()])


def _refusing(action: Callable[[], Any]) -> Any:
    """The result of an action. What it refuses is an answer to the client."""
    try:
        return action()
    except Busy as busy:
        refusal = HTTPException(503 if busy.is_final else 429, str(busy), headers={"Retry-After": str(busy.seconds)})
    except NotJson as error:
        refusal = HTTPException(400, one_line(error))
    except ValueError as error:
        refusal = HTTPException(422, one_line(error, limit=800))
    raise refusal  # here, so that it does not keep the error with its traceback and the files in it


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


def _base(request: Request) -> str:
    """The path of a proxy in front of this server; empty without one."""
    return request.scope.get("root_path", "")


async def _stream(job: Job, *, base: str, previews: bool) -> AsyncIterator[str]:
    """Server-sent events, up to the last one."""
    seen, quiet = -1, 0.0
    while True:
        version, event = job.latest()
        if version != seen:
            seen, quiet = version, 0.0
            answer = await run_in_threadpool(_answer, job, base=base, previews=previews)
            yield f"event: {type(event).__name__.lower()}\ndata: {answer.model_dump_json()}\n\n"
            if isinstance(event, (Finished, Failed)):
                return
        elif quiet >= _QUIET_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(_POLL_SECONDS)
        quiet += _POLL_SECONDS


def _answer(job: Job, *, base: str, embed: bool = False, previews: bool = False) -> JobAnswer:
    """The state of a job. base: path in front of URLs; embed: with the files of its images; previews: with small ones of those in hand."""
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
        images=[ImageAnswer.of(result, base=base, data=_base64(result.png) if embed else None) for result in results],
        error=event.sentence if isinstance(event, Failed) else None,
        remarks=list(job.remarks),
    )


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
