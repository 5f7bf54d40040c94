"""The plugin's event loop: it owns the socket to the runtime and the signals, and nothing else in the plugin waits.

The loop passes bytes to and from a Connection (shim.nri.plugin), which does no input or output.  One thread serves.
Compiling the inventory can take long, so it has a thread of its own.
"""

from __future__ import annotations

import gc
import os
import select
import selectors
import signal
import socket
import threading
import time
from typing import Any, Callable

from shim import report
from shim.errors import ChandlerError, HostError
from shim.host import trust
from shim.host.notify import notify
from shim.node.inventory import Inventory
from shim.node.watch import Watch
from shim.nri.http import MetricsServer
from shim.nri.plugin import CLOSING, CONFIGURED, READY, Connection, Refused
from shim.nri.service import Service
from shim.ttrpc.errors import TtrpcError

# Seconds between attempts to connect, doubled each time.  Short, since containers start unserved meanwhile.
RETRY_FIRST, RETRY_MOST = 0.05, 1.0
START = 5.0  # seconds after which systemd is told READY although no runtime has connected
HANDSHAKE = 10.0  # seconds from connecting to Configure
POLL = 1.0  # seconds between looks at the inventory's sources where there is no inotify
SETTLE = 0.05  # seconds without a change before the inventory's sources are read
MAX_OUTGOING = 64 << 20  # bytes that a runtime may leave unread
_READ = 256 << 10  # bytes read from the runtime at a time


