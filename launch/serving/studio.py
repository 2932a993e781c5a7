"""The queue: one thread owns the generator and draws one request at a time, in turns among the clients."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import NamedTuple

import torch
from PIL import Image

from launch.hardware.peak_memory import peak_bytes, restart_peak
from launch.sampling.cut_prompts import cut_prompts
from launch.sampling.files.formats import ImageFormat, image_format
from launch.sampling.files.image_files import Recorded, encode_image
from launch.sampling.options import Wanted
from launch.sampling.recorded import ModelFacts, settings_of
from launch.serving.drawing import images_of
from launch.serving.jobs import CANCELLED, STOPPING, Failed, Finished, Job, Progress, Result, Waiting
from launch.serving.limits import Busy, Limits, Rate
from launch.serving.requests import DrawRequest
from launch.serving.uploads import Uploads
from pipeline.errors import kind_and_line
from tim import Generator
from tim.sampling.generator import Step

log = logging.getLogger(__name__)

ABANDONED = 60.0  # seconds without a sign of life of its client, after which a request is cancelled
KEPT_BYTES, KEPT_JOBS = 1_000_000_000, 200  # of finished requests
PREVIEW_SIDE = 512  # pixels
_WAITING_BYTES = 1_000_000_000  # of the uploads of all requests in the queue
_PREVIEW_SECONDS = 0.3  # between two previews
_PNG = image_format("png")


class _Stop(Exception):
    """Raised in a step of a request that is cancelled."""


class Status(NamedTuple):
    """The state of a studio.

    is_working: whether it takes requests; waiting: requests, of so many clients; finished, cancelled, failed: requests since it began,
    `seconds` ago; images: drawn since then.
    """

    is_working: bool
    waiting: int
    clients: int
    is_drawing: bool
    finished: int
    cancelled: int
    failed: int
    images: int
    seconds: float


class Studio:
    """Draws the requests of clients. Its thread starts with it; `close` ends both.

    All public methods may be called from any thread. facts: what the files of images record of the model; say: receives a line on each
    request that was drawn, without its prompts.
    """

    def __init__(self, generator: Generator, facts: ModelFacts, *, limits: Limits, say: Callable[[str], None] = lambda line: None) -> None:
        self.generator, self.facts, self.limits, self._say = generator, facts, limits, say
        self.uploads = Uploads(limits)
        self.rate = Rate(limits.requests_per_minute, what="requests")
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by client, the one whose turn it is first
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # by id; ended ones stay for a while
        self._images: dict[str, Result] = {}
        self._current: Job | None = None
        self._is_closed = False
        self._began = time.monotonic()
        self._counts = {"finished": 0, "cancelled": 0, "failed": 0, "images": 0}
        self._encoding = threading.Lock()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="studio", daemon=True)
        self._thread.start()

    def submit(self, request: DrawRequest, *, client: str, max_pixels: int | None = None) -> Job:
        """Put a request in the queue. client: whose share it takes; max_pixels: of its images in all.

        Raises ValueError for a request that cannot be drawn, and Busy if the queue or the client's share of it is full.
        """
        self.rate.take(client)
        sent = len(request.image or "") + len(request.mask or "")
        with self._changed:
            self._check_room(client, upload_bytes=sent)
        with self.uploads.place(client) if sent else nullcontext():
            wanted = images_of(request, generator=self.generator, limits=self.limits, uploads=self.uploads)
        pixels = sum(width * height for width, height in (each.image.size for each in wanted))
        if max_pixels is not None and pixels > max_pixels:
            raise ValueError(
                f"embed: the images have {pixels:,} pixels, the limit is {max_pixels:,}; leave it out, and get them by their url"
            )
        job = Job(client, wanted, sent + _decoded_bytes(wanted))
        with self._changed:
            self._check_room(client, upload_bytes=job.upload_bytes)
            self._waiting.setdefault(client, deque()).append(job)
            self._jobs[job.id] = job
            self._tell_positions()
            self._changed.notify_all()
        return job

    def recorded_in(self, data: bytes, *, named: str, client: str) -> Recorded:
        """What an image file records. Raises ValueError and Busy like `submit`."""
        self.rate.take(client)
        with self.uploads.place(client):
            return self.uploads.recorded(data, named=named)

    def encoded(self, image_id: str, form: ImageFormat, *, client: str) -> bytes | None:
        """A finished image in another format; None like `result`. Raises ValueError and Busy like `submit`."""
        found = self.result(image_id)
        if found is None:
            return None
        self.rate.take(client)
        with self._encoding:
            return encode_image(found.image, found.settings, form=form)

    def job(self, job_id: str) -> Job | None:
        """A request by its id; None if it is unknown, or was dropped for newer ones."""
        with self._changed:
            return self._jobs.get(job_id)

    def result(self, image_id: str) -> Result | None:
        """A finished image by its id; None if it is unknown, or was dropped for newer ones."""
        with self._changed:
            return self._images.get(image_id)

    def status(self) -> Status:
        """How it is, and what it has done."""
        with self._changed:
            self._drop_ended()
            return Status(
                is_working=self._thread.is_alive() and not self._is_closed,
                waiting=sum(map(len, self._waiting.values())),
                clients=len(self._waiting),
                is_drawing=self._current is not None,
                **self._counts,
                seconds=time.monotonic() - self._began,
            )

    def close(self, *, seconds: float) -> bool:
        """End all requests, and tell their clients. Returns whether the step in hand ended within `seconds`."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs.values():
                job.stop()
            self._changed.notify_all()
        self._thread.join(timeout=seconds)
        self.uploads.close()
        return not self._thread.is_alive()

    def _check_room(self, client: str, *, upload_bytes: int) -> None:
        """Raises Busy if a request more has no place."""
        if self._is_closed or not self._thread.is_alive():
            raise Busy(STOPPING, seconds=60, is_final=True)
        self._drop_ended()
        waiting = sum(map(len, self._waiting.values()))
        if waiting >= self.limits.max_queue:
            raise Busy(f"the queue is full: {waiting} requests wait; try again later", seconds=30)
        own = len(self._waiting.get(client, ()))
        if own >= self.limits.max_per_client:
            raise Busy(f"{own} of your requests wait, the limit is {self.limits.max_per_client}; wait for one to finish", seconds=10)
        if upload_bytes and upload_bytes + sum(job.upload_bytes for job in self._in_order()) > _WAITING_BYTES:
            raise Busy("the queue holds too many large images; try again later", seconds=30)

    def _in_order(self) -> list[Job]:
        """The waiting requests in the order in which they will be drawn: one of each client, then the next of each."""
        rounds = zip_longest(*self._waiting.values())
        return [job for turn in rounds for job in turn if job is not None]

    def _tell_positions(self) -> None:
        before = self._current is not None
        for number, job in enumerate(self._in_order()):
            job.tell(Waiting(number + before), "waiting")

    def _drop_ended(self) -> None:
        """Remove cancelled and abandoned requests from the queue."""
        for client, jobs in [*self._waiting.items()]:
            for job in [*jobs]:
                if not job.is_watched(within=ABANDONED):
                    job.cancel()
                if job.is_cancelled:
                    jobs.remove(job)
            if not jobs:
                del self._waiting[client]

    def _next(self) -> Job | None:
        """Wait for a request, and take it; None if the studio is closed."""
        with self._changed:
            self._current = None
            while not self._is_closed:
                self._drop_ended()
                if self._waiting:
                    client, jobs = self._waiting.popitem(last=False)
                    job = self._current = jobs.popleft()
                    if jobs:
                        self._waiting[client] = jobs  # behind the others
                    self._tell_positions()
                    return job
                self._changed.wait(timeout=ABANDONED)
            return None

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._answer(job)
                if self.generator.device.type == "cuda":
                    torch.cuda.synchronize()  # raises if the GPU is lost, for this process at least
                    torch.cuda.empty_cache()
                self._forget()
        except Exception as error:
            log.error("drawing ended: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
        finally:
            with self._changed:
                self._current = None
                for job in self._jobs.values():
                    job.stop()

    def _answer(self, job: Job) -> None:
        """Draw a request, and tell its client what came of it."""
        began, images = time.monotonic(), len(job.wanted)
        try:
            results = self._draw(job)
        except _Stop:
            job.tell(Failed(CANCELLED), "cancelled")
            outcome = "cancelled"
        except Exception as error:
            log.warning("a request failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            job.tell(Failed(_sentence(error)), "failed")
            outcome = "failed"
        else:
            self._keep(results)
            job.tell(Finished(results), "finished")
            outcome = "finished"
        with self._changed:
            self._counts[outcome] += 1
            self._counts["images"] += images if outcome == "finished" else 0
        self._say(f"{outcome}: {images} image{'s' * (images != 1)} for {job.client or 'the page'} in {time.monotonic() - began:.1f} s")

    def _draw(self, job: Job) -> tuple[Result, ...]:
        """The images of a request, in its order."""
        wanted = job.wanted
        drawing = _Drawing(job, len(wanted), self.generator.device)
        if self.generator.text is not None:
            texts = {prompt: None for each in wanted for prompt in each.image.prompts if isinstance(prompt, str)}
            job.remarks = tuple(cut_prompts(list(texts), encoder=self.generator.text))
        for drawn in self.generator.draw([each.image for each in wanted], callback=drawing.step):
            settings = settings_of(drawn.request, model=self.facts, edit=wanted[drawn.index].edit)
            png = encode_image(drawn.image, settings, form=_PNG)
            drawing.add(drawn.index, Result(secrets.token_urlsafe(16), png, settings, 0, drawn.evaluations, drawn.neighbours, 0))
        return drawing.in_order()

    def _keep(self, results: Sequence[Result]) -> None:
        with self._changed:
            self._images.update((result.image_id, result) for result in results)

    def _forget(self) -> None:
        """Drop the oldest ended requests, with their images, above the bounds."""
        with self._changed:
            ended = deque(job for job in self._jobs.values() if job.state not in ("waiting", "drawing"))
            size = sum(len(result.png) for result in self._images.values())
            while len(ended) > 1 and (len(ended) > KEPT_JOBS or size > KEPT_BYTES):
                job = ended.popleft()
                del self._jobs[job.id]
                size -= sum(len(self._images.pop(result.image_id).png) for result in job.results)


class _Drawing:
    """The state of the request in hand: what is finished, and what its client is told."""

    def __init__(self, job: Job, images: int, device: torch.device) -> None:
        self._job, self._images, self._device = job, images, device
        self._results: dict[int, Result] = {}
        self._left = 0  # images of the pack in hand
        self._began = self._previewed = time.monotonic()
        self._previews: tuple[Image.Image, ...] = ()
        self._step = self._steps = 0
        self._check()
        restart_peak(device)
        self._tell()

    def step(self, step: Step) -> None:
        """A callback of the generator. Raises _Stop if the request is cancelled or abandoned."""
        self._check()
        now = time.monotonic()
        if step.step == step.steps or now - self._previewed >= _PREVIEW_SECONDS or not self._previews:
            self._previews, self._previewed = tuple(map(_small, step.previews())), now
        self._step, self._steps = step.step, step.steps
        self._tell()

    def add(self, index: int, result: Result) -> None:
        """Note a finished image, with its time and memory. Raises like `step`."""
        now = time.monotonic()
        self._left = self._left or result.neighbours + 1
        self._results[index] = result._replace(seconds=now - self._began, memory=peak_bytes(self._device))
        self._left -= 1
        if not self._left:
            self._began, self._previews = now, ()
            restart_peak(self._device)
        self._check()
        self._tell()

    def in_order(self) -> tuple[Result, ...]:
        """The finished images, in the order of the request."""
        return tuple(self._results[index] for index in sorted(self._results))

    def _check(self) -> None:
        if self._job.is_cancelled or not self._job.is_watched(within=ABANDONED):
            raise _Stop

    def _tell(self) -> None:
        event = Progress(len(self._results), self._images, self._step, self._steps, self._previews, self.in_order())
        self._job.tell(event, "drawing")


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BILINEAR)
    return image


def _decoded_bytes(wanted: Sequence[Wanted]) -> int:
    """Of the image and the mask of a request."""
    edit = wanted[0].edit
    return 0 if edit is None else 4 * edit.edit.image.width * edit.edit.image.height


def _sentence(error: Exception) -> str:
    """What a client is told. Messages of unexpected errors may name files of the server, so they are not passed on."""
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
    if is_memory:
        return "not enough memory for this request: ask for a smaller size or fewer images"
    return "the images could not be drawn; the server's log has the reason"
