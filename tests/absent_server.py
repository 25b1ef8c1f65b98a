"""A TCP proxy before a real server that can be away: refuse connections, or take them and say nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class AbsentServer:
    """Forwards to `upstream` while it is there; `leave` cuts every connection."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._lock, self._pairs, self._is_silent, self._is_closed = threading.Lock(), set(), False, False
        self._port = 0
        self._listening: socket.socket | None = None
        self.come_back()

    @property
    def address(self) -> str:
        """Where clients find it, whether it is there or not."""
        return f"http://127.0.0.1:{self._port}"

    def leave(self, *, silent: bool = False) -> None:
        """From now on connections are refused, or, if `silent`, taken and never answered, as by a stopped process."""
        self._is_silent = silent
        if not silent and self._listening is not None:
            listening, self._listening = self._listening, None
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for each in pairs:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """It serves again, at the same address."""
        self._is_silent = False
        if self._listening is None and not self._is_closed:
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", self._port))
            listening.listen(64)
            self._port, self._listening = listening.getsockname()[1], listening
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def close(self) -> None:
        """Ends it."""
        self._is_closed = True
        self.leave()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with self._lock:
                self._pairs.add(client)
            if not self._is_silent:
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._upstream)
        except OSError:
            client.close()
            return
        with self._lock:
            self._pairs.add(server)
        back = threading.Thread(target=_pump, args=(server, client), daemon=True)
        back.start()
        _pump(client, server)
        back.join()
        with self._lock:
            self._pairs -= {client, server}
        client.close()
        server.close()


@contextlib.contextmanager
def absent_server(upstream: str) -> Iterator[AbsentServer]:
    """A proxy before `upstream` that is there until it is told to leave."""
    proxy = AbsentServer(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
