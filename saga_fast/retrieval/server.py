"""Search over HTTP, for programs on the same machine: a picture in, the most similar files out.

    curl --data-binary @picture.jpg 'http://127.0.0.1:8000/?k=5'
    {"hits": [{"path": "…", "similarity": 0.93}, …]}

A POST's body is one picture file; errors are returned as {"error": "…"}. The fields `explain=1`,
`attribute=NAME=WEIGHT` (repeated for several) and `only=NAME` are the flags of `search`. A request cannot name a file
to open. Left out, for a proxy to add: TLS and authentication.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from saga_fast.retrieval.blocks import parse_weights
from saga_fast.utils.errors import InputError
from saga_fast.utils.flags import COUNT
from saga_fast.utils.images import read_rgb

LOOPBACK = "127.0.0.1"
MAX_BYTES = 32 * 2**20  # of an upload
MAX_UPLOADS = 8  # uploads in memory
TIMEOUT = 30  # seconds, for a silent client
USAGE = (
    "POST a picture's file to /?k=10, where k is the number of hits: "
    '{"hits": [{"path": …, "similarity": …}, …]}; more fields: explain=1, attribute=NAME=WEIGHT, only=NAME'
)
FIELDS = ("k", "explain", "attribute", "only")


class Searcher(Protocol):
    """The interface of `search.Searcher` that the server uses."""

    files: list[Any]

    def search(
        self, queries: Any, k: int, *, explain: bool, weights: Mapping[str, float] | None, only: str | None
    ) -> list[Any]: ...


class Server(ThreadingHTTPServer):
    """Listens on `address`, (host, port), once it is constructed; port 0 means any free port. Raises OSError if it
    cannot."""

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
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            error = "Content-Length: missing; give the number of bytes"
            return self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": error})
        if len(length) > 12 or int(length) > MAX_BYTES:
            error = f"Content-Length: {length[:20]}; accepted are {MAX_BYTES} bytes at most"
            return self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": error})
        self.unread = int(length)
        if self.server.upload_slots.acquire(blocking=False):
            try:
                content = self._search()
            finally:
                self.server.upload_slots.release()  # before the answer: a client that has it can send another request
        else:
            content = HTTPStatus.SERVICE_UNAVAILABLE, {"error": f"{MAX_UPLOADS} pictures at once; try again"}
        while self.unread and (block := self.rfile.read(min(self.unread, 2**16))):
            self.unread -= len(block)  # a client that is still sending would not read an answer
        self._answer(*content)

    def _search(self) -> tuple[HTTPStatus, dict[str, Any]]:
        where = urlsplit(self.path)
        if where.path != "/":
            return HTTPStatus.NOT_FOUND, {"error": USAGE}
        # Rejects requests of foreign web pages by DNS rebinding.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.server.server_address[0] == LOOPBACK and host not in (LOOPBACK, "localhost"):
            return HTTPStatus.FORBIDDEN, {"error": f"Host: served are {LOOPBACK} and localhost"}
        try:
            settings = _settings(where.query)
            content, self.unread = self.rfile.read(self.unread), 0
            hits = self.server.searcher.search(read_rgb(content, "picture"), **settings)[0]
        except InputError as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error).removeprefix("--")}
        return HTTPStatus.OK, {"hits": [hit.fields() for hit in hits]}

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def _settings(query: str) -> dict[str, Any]:
    """The arguments of `Searcher.search` from a request's fields. Raises InputError for unknown or malformed ones."""
    asked = parse_qs(query, keep_blank_values=True)
    for name, values in asked.items():
        if name not in FIELDS:
            raise InputError(f"{name[:40]!r}: unknown field; accepted are {', '.join(FIELDS)}")
        if len(values) > 1 and name != "attribute":
            raise InputError(f"{name}: given {len(values)} times; give it once")
    (k,), (explain,), (only,) = asked.get("k", ["10"]), asked.get("explain", ["0"]), asked.get("only", [None])
    if not (k.isascii() and k.isdigit() and len(k) < 10) or COUNT.fault(int(k)):
        raise InputError(f"k: {k[:20]!r}; give 1 or more")
    if explain not in ("0", "1"):
        raise InputError(f"explain: {explain[:20]!r}; give 0 or 1")
    return {"k": int(k), "explain": explain == "1", "weights": parse_weights(asked.get("attribute", [])), "only": only}


def serve(searcher: Searcher, port: int, host: str = LOOPBACK) -> None:
    """Serves until Ctrl-C. Raises InputError if it cannot listen on the address."""
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
