"""Servers on the loopback interface: files by ranges over HTTP, with every fault that a network has, and S3."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a folder. Set `faults` (of each request, how many times: first the connection drops, then the answer is cut
    short, and so on), `ignores_ranges`, or clear `open` to let answers hang; `asked` counts ranges by path, first and last byte."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults = 0
        self.ignores_ranges = False
        self.asked: Counter[str] = Counter()
        self.open = threading.Event()
        self.open.set()
        self.hanging = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def _files(self) -> RangeServer:
        assert isinstance(self.server, RangeServer)
        return self.server

    def _answer(self, *, with_body: bool) -> None:
        file = self._files.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        request = f"{self.command} {self.path} {asked.group(1, 2) if asked else 'all'}"
        self._files.asked[request] += 1
        fault = self._files.asked[request] <= self._files.faults and ("drop", "cut")[(self._files.asked[request] - 1) % 2]
        if fault == "drop":
            return
        if asked and not self._files.ignores_ranges:
            start, last = map(int, asked.groups())
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(data)}")
            data = data[start : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            half = len(data) // 2
            self.wfile.write(data[:half])
            if not self._files.open.is_set():
                self._files.hanging.set()
                self._files.open.wait(30)
            if fault != "cut":
                self.wfile.write(data[half:])


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    with RangeServer(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.open.set()
            server.shutdown()


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's, in a process of its own: its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"{url}/moto-api/")
            yield url
        finally:
            server.kill()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while not _answers(url):
        assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except OSError:
        return False
    return True