class Loop:
    """The plugin as a process.

    `path`: the runtime's socket.  `given_socket`: the connected socket from the runtime that launched this process,
    which then ends with that connection; None otherwise.  `new_connection` makes the Connection for a socket.  `load`
    compiles the inventory, and raises ChandlerError.  `sources` gives the directories that an inventory comes from,
    each with the endings of the file names that matter in it.  `metrics`: the address of MetricsServer, '' for none.
    """

    def __init__(
        self,
        service: Service,
        path: str,
        given_socket: socket.socket | None,
        new_connection: Callable[[], Connection],
        load: Callable[[], Inventory],
        sources: Callable[[Inventory], dict[str, tuple[str, ...]]],
        metrics: str,
        watch: Watch | None = None,
    ) -> None:
        self.service = service
        self.path = path
        self.given_socket = given_socket
        self.new_connection = new_connection
        self.load = load
        self.sources = sources
        self.watch = watch or Watch()
        self.connection: Connection | None = None
        self._socket: socket.socket | None = None
        self._outgoing = bytearray()
        self._hang_up_poll = select.poll()  # tells when the runtime closes the connection
        self._selector = selectors.DefaultSelector()
        # Times (time.monotonic): of the next attempt to connect, and until when Configure has to come (0: no limit).
        self._connect_at = self._configure_by = 0.0
        self._retry_pause = RETRY_FIRST
        self._stop = False
        self._logged_reason = ""  # why no connection was possible, as last logged
        # Times, 0 for none: when to read the sources, and when to tell systemd READY.
        self._reload_at = self._ready_by = 0.0
        self._reloading: threading.Thread | None = None
        self._loaded: list[tuple[Inventory | None, str]] = []
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._metrics = MetricsServer(metrics, service.metrics_text, self._selector) if metrics else None

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT.  Raises ChandlerError for what a person must repair."""
        self._signals()
        self.watch.set(self.sources(self.service.inventory))
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        if self.watch.fileno() >= 0:
            self._selector.register(self.watch.fileno(), selectors.EVENT_READ, self._watched)
        if self._metrics is not None:
            self._metrics.start()
        self._reload_at = time.monotonic()  # the sources may have changed before the watch began
        self._ready_by = time.monotonic() + START
        # The objects of this moment stay for good, so the garbage collector need not visit them while a runtime waits.
        gc.freeze()
        try:
            while not self._stop:
                self._tick(time.monotonic())
                for key, _ in self._selector.select(self._timeout(time.monotonic())):
                    key.data()
        finally:
            notify("STOPPING=1")
            self._close()
            if self._metrics is not None:
                self._metrics.remove_path()

    # --- time ---------------------------------------------------------------------------------------------------

    def _timeout(self, now: float) -> float:
        """Seconds until something has to be done by `_tick`."""
        times = [self._ready_by, self._reload_at if self._reloading is None else 0.0]
        times.append(self._connect_at if self._socket is None else self._configure_by)
        if self.watch.fileno() < 0:
            times.append(now + POLL)
        due = (
            [at for at in times if at]
            + self.service.due()
            + (self.connection.due() if self.connection is not None else [])
        )
        return max(0.0, min(due) - now) if due else 3600.0

    def _tick(self, now: float) -> None:
        """Does all that is due."""
        self.service.tick(now)
        if self.connection is not None and self.connection.due():
            self.connection.tick(now)
            self._send()
        if self._socket is None and now >= self._connect_at:
            self._connect(now)
        elif self._socket is not None and self._configure_by and now >= self._configure_by:
            self._lost(f"no Configure came within {HANDSHAKE:.0f} s")
        if self.watch.fileno() < 0 and self.watch.changed():
            self._reload_at = now
        if self._ready_by and now >= self._ready_by:
            # Units that are ordered after this one wait until containers are served, or START seconds when no runtime
            # connects.
            self._ready_by = 0.0
            notify("READY=1\nSTATUS=waiting for the runtime")
        if self.service.outdated:
            self.service.outdated, self._reload_at = False, now
        if self._reload_at and now >= self._reload_at and self._reloading is None:
            self._reload_at = 0.0
            self._reload()

    # --- the runtime --------------------------------------------------------------------------------------------

    def _connect(self, now: float) -> None:
        try:
            channel = self.given_socket or _connected(self.path, self.service.account.owners)
        except (OSError, ChandlerError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            if self._logged_reason != reason:  # logged once, not at every attempt
                self._logged_reason = reason
                self._say("warning", f"no runtime at {self.path}: {reason}; trying again")
            self._connect_at = now + self._retry_pause
            self._retry_pause = min(self._retry_pause * 2, RETRY_MOST)
            return
        channel.setblocking(False)
        self._socket, self._logged_reason = channel, ""
        self._configure_by = now + HANDSHAKE
        self._hang_up_poll = select.poll()
        self._hang_up_poll.register(channel, select.POLLRDHUP)
        self.connection = self.new_connection()
        self.connection.hung_up = self._hung_up
        self.service.metrics.connections += 1
        self._selector.register(channel, selectors.EVENT_READ, self._receive)
        self.connection.open()
        self._send()

    def _hung_up(self) -> bool:
        """Whether the runtime has closed the connection, even while there are bytes left to read."""
        return bool(self._hang_up_poll.poll(0))

    def _receive(self) -> None:
        assert self._socket is not None and self.connection is not None
        now = time.monotonic()  # before the read: the bytes had arrived by then
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
            raise  # another attempt would be refused for the same reason
        except (TtrpcError, ChandlerError) as error:
            self._lost(str(error))
            return
        if self.connection.state in (CONFIGURED, READY):
            self._configure_by = 0.0
        # containerd 1.7 sends no Synchronize to a plugin that it launched itself, so there Configure has to do.
        if not self.service.metrics.connected and (
            self.connection.state == READY or self._configure_by == 0.0 and self.given_socket
        ):
            self._retry_pause = RETRY_FIRST
            self.service.metrics.connected = True
            self._say("info", f"serving {self.service.runtime}")
            self._ready_by = 0.0
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
        self._connect_at = time.monotonic() + self._retry_pause
        self._retry_pause = min(self._retry_pause * 2, RETRY_MOST)
        if self.given_socket is not None:
            self._stop = True  # only the runtime that launched this process can give it another socket

    def _close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
        if self.connection is not None:
            self.connection.close(len(self._outgoing))
        self._socket = self.connection = None
        self._outgoing.clear()
        self._configure_by = 0.0
        self.service.metrics.connected = False

    # --- configuration and inventory ----------------------------------------------------------------------------

    def _watched(self) -> None:
        if self.watch.changed():
            self._reload_at = time.monotonic() + SETTLE

    def _reload(self) -> None:
        # The watch begins before the sources are read, so that a change during the reading is noticed.
        self.watch.set(self.sources(self.service.inventory))
        self._reloading = threading.Thread(target=self._read, daemon=True)
        self._reloading.start()

    def _read(self) -> None:
        try:
            self._loaded.append((self.load(), ""))
        except ChandlerError as error:
            self._loaded.append((None, str(error)))
        except Exception as error:  # a defect in Chandler must not stop the plugin, which still has an inventory
            self._loaded.append((None, f"internal error, {type(error).__name__}: {error}"))
        os.write(self._wake_out, b"L")

    def _reloaded(self) -> None:
        self._reloading = None
        inventory, problem = self._loaded.pop()
        self.service.metrics.reloads["done" if inventory is not None else "failed"] += 1
        if inventory is None:
            self._say("error", f"the inventory from before stays in force: {problem}")
        else:
            before = self.sources(self.service.inventory)
            self.service.inventory = inventory
            if self.sources(inventory) != before:
                self._reload_at = time.monotonic()  # watch the new directories, then read once more
        if not self._ready_by:
            notify("READY=1")  # ends what RELOADING=1 began

    # --- signals ------------------------------------------------------------------------------------------------

    def _signals(self) -> None:
        """Makes signals wake the selector: the interpreter writes their numbers to the pipe."""
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, _noted)

    def _woken(self) -> None:
        try:
            woken = os.read(self._wake_in, 4096)
        except BlockingIOError:
            return
        for byte in set(woken):
            # SIGCHLD only has to wake the loop: Service.tick then looks at the work that has ended.
            if byte in (signal.SIGTERM, signal.SIGINT):
                self._stop = True
            elif byte == signal.SIGHUP:
                notify("RELOADING=1")
                self._reload_at = time.monotonic()
            elif byte == ord("L"):
                self._reloaded()

    def _say(self, level: str, text: str) -> None:
        self.service.log({"time": report.now(), "level": level, "msg": text})


def _noted(number: int, frame: Any) -> None:
    """Does nothing: the wakeup descriptor has the signal's number.  Without a handler no number would be written."""


def _connected(path: str, owners: dict[int, str]) -> socket.socket:
    """A connection to the runtime's socket.  Raises OSError, or ChandlerError when others can replace the socket.

    `owners`: see trust.check_path.
    """
    trust.check_path(path, owners)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        channel.connect(path)
    except OSError:
        channel.close()
        raise
    return channel


def inherited_socket(descriptor: int) -> socket.socket:
    """The socket that the runtime left open when it launched this process.  Raises HostError."""
    try:
        os.set_inheritable(descriptor, False)
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise HostError(f"NRI_PLUGIN_SOCKET={descriptor} is no socket: {error.strerror}") from None
