"""The grants that containers hold: in memory, as records on disk, and as leases in the ledger.

Nothing here waits.  When the last lease that shares a GPU ends, another process (shim.nri.work) puts the GPU back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from shim import report
from shim.errors import ChandlerError
from shim.nri.holds import Holds
from shim.nri.metrics import Metrics
from shim.state import grants, leases, ledger

if TYPE_CHECKING:
    from shim.node.inventory import Account, Inventory
    from shim.nri.work import Work
    from shim.shapes import Document
    from shim.state.leases import Lease

_NOWHERE = "/dev/null"  # used as a directory: no file can be found or made below it


class Granted(NamedTuple):
    """What a container was given: the CDI device names and the paths of device nodes in its adjustment, the keys of the
    physical devices, and when (time.monotonic; 0 when an earlier process gave it)."""

    names: set[str]
    paths: set[str]
    keys: list[str]
    since: float


NOTHING = Granted(set(), set(), [], 0.0)


class GrantBook:
    """All grants through NRI on this node.

    `inventory` may be replaced at any time.  `log` writes one line of JSON.  `granted`: by container id.
    `unlisted`: containers with young grants that the runtime does not list, and until when (time.monotonic) their
    grants are kept, since their creates may still be going on.
    """

    def __init__(self, account: Account, inventory: Inventory, log: Callable[[Document], None]) -> None:
        self.account = account
        self.inventory = inventory
        self.log = log
        self.metrics = Metrics()
        self.granted: dict[str, Granted] = {}
        self.holds = Holds(self.end)
        self.unlisted: dict[str, float] = {}
        self._leftover: set[str] = set()  # keys of devices that may have to be put back after they were shared
        self._putting_back: Work | None = None

    @property
    def state_dir(self) -> str:
        """The state directory; a path that holds nothing while others than its owner may write to the directory.

        It does not raise, because the answer to most events cannot report an error.
        """
        try:
            return self.trusted_state_dir()
        except ChandlerError:
            return _NOWHERE

    def trusted_state_dir(self) -> str:
        """The state directory.  Raises TrustError when others may write to it, or HostError."""
        return self.account.trusted_state_dir(self.inventory.config["state-dir"])

    @property
    def records_directory(self) -> str:
        """Where the grant records of NRI containers are."""
        return grants.nri_directory(self.state_dir)

    @property
    def ledger(self) -> _Ledger:
        """The ledger in the state directory of this moment."""
        return _Ledger(self.state_dir, self.account.rootless, self.note_leftover)

    def note_leftover(self, keys: list[str] | None) -> None:
        """Notes devices that may have to be put back because a lease that shared them has ended.

        `keys`: the devices' keys; None for all devices that are set up for sharing.  `tick` starts the work.
        """
        if keys is not None:
            self._leftover.update(keys)
        elif os.path.exists(self.state_dir + "/shared"):
            from shim.sharing import pages

            self._leftover.update(page["key"] for page in pages.every(self.state_dir) if "key" in page)

    def tick(self, now: float) -> None:
        """Looks after holds, young grants and work in other processes.

        Call it at the times that `due` gives, and when a child process has ended.  `now`: time.monotonic.
        """
        self.holds.tick(now)
        for container_id in [each for each, until in self.unlisted.items() if now >= until]:
            self.undo(container_id, "the runtime has no such container")
        if self._putting_back is not None and self._putting_back.done:
            if self._putting_back.error is not None:
                # The devices' pages stay, so the next container that takes the devices tries again.
                self.complain(self._putting_back.error)
            self._putting_back = None
        if self._leftover and self._putting_back is None:
            keys = sorted(self._leftover)
            self._leftover.clear()
            if os.path.exists(self.state_dir + "/shared"):
                from shim.nri import work

                self._putting_back = work.Work(work.task(self.state_dir, self.account.rootless, keys))

    def due(self) -> list[float]:
        """The times (time.monotonic) at which `tick` has something to do."""
        return [
            *self.holds.due(),
            *self.unlisted.values(),
            *([self._putting_back.until] if self._putting_back is not None else []),
        ]

    def has_record(self, container_id: str) -> bool:
        """Whether a container has a grant record."""
        return os.path.exists(grants.record_path(self.records_directory, "", container_id))

    def undo(self, container_id: str, why: str) -> None:
        """Takes back a grant that never reached its container, and logs why."""
        self.release(container_id, undone=True)
        self.log({"time": report.now(), "level": "warning", "container": container_id, "undone": why})

    def release(self, container_id: str, undone: bool = False) -> None:
        """Gives back all that a container held: its lease and its record.  `undone`: it never had it."""
        self.granted.pop(container_id, None)
        self.unlisted.pop(container_id, None)
        self.end_lease(container_id, undone)
        grants.remove(self.records_directory, "", container_id)
        self.metrics.grants = len(self.granted)

    def end_lease(self, container_id: str, undone: bool = False) -> None:
        """Ends a container's or sandbox's lease, if it has one."""
        try:
            lease = leases.of_container(self.ledger.read(), "nri", "", container_id)
        except ChandlerError as error:
            self.complain(error, container_id)
        else:
            if lease is not None:
                self.end(lease, undone)

    def end(self, lease: Lease, undone: bool = True) -> None:
        """Ends a lease; all code of the plugin that ends one calls this.  `undone`: as in `release`.

        Logs an error and does not raise it, because the answer to most events cannot report one.
        """
        try:
            self.ledger.release({lease["token"]}, undone)
        except ChandlerError as error:
            self.complain(error, lease["id"])

    def complain(self, error: ChandlerError, container_id: str = "") -> None:
        """Logs an error that no answer to the runtime can report."""
        self.log(
            {
                "time": report.now(),
                "level": "error",
                **({"container": container_id} if container_id else {}),
                "error": str(error),
            }
        )


class _Ledger(ledger.Ledger):
    """The ledger for the serving thread, which must not wait.

    When the last lease on a shared device ends, it passes the device's key to `note_leftover` and does not put the
    device back.
    """

    __slots__ = ("_note_leftover",)

    def __init__(self, state_dir: str, private: bool, note_leftover: Callable[[list[str] | None], None]) -> None:
        super().__init__(state_dir, private)
        self._note_leftover = note_leftover

    def restore_gpus(self, keys: list[str] | None) -> None:
        """Only notes the keys: GrantBook.tick has another process do what the base class would do here."""
        self._note_leftover(keys)
