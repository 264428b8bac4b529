"""A server on loopback that speaks the part of the Hugging Face hub's API that downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
NO_REPO = {"X-Error-Code": "RepoNotFound"}
NO_REVISION = {"X-Error-Code": "RevisionNotFound"}


@dataclass
class Hub:
    """Repositories by name, what is refused, and what was asked."""

    repositories: dict[str, dict[str, bytes]]
    refusal: tuple[int, dict[str, str]] | None = None  # of every request
    files_only: bool = False  # the refusal is of files, not of what a repository holds
    cut_after: int = 0  # bytes after which a transfer breaks off
    cuts: int = 0  # transfers that break off; after them, all is well
    slow: float = 0.0  # seconds between two blocks
    url: str = ""
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    served: int = 0  # bytes of files


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """The hub, until the block ends."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            of_file = "/resolve/" in path
            if hub.refusal and (of_file or not hub.files_only):
                return self._send(hub.refusal[0], b"{}", hub.refusal[1], body)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                return self._describe(found[1], found[2] or "main", body)
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._file(found[1], found[2], found[3], body)
            return self._send(404, b"{}", NO_REPO, body)

        def _describe(self, name: str, revision: str, body: bool) -> None:
            files = hub.repositories.get(name)
            if files is None:
                return self._send(401, b"{}", NO_REPO, body)
            if revision not in ("main", "v1", COMMIT):
                return self._send(404, b"{}", NO_REVISION, body)
            held = [{"rfilename": f, "size": len(data)} for f, data in files.items()]
            about = {"id": name, "sha": COMMIT, "siblings": held}
            return self._send(200, json.dumps(about).encode(), {}, body)

        def _file(self, name: str, revision: str, file: str, body: bool) -> None:
            data = hub.repositories[name][file]
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            start, status = 0, 200
            if asked := self.headers.get("Range"):
                start, status = int(re.match(r"bytes=(\d+)-", asked)[1]), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if body:
                    hub.ranges.append(asked)
            return self._send(status, data[start:], headers, body, cut=True)

        def _send(
            self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            if cut and hub.cuts and len(data) > hub.cut_after:
                hub.cuts -= 1
                data = data[: hub.cut_after]
                self.close_connection = True
            try:
                for at in range(0, len(data), 1 << 16):
                    self.wfile.write(data[at : at + (1 << 16)])
                    if cut:
                        hub.served += len(data[at : at + (1 << 16)])
                    if hub.slow and cut:
                        threading.Event().wait(hub.slow)
                self.wfile.flush()
            except OSError:  # whoever asked has gone
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
