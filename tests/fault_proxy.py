"""A proxy between a client and a real S3 server that breaks what passes, by a seeded schedule, and counts."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BURST = 4  # so many requests in a row are told to slow down
# Kind of fault -> the answer that stands for the server's own.
REFUSALS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
}
# The others: resets (RST) before the request is read, in the middle of it and in the middle of the answer; a body that
# ends before the length it was announced with, and one announced with its shorter length; one bit turned in a body on
# the way down and on the way up; an answer that takes its time; a write that is carried out and never answered.
KINDS = (
    *REFUSALS,
    "reset_before",
    "reset_request",
    "reset_response",
    "truncated",
    "shortened",
    "flipped_get",
    "flipped_put",
    "stall",
    "lost_answer",
)
OF_BODIES = ("truncated", "shortened", "flipped_get")  # known to be possible only once the server has answered


@dataclass(frozen=True)
class Request:
    """What a fault may depend on."""

    method: str
    path: str
    body: bytes = b""
    range: str = ""

    @property
    def is_object(self) -> bool:
        """Whether it is for the bytes of one object or of one part of it: these have checksums, listings have none."""
        parts = urlsplit(self.path)
        queries = parse_qs(parts.query, keep_blank_values=True).keys()
        return parts.path.strip("/").count("/") > 0 and queries <= {"uploadId", "partNumber", "x-id"}

    def allows(self, kind: str) -> bool:
        """Whether this kind of fault makes sense here."""
        if kind in OF_BODIES:
            return self.method == "GET" and self.is_object
        if kind == "flipped_put":
            return self.method == "PUT" and self.is_object and len(self.body) > 1
        if kind == "reset_request":
            return len(self.body) > 1
        return kind != "lost_answer" or self.method != "GET"


@dataclass
class Schedule:
    """Which request gets which fault. `counts` holds what was injected, `requests` all that came.

    `meanwhile` is called before a request goes on to the server: others may be quicker.

    At random, `rate` of the requests get one: of the kinds that a request allows, the one that was injected least.
    """

    rate: float = 0.0
    kinds: Collection[str] = KINDS
    seed: int = 0
    stall_s: float = 0.3
    always: str = ""
    meanwhile: Callable[[Request], None] = lambda request: None
    counts: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self):
        self.draws = random.Random(self.seed)
        self._lock = threading.Lock()
        self._next: list[str] = []
        self._burst = 0

    def once(self, *kinds: str) -> None:
        """The next requests that allow it get these faults, one each, before any drawn at random."""
        self._next += kinds

    @property
    def is_spent(self) -> bool:
        """Whether every fault of `once` has happened."""
        return not self._next

    def draw(self, request: Request) -> str:
        """The fault for this request, "" for none; to be given to `count` or `put_back`."""
        with self._lock:
            self.requests.append(request)
            if self.always and request.allows(self.always):
                return self.always
            if self._next:
                return self._next.pop(0) if request.allows(self._next[0]) else ""
            if self._burst:
                self._burst -= 1
                return "slow_down"
            if self.draws.random() >= self.rate:
                return ""
            allowed = [kind for kind in self.kinds if request.allows(kind)]
            kind = min(allowed, key=lambda kind: (self.counts[kind], self.draws.random()), default="")
            self._burst = BURST - 1 if kind == "slow_down" else 0
            return kind

    def count(self, kind: str) -> None:
        """It was injected."""
        with self._lock:
            self.counts[kind] += 1

    def put_back(self, kind: str) -> None:
        """It could not be injected: the answer has no body."""
        with self._lock:
            if kind not in self.kinds or not self.rate:
                self._next.insert(0, kind)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str, schedule: Schedule, without: Collection[str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.schedule = urlsplit(upstream).netloc, schedule
        self.without = {name.lower() for name in without}

    def shutdown_request(self, request):
        self.close_request(request)  # without the FIN that goes before: a reset must be one

    def handle_error(self, request, client_address):
        pass  # clients hang up on us as we do on them


@contextmanager
def fault_proxy(upstream: str, schedule: Schedule, *, without: Collection[str] = ()) -> Iterator[str]:
    """The address of a proxy before `upstream` that injects the faults of a schedule while the block lasts.

    It leaves out the request headers in `without`: a server that ignores If-None-Match.
    """
    server = _Server(upstream, schedule, without)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self._upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)

    def finish(self):
        self._upstream.close()
        super().finish()

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        schedule = self.server.schedule
        size = int(self.headers.get("Content-Length") or 0)
        # The body is read later, where a reset may cut it in half.
        request = Request(self.command, self.path, b"?" * min(size, 2), self.headers.get("Range", ""))
        kind = schedule.draw(request)
        if kind == "reset_before":
            return self._reset(kind)
        body = self.rfile.read(size // 2 if kind == "reset_request" else size)
        if kind == "reset_request":
            return self._reset(kind)
        if kind in REFUSALS:
            return self._refuse(kind)
        if kind == "flipped_put":
            schedule.count(kind)
            body = self._flipped(body)
        schedule.meanwhile(request)
        answer, content = self._ask(body)
        if kind in OF_BODIES and (answer.status not in (200, 206) or len(content) < 2):
            schedule.put_back(kind)
            kind = ""
        if kind == "lost_answer":
            return self._reset(kind)
        if kind and kind != "flipped_put":
            schedule.count(kind)
        self._answer(answer, content, kind)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """What the server says."""
        left_out = {"expect", "connection", *self.server.without}
        for is_last in (False, True):
            try:
                self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in left_out:
                        self._upstream.putheader(name, value)
                self._upstream.endheaders(body)
                answer = self._upstream.getresponse()
                return answer, answer.read()
            except (http.client.HTTPException, OSError):
                self._upstream.close()  # a connection that the server has closed meanwhile
                if is_last:
                    raise
        raise AssertionError("unreachable")

    def _answer(self, answer: http.client.HTTPResponse, content: bytes, kind: str) -> None:
        cut = self.server.schedule.draws.randrange(1, max(2, len(content)))
        if kind == "shortened":
            content = content[:cut]
        if kind == "flipped_get":
            content = self._flipped(content)
        # Half of the stalls come between the headers and the end of the body.
        early = cut % 2 == 0 or not content
        if kind == "stall" and early:
            time.sleep(self.server.schedule.stall_s)
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        if kind == "reset_response" and not content:
            self.wfile.write(b"".join(self._headers_buffer)[:-3])  # in the middle of the headers
            return self._reset("")
        self.end_headers()
        if kind in ("reset_response", "truncated") or (kind == "stall" and not early):
            self.wfile.write(content[:cut])
            if kind == "reset_response":
                return self._reset("")
            if kind == "truncated":
                self.close_connection = True
                return
            time.sleep(self.server.schedule.stall_s)
            content = content[cut:]
        self.wfile.write(content)

    def _refuse(self, kind: str) -> None:
        self.server.schedule.count(kind)
        status, code, message = REFUSALS[kind]
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self, kind: str) -> None:
        """Closes with an RST, as a machine does that has lost its state."""
        if kind:
            self.server.schedule.count(kind)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _flipped(self, body: bytes) -> bytes:
        at = self.server.schedule.draws.randrange(len(body))
        return body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]
