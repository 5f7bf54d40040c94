"""The one place with sockets, signals and waiting: a loop around Connection, which takes and gives bytes.

One thread serves; compiling the inventory anew, which can take long, has a thread of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import selectors
import signal
import socket
import stat
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from shim import report
from shim.errors import ChandlerError, HostError
from shim.host import trust
from shim.node.inventory import Inventory
from shim.nri.plugin import CLOSING, CONFIGURED, READY, Connection, Refused
from shim.nri.service import Service
from shim.nri.watch import Watch
from shim.ttrpc.errors import TtrpcError

RETRY_FIRST, RETRY_MOST = 0.05, 1.0  # seconds between attempts to connect; unserved containers start meanwhile
START = 5.0  # seconds until we count as started although no runtime has come
HANDSHAKE = 10.0  # seconds from connecting to Configure
POLL = 1.0  # seconds between looks at the sources where there is no inotify
SETTLE = 0.05  # seconds without a change before the sources are read
MAX_OUTGOING = 64 << 20  # bytes that a runtime may leave unread
MAX_SCRAPES = 16  # connections to the metrics at a time
MAX_REQUEST = 8 << 10  # bytes of a scrape's request
_READ = 256 << 10


class Loop:
    """The plugin as a process.

    `connected`: a socket from the runtime that launched us; when it ends, so do we.  `load`: compiles the inventory;
    `sources`: the directories that it comes from, each with
    the ends of the names that matter in it.
    """

    def __init__(
        self,
        service: Service,
        path: str,
        connected: Optional[socket.socket],
        new: Callable[[], Connection],
        load: Callable[[], Inventory],
        sources: Callable[[Inventory], Dict[str, Tuple[str, ...]]],
        metrics: str,
        watch: Optional[Watch] = None,
    ) -> None:
        self.service = service
        self.path = path
        self.given = connected
        self.new = new
        self.load = load
        self.sources = sources
        self.watch = watch or Watch()
        self.connection: Optional[Connection] = None
        self._socket: Optional[socket.socket] = None
        self._outgoing = bytearray()
        self._end = select.poll()  # of the connection
        self._selector = selectors.DefaultSelector()
        self._again = self._deadline = 0.0
        self._pause = RETRY_FIRST
        self._stop = False
        self._waited = ""
        self._reload_at = self._start_by = 0.0
        self._reloading: Optional[threading.Thread] = None
        self._loaded: List[Tuple[Optional[Inventory], str]] = []
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._scrapes: Dict[socket.socket, bytearray] = {}
        self._listener = _listen(metrics) if metrics else None

    def run(self) -> None:
        """Until SIGTERM or SIGINT.  Raises ChandlerError for what a person must mend."""
        self._signals()
        self.watch.set(self.sources(self.service.inventory))
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        if self.watch.fileno() >= 0:
            self._selector.register(self.watch.fileno(), selectors.EVENT_READ, self._watched)
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ, self._scraped)
        self._reload_at = time.monotonic()  # what changed between the first reading and the watch
        self._start_by = time.monotonic() + START
        gc.freeze()  # what is there now stays: the collector need not look at it while a runtime waits
        try:
            while not self._stop:
                self._tick(time.monotonic())
                for key, _ in self._selector.select(self._timeout(time.monotonic())):
                    key.data()
        finally:
            notify("STOPPING=1")
            self._close()
            if self._listener is not None and self._listener.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    os.unlink(self._listener.getsockname())

    # --- time ---------------------------------------------------------------------------------------------------

    def _timeout(self, now: float) -> float:
        times = [self._start_by, self._reload_at if self._reloading is None else 0.0]
        times.append(
            self._deadline
            if self._socket is not None and self._deadline
            else self._again
            if self._socket is None
            else 0.0
        )
        if self.watch.fileno() < 0:
            times.append(now + POLL)
        due = (
            [at for at in times if at]
            + self.service.due()
            + (self.connection.due() if self.connection is not None else [])
        )
        return max(0.0, min(due) - now) if due else 3600.0

    def _tick(self, now: float) -> None:
        self.service.tick(now)
        if self.connection is not None and self.connection.due():
            self.connection.tick(now)
            self._send()
        if self._socket is None and now >= self._again:
            self._connect(now)
        elif self._socket is not None and self._deadline and now >= self._deadline:
            self._lost(f"no Configure came within {HANDSHAKE:.0f} s")
        if self.watch.fileno() < 0 and self.watch.changed():
            self._reload_at = now
        if self._start_by and now >= self._start_by:
            # Whoever is ordered after us starts no container before we serve, or, without a runtime, waits this long.
            self._start_by = 0.0
            notify("READY=1\nSTATUS=waiting for the runtime")
        if self.service.outdated:
            self.service.outdated, self._reload_at = False, now
        if self._reload_at and now >= self._reload_at and self._reloading is None:
            self._reload_at = 0.0
            self._reload()

    # --- the runtime --------------------------------------------------------------------------------------------

    def _connect(self, now: float) -> None:
        try:
            made = self.given or _connected(self.path, self.service.place.owners)
        except (OSError, ChandlerError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            if self._waited != reason:  # said once, not at every attempt
                self._waited = reason
                self._say("warning", f"no runtime at {self.path}: {reason}; trying again")
            self._again = now + self._pause
            self._pause = min(self._pause * 2, RETRY_MOST)
            return
        made.setblocking(False)
        self._socket, self._waited = made, ""
        self._deadline = now + HANDSHAKE
        self._end = select.poll()
        self._end.register(made, select.POLLRDHUP)
        self.connection = self.new()
        self.connection.hung_up = self._hung_up
        self.service.metrics.connections += 1
        self._selector.register(made, selectors.EVENT_READ, self._receive)
        self.connection.open()
        self._send()

    def _hung_up(self) -> bool:
        """Whether the runtime has closed the connection, even when there is something left to read."""
        return bool(self._end.poll(0))

    def _receive(self) -> None:
        assert self._socket is not None and self.connection is not None
        now = time.monotonic()  # what is read now was there before
        try:
            data = self._socket.recv(_READ)
        except (BlockingIOError, InterruptedError):
            data = None
        except OSError as error:
            self._lost(error.strerror or str(error))
            return
        if data == b"":
            self._lost("the runtime closed the connection")
            return
        try:
            if data:
                self.connection.receive(data, now)
        except Refused:
            raise  # trying again would come to the same
        except (TtrpcError, ChandlerError) as error:
            self._lost(str(error))
            return
        if self.connection.state in (CONFIGURED, READY):
            self._deadline = 0.0
        # containerd 1.7 synchronises no plugin that it launched itself
        if not self.service.metrics.connected and (
            self.connection.state == READY or self._deadline == 0.0 and self.given
        ):
            self._pause = RETRY_FIRST
            self.service.metrics.connected = True
            self._say("info", f"serving {self.service.runtime}")
            self._start_by = 0.0
            notify(f"READY=1\nSTATUS=serving {self.service.runtime}")
        self._send()
        if self.connection is not None and self.connection.state == CLOSING and not self._outgoing:
            self._lost("the runtime shuts down")

    def _send(self) -> None:
        assert self._socket is not None and self.connection is not None
        self._outgoing += self.connection.take()
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._lost(error.strerror or str(error))
            return
        if not self._outgoing:
            self.connection.all_sent()
        elif len(self._outgoing) > MAX_OUTGOING:
            self._lost(f"the runtime leaves more than {MAX_OUTGOING} bytes unread")
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        self._selector.modify(self._socket, events, self._receive)

    def _lost(self, reason: str) -> None:
        self._close()
        self._say("warning", f"the connection to the runtime has ended: {reason}")
        notify("STATUS=waiting for the runtime")
        self._again = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, RETRY_MOST)
        if self.given is not None:
            self._stop = True  # only the runtime that launched us can give another

    def _close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
        if self.connection is not None:
            self.connection.close(len(self._outgoing))
        self._socket = self.connection = None
        self._outgoing.clear()
        self._deadline = 0.0
        self.service.metrics.connected = False

    # --- configuration and inventory ----------------------------------------------------------------------------

    def _watched(self) -> None:
        if self.watch.changed():
            self._reload_at = time.monotonic() + SETTLE

    def _reload(self) -> None:
        # Before the sources are read: a change in between is then seen.
        self.watch.set(self.sources(self.service.inventory))
        self._reloading = threading.Thread(target=self._read, daemon=True)
        self._reloading.start()

    def _read(self) -> None:
        try:
            self._loaded.append((self.load(), ""))
        except ChandlerError as error:
            self._loaded.append((None, str(error)))
        except Exception as error:  # a defect of ours must not take the inventory away that works
            self._loaded.append((None, f"internal error, {type(error).__name__}: {error}"))
        os.write(self._wake_out, b"L")

    def _reloaded(self) -> None:
        self._reloading = None
        inventory, problem = self._loaded.pop()
        self.service.metrics.reloads["done" if inventory is not None else "failed"] += 1
        if inventory is None:
            self._say("error", f"what was there before stays in force: {problem}")
        else:
            before = self.sources(self.service.inventory)
            self.service.inventory = inventory
            if self.sources(inventory) != before:
                self._reload_at = time.monotonic()  # with the new directories watched
        if not self._start_by:
            notify("READY=1")  # after RELOADING=1

    # --- signals ------------------------------------------------------------------------------------------------

    def _signals(self) -> None:
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGCHLD,
        ):  # the last wakes us, and `tick` looks
            signal.signal(number, _noted)

    def _woken(self) -> None:
        try:
            woken = os.read(self._wake_in, 4096)
        except BlockingIOError:
            return
        for byte in set(woken):
            if byte in (signal.SIGTERM, signal.SIGINT):
                self._stop = True
            elif byte == signal.SIGHUP:
                notify("RELOADING=1")
                self._reload_at = time.monotonic()
            elif byte == ord("L"):
                self._reloaded()

    # --- metrics ------------------------------------------------------------------------------------------------

    def _scraped(self) -> None:
        assert self._listener is not None
        try:
            scrape, _ = self._listener.accept()
        except OSError:
            return
        if len(self._scrapes) >= MAX_SCRAPES:
            oldest = next(iter(self._scrapes))
            self._done(oldest)
        scrape.setblocking(False)
        self._scrapes[scrape] = bytearray()
        self._selector.register(scrape, selectors.EVENT_READ, lambda: self._answer(scrape))

    def _answer(self, scrape: socket.socket) -> None:
        """HTTP as far as a scraper needs it: whatever is asked, the answer is the metrics."""
        request = self._scrapes[scrape]
        try:
            data = scrape.recv(MAX_REQUEST)
            request += data
            if data and b"\r\n\r\n" not in request and len(request) <= MAX_REQUEST:
                return
            if data:
                body = self.service.measured().encode()
                head = (
                    f"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                scrape.send(head.encode() + body)  # fits the socket's buffer, or the scrape is lost
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass
        self._done(scrape)

    def _done(self, scrape: socket.socket) -> None:
        self._selector.unregister(scrape)
        scrape.close()
        del self._scrapes[scrape]

    def _say(self, level: str, text: str) -> None:
        self.service.log({"time": report.now(), "level": level, "msg": text})


def _noted(number: int, frame: Any) -> None:
    """Signals come through the wakeup descriptor."""


def _connected(path: str, owners: Dict[int, str]) -> socket.socket:
    """A connection to the runtime's socket, which must be root's.  Raises OSError or ChandlerError."""
    trust.check_way(path, owners)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.connect(path)
    except OSError:
        made.close()
        raise
    return made


def given(descriptor: int) -> socket.socket:
    """The socket that the runtime which launched us left open.  Raises HostError."""
    try:
        os.set_inheritable(descriptor, False)
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise HostError(f"NRI_PLUGIN_SOCKET={descriptor} is no socket: {error.strerror}") from None


def _listen(address: str) -> socket.socket:
    """The metrics' socket: `unix:PATH`, or a port of the loopback.  Raises HostError."""
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
                    f"--metrics {address}: metrics are for this machine alone",
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


def notify(state: str) -> None:
    """Tells systemd, where it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError:
        pass  # nobody listens any more
