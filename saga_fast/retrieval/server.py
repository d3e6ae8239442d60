"""An index over HTTP, for programs on the same machine: a picture in, the files most like it out.

    curl --data-binary @picture.jpg 'http://127.0.0.1:8000/?k=5'
    {"hits": [{"path": "…", "similarity": 0.93}, …]}

A POST's body is one picture file; errors are returned as {"error": "…"}. A request cannot name a file to open. Left
out, for a proxy to add: TLS and authentication.
"""

from __future__ import annotations

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from saga_fast.utils.errors import InputError
from saga_fast.utils.flags import COUNT
from saga_fast.utils.images import read_rgb

LOOPBACK = "127.0.0.1"
MAX_BYTES = 32 * 2**20  # of an upload
MAX_UPLOADS = 8  # uploads in memory
TIMEOUT = 30  # seconds, of a silent client
USAGE = 'POST a picture\'s file to /?k=10, k files are wanted: {"hits": [{"path": …, "similarity": …}, …]}'


class Searcher(Protocol):
    """The interface of `search.Searcher` that the server uses."""

    files: list

    def search(self, queries: Any, k: int) -> list: ...


class Server(ThreadingHTTPServer):
    """Listens on `address`, (host, port), once it is made; port 0 is any that is free. Raises OSError if it cannot."""

    daemon_threads = True

    def __init__(self, searcher: Searcher, address: tuple[str, int]) -> None:
        self.searcher, self.upload_slots = searcher, threading.BoundedSemaphore(MAX_UPLOADS)
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that disconnects is no error
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "saga_fast", ""
    timeout = TIMEOUT

    def do_GET(self) -> None:
        self._answer(HTTPStatus.OK, {"usage": USAGE})

    def do_POST(self) -> None:
        if not self.server.upload_slots.acquire(blocking=False):
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": f"{MAX_UPLOADS} pictures at once; ask again"})
        try:
            self._answer(*self._search())
        finally:
            self.server.upload_slots.release()

    def _search(self) -> tuple[HTTPStatus, dict]:
        where = urlsplit(self.path)
        if where.path != "/":
            return HTTPStatus.NOT_FOUND, {"error": USAGE}
        # Rejects requests of foreign web pages by DNS rebinding.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.server.server_address[0] == LOOPBACK and host not in (LOOPBACK, "localhost"):
            return HTTPStatus.FORBIDDEN, {"error": f"Host: served are {LOOPBACK} and localhost"}
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return HTTPStatus.LENGTH_REQUIRED, {"error": "Content-Length: missing; give the number of bytes"}
        if len(length) > 12 or int(length) > MAX_BYTES:
            error = f"Content-Length: {length[:20]}; accepted are {MAX_BYTES} bytes at most"
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": error}
        k = parse_qs(where.query, keep_blank_values=True).get("k", ["10"])[-1]
        if not (k.isascii() and k.isdigit() and len(k) < 10) or COUNT.fault(int(k)):
            return HTTPStatus.BAD_REQUEST, {"error": f"k: {k[:20]!r}; give 1 or more"}
        try:
            hits = self.server.searcher.search(read_rgb(self.rfile.read(int(length)), "picture"), int(k))[0]
        except InputError as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}
        return HTTPStatus.OK, {"hits": [hit.fields() for hit in hits]}

    def _answer(self, status: HTTPStatus, content: dict) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def serve(searcher: Searcher, port: int, host: str = LOOPBACK) -> None:
    """Answers until Ctrl-C. Raises InputError if it cannot listen there."""
    try:
        server = Server(searcher, (host, port))
    except OSError as error:
        raise InputError(f"--serve: {host}:{port} cannot be listened on ({error.strerror}); give another") from error
    with server:
        where = f"http://{host}:{server.server_port}"
        try:  # around the print too: Ctrl-C may come right after the first line
            print(f"{len(searcher.files):,} files at {where}\n{USAGE}\nCtrl-C ends it", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")
