"""A Hugging Face Hub in a thread: it serves files, accepts commits, and can fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "LocalHub", "serving"]

Fault = Literal[
    "500",  # answers every request so
    "drop",  # closes the connection without an answer
    "html",  # a captive portal: a page for every request
    "html body",  # announces the file and sends a login page
    "no size",  # a proxy that drops the size from the answer to HEAD
]
PAGE = b"<!DOCTYPE html><html><body>Please log in.</body></html>"


class LocalHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: Contents by repository and file name.
        fault: How to fail.
        requests: What was asked, as "METHOD path".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.fault: Fault | None = None
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo_id: str) -> str:
        """The commit that a repository is at: a digest of all that is in it."""
        digests = sorted((n, hashlib.sha1(c).digest()) for n, c in self.files[repo_id].items())
        return hashlib.sha1(repr(digests).encode()).hexdigest()

    def downloads(self) -> int:
        return sum(bool(re.match("GET .*/resolve/", request)) for request in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing where a client gave up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        self._resolve()

    def do_POST(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.requests.append(f"POST {path}")
        body = self._body()
        if path == "/api/repos/create":
            content = json.loads(body)
            repo_id = "/".join(filter(None, [content.get("organization"), content["name"]]))
            hub.files.setdefault(repo_id, {})
            self._json({"url": f"{hub.endpoint}/{repo_id}"})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._json({"files": kinds})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[match[1]][line["value"]["path"]] = content
            oid = hub.commit(match[1])
            self._json({"commitUrl": f"{hub.endpoint}/{match[1]}/commit/{oid}", "commitOid": oid})
        else:
            self._json({})

    def _resolve(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # the client's own question, once a day and machine
            self._plain(404, {})
            return
        hub.requests.append(f"{self.command} {path}")
        if self._failed_at_once():
            return
        match = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        files = hub.files.get(match[1]) if match else None
        if files is None:
            self._plain(404, {"X-Error-Code": "RepoNotFound"})
        elif match[2] not in {"main", hub.commit(match[1])}:
            self._plain(404, {"X-Error-Code": "RevisionNotFound"})
        elif match[3] not in files:
            self._plain(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        else:
            self._send(files[match[3]], hub.commit(match[1]))

    def _send(self, content: bytes, commit: str) -> None:
        fault = self.server.fault
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            size = {} if fault == "no size" else {"Content-Length": str(len(content))}
            self._plain(200, {**headers, **size})
        else:
            self._partial(PAGE if fault == "html body" else content, headers)

    def _partial(self, content: bytes, headers: dict[str, str]) -> None:
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        self._plain(status, {**headers, "Content-Length": str(len(content))})
        self.wfile.write(content)

    def _failed_at_once(self) -> bool:
        """Answers, if the fault is of a kind that no file is needed for."""
        fault = self.server.fault
        if fault == "500":
            self._plain(500, {"Content-Length": "0"})
        elif fault == "drop":
            self.close_connection = True
        elif fault == "html":
            self._plain(200, {"Content-Type": "text/html", "Content-Length": str(len(PAGE))})
            if self.command == "GET":
                self.wfile.write(PAGE)
        else:
            return False
        return True

    def _body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self._plain(200, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def _plain(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        if status == 404:
            headers = {**headers, "Content-Length": "0"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving() -> Iterator[LocalHub]:
    """Runs a hub until the block ends."""
    hub = LocalHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
