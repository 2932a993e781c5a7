from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Scope

from launch.serving.http import bodies as bodies_module
from launch.serving.http.bodies import Bodies, Body, BodyLimits, Refused


def scope(*, client: str = "a", path: str = "/api/draw") -> Scope:
    return {"type": "http", "path": path, "headers": [], "client": (client, 1)}


def body(bodies: Bodies, *parts: bytes, **of: Any) -> Body:
    """A body in parts, after which nothing comes."""
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(100)
        raise AssertionError

    return bodies.receiver(scope(**of), receive)


def received(one: Body, *, parts: int) -> int:
    async def receive() -> None:
        for _ in range(parts):
            await one()

    asyncio.run(receive())
    return one.received


def refused(one: Body, *, parts: int) -> tuple[int, str]:
    with pytest.raises(Refused) as error:
        received(one, parts=parts)
    return error.value.refusal.status, error.value.refusal.sentence


NESTED: Sequence[bytes] = (b"[" * 60, b"[],{}" * 10)


def test_values_are_limited_because_each_takes_memory() -> None:
    bodies = Bodies(BodyLimits(max_bytes=1000, max_values=80))
    assert refused(body(bodies, *NESTED), parts=2) == (413, "the body of a request has at most 80 values")
    assert received(body(bodies, *NESTED, path="/api/parameters"), parts=2) == 110
    assert received(body(bodies, b'"' + b"x" * 900 + b'"'), parts=1) == 902


def test_a_body_that_stalls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "SECONDS", 0.2)
    bodies = Bodies(BodyLimits(max_bytes=1000, max_values=80))
    status, sentence = refused(body(bodies, b"{"), parts=2)
    assert status == 408
    assert "has to arrive within 0.2 s" in sentence


def test_large_bodies_at_a_time_are_limited_by_client() -> None:
    bodies = Bodies(BodyLimits(max_bytes=10_000_000, max_values=80))
    large = b"x" * 1_100_000
    one, two = body(bodies, large), body(bodies, large)
    assert received(one, parts=1) == received(two, parts=1)
    assert refused(body(bodies, large), parts=1) == (429, "too many uploads at a time; try again")
    for client in "bc":
        received(body(bodies, large, client=client), parts=1)
    assert refused(body(bodies, large, client="d"), parts=1)[0] == 429
    one.close()
    assert received(body(bodies, large), parts=1) == len(large)
