"""`tim serve` in a process of its own, and a client that speaks plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

SMALL = {"width": 9, "height": 7}


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def said(self) -> str:
        """Its standard error so far."""
        return self.log.read_text(encoding="utf-8")

    def connection(self) -> HTTPConnection:
        return HTTPConnection(urlsplit(self.url).netloc, timeout=120)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Answer:
        connection = self.connection()
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def draw(self, query: str = "", /, **request: Any) -> Answer:
        """The answer to a request: by default one small image in one step."""
        is_sized = not request.keys().isdisjoint({"image", "sizes", "aspect", "width"})
        body = {"prompt": "a fox", "steps": 1, **({} if is_sized else SMALL), **request}
        return self.ask("POST", f"/api/draw{query}", json.dumps(body).encode(), {"Content-Type": "application/json"})


@contextmanager
def started(model: Path | str, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    command = [sys.executable, "-m", "launch.cli", "serve", str(model), "--port", "0", "--device", "cpu", "--json", *options]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with (
        tempfile.NamedTemporaryFile("w", suffix=".log") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, Path(log.name).read_text(encoding="utf-8")
            yield Server(process, json.loads(line)["url"], Path(log.name))
        finally:
            process.terminate()
            process.wait(timeout=60)


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png_of(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def noise(width: int, height: int, *, channels: int = 3) -> bytes:
    """A PNG of noise."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    return png_of(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def pixels_of(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"), dtype=int)
