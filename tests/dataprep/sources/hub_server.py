"""A hub on the loopback interface: as much of Hugging Face's as it takes to stream a data set."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "0000"


class HubServer(ThreadingHTTPServer):
    """Serves the files of `folder` as the data set `repo` at `COMMIT`; `unknown` lists requests that it has no answer to."""

    daemon_threads = True

    def __init__(self, folder: Path, *, repo: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.repo = folder, repo
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, path: Path) -> dict[str, Any]:
        if path.is_dir():
            return {"type": "directory", "oid": "0", "size": 0, "path": str(path.relative_to(self.folder))}
        return {
            "type": "file",
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
            "path": str(path.relative_to(self.folder)),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        hub = self.server
        assert isinstance(hub, HubServer)
        path = unquote(urlsplit(self.path).path)
        files = sorted(file for file in hub.folder.rglob("*") if file.is_file())
        if re.fullmatch(rf"/api/datasets/{hub.repo}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": str(file.relative_to(hub.folder))} for file in files]
            self._send_json({"_id": "1", "id": hub.repo, "sha": COMMIT, "private": False, "siblings": siblings, "tags": [], "downloads": 0})
        elif match := re.fullmatch(rf"/api/datasets/{hub.repo}/tree/[^/]+(?:/(.*))?", path):
            below = hub.folder / (match[1] or "")
            if not below.is_dir():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            found = below.rglob("*") if "recursive=true" in self.path.lower() else below.iterdir()
            self._send_json([hub.entry(path) for path in sorted(found)])
        elif path.startswith(f"/api/datasets/{hub.repo}/paths-info/"):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._send_json([hub.entry(hub.folder / name) for name in asked if (hub.folder / name).exists()])
        elif match := re.fullmatch(rf"/datasets/{hub.repo}/resolve/[^/]+/(.*)", path):
            self._send_file(hub.folder / match[1])
        else:
            hub.unknown.append(f"{self.command} {self.path}")
            self._send(404, b"", {})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, file: Path) -> None:
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            self._send(206, data[start : last + 1], headers)
        else:
            self._send(200, data, headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub_server(folder: Path, *, repo: str) -> Iterator[HubServer]:
    with HubServer(folder, repo=repo) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
