"""A request in the queue: its state, and the events that tell a client how far it is."""

from __future__ import annotations

import io
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from PIL import Image

from launch.sampling.files.settings import Settings
from launch.sampling.options import Wanted

State: TypeAlias = Literal["waiting", "drawing", "finished", "failed", "cancelled"]
CANCELLED = "the request was cancelled"
STOPPING = "the server is stopping; ask again later"


class Result(NamedTuple):
    """A drawn image.

    png: its file, with its settings; seconds: since the pack that it shared with `neighbours` other images began; evaluations: network
    forwards; memory: the most bytes in use meanwhile, of the GPU or of the process.
    """

    image_id: str
    png: bytes
    settings: Settings
    seconds: float
    evaluations: int
    neighbours: int
    memory: int

    @property
    def image(self) -> Image.Image:
        """The image, decoded."""
        with Image.open(io.BytesIO(self.png)) as image:
            image.load()
            image.info = {}
            return image


class Waiting(NamedTuple):
    """position: number of requests that are drawn before it."""

    position: int


class Progress(NamedTuple):
    """A step of a pack.

    image: number of finished images, of `images`; step: steps taken of `steps`, in the pack in hand; previews: its images so far, small;
    results: the finished images.
    """

    image: int
    images: int
    step: int
    steps: int
    previews: tuple[Image.Image, ...]
    results: tuple[Result, ...]


class Finished(NamedTuple):
    """results: in the order of the request."""

    results: tuple[Result, ...]


class Failed(NamedTuple):
    """sentence: what went wrong, for the client."""

    sentence: str


Event: TypeAlias = Waiting | Progress | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request of a client. The newest event replaces older ones, so that a slow client costs no memory.

    wanted: the images to draw; upload_bytes: of their image and mask, as they came and decoded; remarks: for people, for example about a
    prompt that is cut. All methods may be called from any thread.
    """

    client: str
    wanted: Sequence[Wanted]
    upload_bytes: int = 0
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    remarks: tuple[str, ...] = ()
    state: State = "waiting"
    is_cancelled: bool = False
    _event: Event = field(default_factory=lambda: Waiting(0))
    _version: int = 0
    _watchers: int = 0
    _seen: float = field(default_factory=time.monotonic)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def cancel(self) -> None:
        """Stop it: at once if it waits, at its next step if it is being drawn."""
        with self._changed:
            if self.state in ("waiting", "drawing"):
                self.is_cancelled = True
            if self.state == "waiting":
                self._tell(Failed(CANCELLED), "cancelled")

    def stop(self) -> None:
        """End it because the server stops: its client is told at once, also while a step is being computed."""
        with self._changed:
            if self.state in ("waiting", "drawing"):
                self.is_cancelled = True
                self._tell(Failed(STOPPING), "failed")

    @property
    def position(self) -> int:
        """Number of requests that are drawn before it."""
        event = self.latest()[1]
        return event.position if isinstance(event, Waiting) else 0

    @property
    def results(self) -> tuple[Result, ...]:
        """Its images once it is finished."""
        event = self._event
        return event.results if isinstance(event, Finished) else ()

    def latest(self) -> tuple[int, Event]:
        """The newest event, and a number that changes with it. Counts as a sign of life of the client."""
        with self._changed:
            self._seen = time.monotonic()
            return self._version, self._event

    def events(self) -> Iterator[Event]:
        """The newest event whenever there is one, up to `Finished` or `Failed`."""
        seen = -1
        with self._changed:
            self._watchers += 1
        try:
            while True:
                seen, event = self._newer(seen)
                yield event
                if isinstance(event, (Finished, Failed)):
                    return
        finally:
            with self._changed:
                self._watchers -= 1
                self._seen = time.monotonic()

    def tell(self, event: Event, state: State) -> None:
        """Replace the event and the state, unless the job has ended."""
        with self._changed:
            if self.state in ("waiting", "drawing"):
                self._tell(event, state)

    def is_watched(self, *, within: float) -> bool:
        """Whether a client follows its events, or has asked for them within so many seconds."""
        with self._changed:
            return self._watchers > 0 or time.monotonic() - self._seen <= within

    def _newer(self, seen: int) -> tuple[int, Event]:
        """Wait for an event after version `seen`."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > seen)
            return self._version, self._event

    def _tell(self, event: Event, state: State) -> None:
        self._version, self._event, self.state = self._version + 1, event, state
        if state not in ("waiting", "drawing"):
            self.wanted = ()  # uploads are not kept
        self._changed.notify_all()
