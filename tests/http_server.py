"""An HTTP server for tests of fetching, which misbehaves on demand: each request takes the next entry of its script."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server offers at every path, how the next requests are treated, and what was asked."""

    body: bytes
    etag: str = ""
    date: str = ""
    kind: str = "application/octet-stream"
    script: list[Callable[[Handler], None]] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def ranges(self) -> list[str]:
        """The Range of each request, "" where there was none."""
        return [headers.get("range", "") for headers in self.asked]

    @property
    def md5(self) -> str:
        return hashlib.md5(self.body).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Knows ranges and If-Range as RFC 9110 has them, unless the script says otherwise."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.asked.append({name.lower(): value for name, value in self.headers.items()})
        site.paths.append(self.path)
        (site.script.pop(0) if site.script else serve)(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, status: int, length: int | None, **more: str) -> None:
        """Status and headers."""
        self.send_response(status)
        self.send_header("Content-Type", self.site.kind)
        if self.site.etag:
            self.send_header("ETag", self.site.etag)
        if self.site.date:
            self.send_header("Last-Modified", self.site.date)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def part(self) -> bytes:
        """Sends the headers of what was asked for, and returns its bytes."""
        body, wanted = self.site.body, self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if not wanted or (condition and condition not in (self.site.etag, self.site.date)):
            self.head(200, len(body))
            return body
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(body):
            self.head(416, 0, Content_Range=f"bytes */{len(body)}")
            return b""
        self.head(206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        return body[start:]

    def hang_up(self, *, reset: bool = False) -> None:
        """Closes the connection, where asked with a reset, as crashing servers do."""
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


Act = Callable[[Handler], None]


def serve(handler: Handler) -> None:
    """What was asked for."""
    handler.wfile.write(handler.part())


def drops_after(num: int, *, reset: bool = False) -> Act:
    """The connection ends after so many bytes of the body."""

    def act(handler: Handler) -> None:
        handler.wfile.write(handler.part()[:num])
        handler.hang_up(reset=reset)

    return act


def stalls_after(num: int) -> Act:
    """Nothing more comes after so many bytes, until the test is over."""

    def act(handler: Handler) -> None:
        handler.wfile.write(handler.part()[:num])
        handler.wfile.flush()
        handler.site.released.wait(30)
        handler.close_connection = True

    return act


def answers(status: int, **headers: str) -> Act:
    """An empty answer of this status."""
    return lambda handler: handler.head(status, 0, **headers)


def ignores_ranges(handler: Handler) -> None:
    """All of it, whatever was asked for."""
    handler.head(200, len(handler.site.body))
    handler.wfile.write(handler.site.body)


def ignores_conditions(handler: Handler) -> None:
    """The range that was asked for, although the file is another now."""
    del handler.headers["If-Range"]
    serve(handler)


def leaves_the_whole_unsaid(num: int) -> Act:
    """So many bytes of the range that was asked for, then the end; the length of the file is not told."""

    def act(handler: Handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
        end = len(handler.site.body) - 1
        handler.head(206, None, Content_Range=f"bytes {start}-{end}/*", Connection="close")
        handler.wfile.write(handler.site.body[start : start + num])
        handler.hang_up()

    return act


def without_length(handler: Handler) -> None:
    """A body that ends with the connection."""
    handler.head(200, None, Connection="close")
    handler.wfile.write(handler.site.body)
    handler.hang_up()


def in_chunks(handler: Handler) -> None:
    """A body in chunks, whose whole length nobody says."""
    handler.head(200, None, Transfer_Encoding="chunked")
    body = handler.site.body
    for start in range(0, len(body), 10_000):
        piece = body[start : start + 10_000]
        handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def in_chunks_that_break_off(handler: Handler) -> None:
    """The first chunk, then nothing."""
    handler.head(200, None, Transfer_Encoding="chunked")
    handler.wfile.write(b"2710\r\n" + handler.site.body[:10_000] + b"\r\n")
    handler.hang_up()


@contextlib.contextmanager
def running(site: Site, certificate: str = "") -> Iterator[Site]:
    """The server at `site.url` until the block ends; over TLS where there is a certificate with its key."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"site": site}))
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.url = f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_port}/files/set.bin"
    try:
        yield site
    finally:
        site.released.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
