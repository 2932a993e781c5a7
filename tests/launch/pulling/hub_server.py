"""A server with the few endpoints of the Hugging Face hub that downloads use, for repositories in folders OWNER/NAME."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin")  # in LFS, named by sha256; other files by git's digest


@dataclass
class Hub:
    """State of the server. gated: repositories for which TOKEN is needed; slow: files that stop after their first half until it is emptied;
    wrong: files served with a flipped byte; failing: number of answers with status 503 that a file or a repository's description still
    gives; broken: connections of a file that still end after half of what is asked for; requests: method and path of each request; ranges:
    bytes at which downloads began that were continued."""

    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    failing: dict[str, int] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Names of the files that were downloaded since the last call."""
        found = [line.rpartition("/")[2] for line in self.requests if line.startswith("GET ") and "/resolve/" in line]
        self.requests.clear()
        return found

    def commit(self, repository: str) -> str:
        names = sorted(f"{file.relative_to(self.root)} {file.stat().st_size}" for file in (self.root / repository).rglob("*"))
        return hashlib.sha1("\n".join(names).encode()).hexdigest()


TOKEN = "hf_permitted"


@contextmanager
def hub_server(root: Path) -> Iterator[Hub]:
    hub = Hub(root)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.state.requests.append(f"{self.command} {path}")
        is_api = path.startswith("api/models/")
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
        folder = self.state.root / repository
        rest = path.removeprefix("api/models/").removeprefix(repository).strip("/").split("/", 2)
        if (given := self.headers.get("Authorization")) not in (None, f"Bearer {TOKEN}"):
            return self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        name = path.rpartition("/")[2] if not is_api else repository
        if self.state.failing.get(name, 0) > 0 and (is_api or self.command == "GET"):
            self.state.failing[name] -= 1
            return self._send(503, b"overloaded", {})
        if not folder.is_dir():
            return self._send(401, b"no such repository", {"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in ("main", "v1", self.state.commit(repository)):
            return self._send(404, b"no such revision", {"X-Error-Code": "RevisionNotFound"})
        if is_api:
            return self._describe(repository, folder, rest)
        if repository in self.state.gated and given is None:
            return self._send(403, b"restricted", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        return self._file(repository, folder / rest[2])

    def _describe(self, repository: str, folder: Path, rest: list[str]) -> None:
        listed = [_entry(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        if rest[0] == "tree":
            return self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        siblings = [{**entry, "rfilename": entry["path"], "blobId": entry["oid"]} for entry in listed]
        described = {"id": repository, "sha": self.state.commit(repository), "siblings": siblings}
        return self._send(200, json.dumps(described).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: str, file: Path) -> None:
        if not file.is_file():
            return self._send(404, b"no such file", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        digest = _entry(file, file.parent)
        etag = digest["lfs"]["oid"] if "lfs" in digest else digest["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.state.commit(repository), "Accept-Ranges": "bytes"}
        if file.name in self.state.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, status = 0, 200
        if self.command == "GET" and (asked := self.headers.get("Range")) is not None:
            start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            if start:
                self.state.ranges.append(start)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.state.broken.get(file.name, 0) > 0:
            self.state.broken[file.name] -= 1
            return self._send(status, content[start:], headers, is_broken=True)
        return self._send(status, content[start:], headers, is_slow=file.name in self.state.slow)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, is_slow: bool = False, is_broken: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if is_broken:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        while is_slow and self.state.slow:
            time.sleep(0.02)
        self.wfile.write(body[half:])


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    content = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(content), "oid": git}
    if file.suffix in LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
    return entry
