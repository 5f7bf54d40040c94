"""The process: keeps the kubelet's list of devices true, and survives restarts of the kubelet.

Twice a second it looks whether a source of the inventory, the ledger of leases, a device node or the kubelet's socket
has changed.  That costs some calls of stat; what has not changed is not read again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from shim import report
from shim.errors import ChandlerError, HostError
from shim.host import trust
from shim.host.notify import notify
from shim.kubelet import devices, sockets
from shim.kubelet.device_plugin import KUBELET, DevicePlugin
from shim.node import compiler
from shim.node.watch import Watch
from shim.request import parse
from shim.state import allocations
from shim.state.ledger import Ledger

if TYPE_CHECKING:
    from shim.kubelet.api_server import ApiServer
    from shim.kubelet.devices import Device
    from shim.kubelet.dra import Driver
    from shim.node.inventory import Account, Inventory
    from shim.shapes import Document
    from shim.state.leases import Lease

_PERIOD = 0.5  # seconds between two looks
_SOCKETS = "chandler-"  # how the names of our sockets begin
_UNKNOWN = object()  # the status of a ledger that could not be read


class Service:
    """The device plugins of one node.

    `directory`: the kubelet's directory of sockets.  `log` takes one line.
    `dra`: for a DRA driver beside them: the API server, the name of this node, the directory for the driver's socket.
    """

    def __init__(
        self, account: Account, directory: str, log: Callable[[Document], None], dra: tuple[ApiServer, str, str] | None
    ) -> None:
        self.account = account
        self.directory = directory
        self._log = log
        self.inventory: Inventory = compiler.compile_now(account)
        self._key()  # so that what a person must repair is said at the start
        self.plugins: dict[str, DevicePlugin] = {}  # by CDI kind
        self._order: dict[str, dict[str, int]] = {}  # by CDI kind: name of a device, its number
        self._watch = Watch()
        self._held: list[Lease] | None = []
        self._ledger_status: object = _UNKNOWN
        self._registered: dict[str, object] = {}  # by CDI kind: the kubelet's socket at which it is registered
        self._said: dict[str, str] = {}  # by subject: the problem that was logged last
        self._driver: Driver | None = None
        if dra is not None:
            from shim.kubelet.dra import Driver

            self._driver = Driver(account, lambda: self.inventory, *dra, self._say, self._told)

    def run(self, stopped: threading.Event) -> None:
        """Serves until `stopped` is set.  Raises ChandlerError for what a person must repair."""
        self._watch.set(compiler.watched_names(self.account, self.inventory))
        self.inventory = compiler.compile_now(self.account)  # it may have changed before the watch began
        try:
            self.look()
            if self._driver is not None:
                self._driver.start()
            notify("READY=1")
            while not stopped.wait(_PERIOD):
                self.look()
        finally:
            notify("STOPPING=1")
            for plugin in self.plugins.values():
                plugin.stop()
            if self._driver is not None:
                self._driver.stop()

    def look(self) -> None:
        """Does what has to be done now."""
        if self._watch.changed():
            self._reload()
        self._read_ledger()
        for kind, resource in devices.resources(self.inventory).items():
            try:
                self._serve(kind, resource)
                self._say(resource, "")
            except ChandlerError as error:
                self._say(resource, str(error))
        if self._driver is not None:
            self._driver.look(self._held)

    # --- the node -------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        self._watch.set(compiler.watched_names(self.account, self.inventory))
        try:
            inventory = compiler.compile_now(self.account)
            devices.resources(inventory)
        except ChandlerError as error:
            self._say("inventory", f"the inventory from before stays in force: {error}")
            return
        self._say("inventory", "")
        self.inventory = inventory

    def _read_ledger(self) -> None:
        if self.inventory.config["gpu.allocator"] != "leases":
            self._held = []
            return
        try:
            ledger = Ledger(self.account.trusted_state_dir(self.inventory.config["state-dir"]), self.account.rootless)
            status = sockets.status(ledger.path)
            if status != self._ledger_status:
                self._held = ledger.read()
                self._ledger_status = status
            self._say("ledger", "")
        except ChandlerError as error:
            self._held, self._ledger_status = None, _UNKNOWN
            self._say("ledger", str(error))

    # --- the kubelet ----------------------------------------------------------------------------------------------

    def _serve(self, kind: str, resource: str) -> None:
        """Keeps the plugin of one kind: its devices, its socket, and its registration.  Raises ChandlerError."""
        survey = devices.survey(kind, self.inventory, self._held)
        plugin = self.plugins.get(kind)
        if plugin is not None and plugin.resource != resource:  # the configuration has another name for it now
            plugin.update([])
            plugin.stop()
            del self.plugins[kind], self._registered[kind]
            plugin = None
        if plugin is None:
            if not survey:
                return
            plugin = self.plugins[kind] = self._plugin(kind, resource)
        self._order[kind] = {device.name: number for number, device in enumerate(survey)}
        for device, before in plugin.update(survey):
            self._tell(resource, device, before)
        kubelet = self._kubelet()
        if kubelet == self._registered.get(kind) and sockets.status(plugin.path) is not None:
            return
        self._registered[kind] = None
        plugin.stop()
        plugin.start()  # anew: a kubelet that starts removes all sockets of plugins
        plugin.register()
        self._registered[kind] = kubelet
        self._told(f"the kubelet has taken {resource}")

    def _plugin(self, kind: str, resource: str) -> DevicePlugin:
        def allocate(names: Sequence[str]) -> dict[str, str]:
            return self.allocate(kind, names)

        def prefer(available: Sequence[str], included: Sequence[str], count: int) -> list[str]:
            return devices.preferred(
                list(available), list(included), count, kind, self.inventory, self._order.get(kind, {})
            )

        name = f"{_SOCKETS}{resource.replace('/', '_')}.sock"
        return DevicePlugin(resource, self.directory, name, allocate, prefer)

    def allocate(self, kind: str, names: Sequence[str]) -> dict[str, str]:
        """The annotations of a container to which the kubelet gives some devices.  Raises HostError."""
        for name in names:
            if name not in self._order.get(kind, {}):
                raise HostError(f"{name} is no device of this node", "delete the pod; another one gets what is there")
        key = self.inventory.config["annotation-prefix"] + parse.ALLOCATION + kind.partition("/")[0]
        return {key: allocations.text(names, self._key())}

    def _key(self) -> bytes:
        """The node's key, read each time, since a person may have replaced it.  Raises TrustError or HostError."""
        try:
            return allocations.make_key()
        except OSError as error:
            raise HostError(f"{allocations.key_path()} cannot be made: {error.strerror}") from None

    def _kubelet(self) -> object:
        """What tells the kubelet's socket from that of another start.  Raises HostError or TrustError."""
        path = os.path.join(self.directory, KUBELET)
        try:
            trust.check_path(path, self.account.owners)
        except OSError as error:
            raise HostError(f"no kubelet listens at {path}: {error.strerror}") from None
        return sockets.status(path)

    # --- what people read -----------------------------------------------------------------------------------------

    def _tell(self, resource: str, device: Device, before: Device | None) -> None:
        """Logs a device that cannot be given, or can be given again."""
        if device.problem and (before is None or before.problem != device.problem):
            words = f"{resource}: {device.name} is unhealthy: {device.problem}"
            self._log({"time": report.now(), "level": "warning", "msg": words})
        elif before is not None and before.problem and not device.problem:
            self._told(f"{resource}: {device.name} is healthy again")

    def _told(self, line: str) -> None:
        """Logs an event."""
        self._log({"time": report.now(), "level": "info", "msg": line})

    def _say(self, subject: str, problem: str) -> None:
        """Logs a problem when it is another than at the last look."""
        if problem and self._said.get(subject) != problem:
            self._log({"time": report.now(), "level": "error", "msg": f"{subject}: {problem}"})
        self._said[subject] = problem
