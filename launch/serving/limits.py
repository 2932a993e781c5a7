"""Limits of a server: what one request may ask for, and how often a client may ask."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from tim.sampling.requests import MAX_PIXELS

MINUTE = 60.0
_MAX_CLIENTS = 10_000  # whose times are kept


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a server, the options of `tim serve`.

    max_side, max_pixels: of an image, drawn or uploaded; max_prompt: characters; max_count: images of one request; max_upload_mb: 10⁶ bytes
    of an uploaded file; max_queue, max_per_client: requests that wait; requests_per_minute: of one client.
    """

    max_side: int = 4096
    max_pixels: int = MAX_PIXELS
    max_steps: int = 128
    max_prompt: int = 4000
    max_count: int = 16
    max_upload_mb: int = 64
    max_queue: int = 64
    max_per_client: int = 4
    requests_per_minute: int = 60

    @property
    def max_upload(self) -> int:
        """Bytes of an uploaded file."""
        return self.max_upload_mb * 1_000_000

    @property
    def max_body(self) -> int:
        """Bytes of a request: an image and a mask in base64, and texts."""
        return 2 * (self.max_upload * 4 // 3 + 4) + self._max_text

    @property
    def max_values(self) -> int:
        """Values in the JSON of a request; a comma within a text counts as one."""
        return self._max_text

    @property
    def _max_text(self) -> int:
        """Bytes of a request without its files; a character may take twelve, as two escapes."""
        return 16 * self.max_prompt * self.max_count + 100_000


class Busy(ValueError):
    """A request that is refused for now. seconds: after which it may be repeated; is_final: the server is stopping."""

    def __init__(self, message: str, *, seconds: float, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.seconds = max(1, math.ceil(seconds))


class Rate:
    """At most `limit` events of one client in any minute. `what` they are, for the message."""

    def __init__(self, limit: int, *, what: str) -> None:
        self._limit, self._what = limit, what
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, client: str) -> None:
        """Raises Busy if the client has had its share of this minute."""
        with self._lock:
            times = self._recent(client)
            if len(times) >= self._limit:
                wait = times[0] + MINUTE - time.monotonic()
                raise Busy(f"more than {self._limit} {self._what} in a minute: try again in {max(1, math.ceil(wait))} s", seconds=wait)

    def take(self, client: str) -> None:
        """Note an event. Raises Busy like `check`, and then does not note it."""
        self.check(client)
        self.count(client)

    def count(self, client: str) -> None:
        """Note an event."""
        with self._lock:
            self._recent(client).append(time.monotonic())

    def _recent(self, client: str) -> deque[float]:
        """The times of a client within the last minute. The client that was seen least recently is forgotten when there are too many."""
        times = self._times.setdefault(client, deque())
        self._times.move_to_end(client)
        while times and times[0] <= time.monotonic() - MINUTE:
            times.popleft()
        if len(self._times) > _MAX_CLIENTS:
            self._times.popitem(last=False)
        return times
