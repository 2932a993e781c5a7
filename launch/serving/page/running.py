"""Requests of the page: at most one of each tab at a time, followed until it ends, cancelled when its tab is closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from launch.serving.jobs import Event, Failed, Finished, Job, Progress
from launch.serving.requests import DrawRequest
from launch.serving.studio import Studio

_POLL = 0.1  # seconds between two looks at a request
TAB_IS_BUSY = "this tab is drawing already: press Stop, or wait until it is finished"


class Tabs:
    """The requests that are drawn or wait, by the session of their tab."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job | None] = {}

    def stop(self, session: str) -> None:
        """Cancel the request of a tab, if it has one."""
        job = self._jobs.get(session)
        if job is not None:
            job.cancel()

    async def follow(self, studio: Studio, request: DrawRequest, *, session: str, client: str) -> AsyncIterator[tuple[Job, Event, float]]:
        """Put a request in the queue: (job, event, seconds since drawing began) for its newest events, up to the last.

        Polled, so that tabs that wait take no thread each. Raises ValueError as `Studio.submit`, and for a tab that is drawing.
        """
        if session in self._jobs:
            raise ValueError(TAB_IS_BUSY)
        self._jobs[session] = None
        job = None
        try:
            job = self._jobs[session] = await asyncio.to_thread(studio.submit, request, client=client)
            began, seen = None, -1
            while True:
                version, event = job.latest()
                if began is None and isinstance(event, (Progress, Finished)):
                    began = time.monotonic()
                if version != seen:
                    seen = version
                    yield job, event, 0.0 if began is None else time.monotonic() - began
                    if isinstance(event, (Finished, Failed)):
                        return
                await asyncio.sleep(_POLL)
        finally:
            self._jobs.pop(session, None)
            if job is not None:
                job.cancel()
