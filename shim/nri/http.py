"""The HTTP server for the metrics.  It never blocks: the selector of the plugin's loop calls it."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
from collections.abc import Callable

from shim.errors import HostError

MAX_SCRAPES = 16  # open connections; one more closes the oldest
MAX_REQUEST = 8 << 10  # bytes of a scrape's request


class MetricsServer:
    """Listens at `address`, `unix:PATH` or HOST:PORT with a loopback host, and answers with what `text` gives.

    Raises HostError when it cannot listen there.
    """

    def __init__(self, address: str, text: Callable[[], str], selector: selectors.BaseSelector) -> None:
        self._listener = _listen(address)
        self._text = text
        self._selector = selector
        self._scrapes: dict[socket.socket, bytearray] = {}

    def start(self) -> None:
        """Answers scrapes from now on."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def remove_path(self) -> None:
        """Removes the path of a Unix socket."""
        if self._listener.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                os.unlink(self._listener.getsockname())

    def _accept(self) -> None:
        try:
            scrape, _ = self._listener.accept()
        except OSError:
            return
        if len(self._scrapes) >= MAX_SCRAPES:
            oldest = next(iter(self._scrapes))
            self._close(oldest)
        scrape.setblocking(False)
        self._scrapes[scrape] = bytearray()
        self._selector.register(scrape, selectors.EVENT_READ, lambda: self._answer(scrape))

    def _answer(self, scrape: socket.socket) -> None:
        """Reads a request up to its empty line, or MAX_REQUEST, and answers with the metrics whatever it asks for."""
        request = self._scrapes[scrape]
        try:
            data = scrape.recv(MAX_REQUEST)
            request += data
            if data and b"\r\n\r\n" not in request and len(request) <= MAX_REQUEST:
                return
            if data:
                body = self._text().encode()
                head = (
                    f"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                # One send: what does not fit the socket's buffer is lost, since this must not wait.
                scrape.send(head.encode() + body)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self._close(scrape)

    def _close(self, scrape: socket.socket) -> None:
        self._selector.unregister(scrape)
        scrape.close()
        del self._scrapes[scrape]


def _listen(address: str) -> socket.socket:
    """A listening socket at `unix:PATH`, for its owner only, or at a port of the loopback.  Raises HostError."""
    try:
        if address.startswith("unix:"):
            path = address[len("unix:") :]
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)  # left by a process that was killed
            except FileNotFoundError:
                pass
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            mask = os.umask(0o077)
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
        else:
            host, _, port = address.rpartition(":")
            if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdigit() or not 0 <= int(port) < 65536:
                raise HostError(
                    f"--metrics {address}: metrics are served on this machine only",
                    "write unix:/run/chandler/metrics.sock or 127.0.0.1:PORT",
                )
            listener = socket.socket(
                socket.AF_INET6 if host == "[::1]" else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC
            )
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host.strip("[]"), int(port)))
    except OSError as error:
        raise HostError(f"--metrics {address}: {error.strerror}") from None
    listener.listen(MAX_SCRAPES)
    listener.setblocking(False)
    return listener
