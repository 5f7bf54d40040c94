"""Compares grants with the containers that a runtime lists: all of them when it connects, one when it starts.

A runtime that gets no answer in time creates the container without edits.  So a container may run without what it asked
for ("unserved"), and a grant may have no container.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shim import report
from shim.errors import ChandlerError, PolicyError
from shim.nri import evict, messages
from shim.nri.book import Granted
from shim.nri.holds import PATIENCE_FOR_RETRY, Hold
from shim.request.parse import MARK
from shim.state import grants, leases, records

if TYPE_CHECKING:
    from shim.nri.book import GrantBook
    from shim.state.grants import GrantRecord

# A grant is recorded before the runtime lists its container, so a grant younger than this is kept without one.
_MINIMUM_AGE = 60.0  # seconds
_NEVER_REACHED = (
    "the container was created without what had been granted: the runtime had stopped waiting for the answer"
)


class Sweeps:
    """Ends grants without a container, and reports, refuses or evicts containers without their grant.

    `unserved` takes a pod (None where the runtime has not told of it) and a container without a grant.  It gives the
    reason why the container runs without what it asked for; empty when it asked for nothing.  `evict` ends a container.
    """

    def __init__(self, book: GrantBook, unserved: Callable[[Any, Any], str]) -> None:
        self.book = book
        self.evict: Callable[[str, int], None] = evict.kill
        self._unserved = unserved
        self._reported: set[str] = set()  # unserved containers that the log has

    def start(self, pod: Any, container: Any) -> None:
        """Checks a container with a request whose processes are about to run.

        Raises PolicyError to refuse one that was not served, where the policy says so.  Its create was not answered in
        time, so this is the first occasion to refuse it.
        """
        served = False
        if self.book.has_record(container.id):
            served = self._reached(records.read(self.book.records_directory, "", container.id), container)
            if not served:
                self.book.undo(container.id, _NEVER_REACHED)
        reason = "" if served or container.id in self._wrapped() else self._unserved(pod, container)
        if not reason:
            return
        refused = bool(self.book.inventory.config["policy.evict-unadjusted"])
        self._report(pod, container, reason, refused)
        if refused:
            raise PolicyError(reason, "delete this container, so that it is created anew: evict-unadjusted is set")

    def forget(self, container_id: str) -> None:
        """A container is gone."""
        self._reported.discard(container_id)

    def synchronize(self, pods: dict[str, Any], containers: list[Any]) -> None:
        """Compares all grants with all containers of the runtime.  `pods`: by id.

        A grant is given back when its container is gone, or when the container does not have what was granted because
        the answer came too late.  A container that asked and was not served was created while no plugin was running,
        or while the plugin was held up.  It is reported, and evicted where the policy says so.
        """
        recorded = self._sweep({container.id: container for container in containers})
        self._reported &= {container.id for container in containers}
        live = {container.id for container in containers if container.state in messages.LIVE_STATES}
        self._sweep_leases(live | pods.keys())
        by_wrapper = self._wrapped()
        for container in containers:
            if container.id in recorded or container.id in by_wrapper or container.state not in messages.LIVE_STATES:
                continue
            pod = pods.get(container.pod_sandbox_id)
            reason = self._unserved(pod, container)
            if reason:
                evicted, error = False, ""
                if self.book.inventory.config["policy.evict-unadjusted"]:
                    try:
                        self.evict(container.id, container.pid)
                        evicted = True
                    except ChandlerError as problem:
                        error = str(problem)
                self._report(pod, container, reason, evicted, error)

    def _report(self, pod: Any, container: Any, reason: str, evicted: bool, error: str = "") -> None:
        """Logs and counts an unserved container once, and logs it again when it is refused or evicted (`evicted`)."""
        if container.id not in self._reported:
            self._reported.add(container.id)
            self.book.metrics.unadjusted += 1
        elif not evicted:
            return
        self.book.log(
            {
                "time": report.now(),
                "level": "warning",
                "container": container.id,
                "name": container.name,
                "pod": pod.name if pod else "",
                "unadjusted": reason,
                "evicted": evicted,
                **({"error": error} if error else {}),
            }
        )

    def _reached(self, record: GrantRecord | None, container: Any) -> bool:
        """Whether a grant's answer reached its container: the runtime then lists it with our mark and the devices.

        The mark alone proves nothing, since anybody can put it on a pod.  Neither does the record, which is written
        before the answer leaves.  Where the record cannot be read (None), only the mark can be checked.
        """
        try:
            assert record is not None
            key, value = record.get("mark", ("", ""))  # records of earlier releases have no such key
            present = {(device.path, device.major, device.minor) for device in container.linux.devices}
            return (not key or container.annotations.get(key) == value) and all(
                (path, major, minor) in present for path, _, major, minor in record["nodes"]
            )
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
            return f"{self.book.inventory.config['annotation-prefix']}{MARK}" in container.annotations

    def _sweep(self, listed: dict[str, Any]) -> set[str]:
        """The ids of containers that have what their record says.  Gives back what the other records granted."""
        recorded: set[str] = set()
        for path, record in records.every(self.book.records_directory):
            try:
                age_of_file = time.time() - os.stat(path).st_mtime
            except OSError:
                continue
            if record is None:  # it cannot be used, and only its file name tells the container
                container_id = os.path.basename(path).partition("-")[2][: -len(".json")]
                if container_id in listed:
                    if self._reached(None, listed[container_id]):
                        recorded.add(container_id)
                elif age_of_file >= _MINIMUM_AGE:
                    self.book.release(container_id)
                    if os.path.exists(path):  # the name has a digest in place of the id
                        os.unlink(path)
                else:
                    self.book.unlisted[container_id] = time.monotonic() + _MINIMUM_AGE - max(age_of_file, 0.0)
                continue
            container_id = record["id"]
            container = listed.get(container_id)
            if container is not None and not self._reached(record, container):
                self.book.undo(container_id, _NEVER_REACHED)
                continue
            grant = self.book.granted.setdefault(
                container_id, Granted(set(), set(), list(record.get("physical", [])), 0.0)
            )
            recorded.add(container_id)
            if container is not None:
                self.book.unlisted.pop(container_id, None)
                continue
            # The monotonic clock where this process made the grant: the time of day may have been set since.
            age = time.monotonic() - grant.since if grant.since else age_of_file
            if age < _MINIMUM_AGE:
                self.book.unlisted[container_id] = time.monotonic() + _MINIMUM_AGE - max(age, 0.0)
            else:
                recorded.discard(container_id)
                self.book.release(container_id)
        self.book.metrics.grants = len(self.book.granted)
        return recorded

    def _sweep_leases(self, live: set[str]) -> None:
        """Ends the leases of containers and pods that ended while no plugin was running.

        `live`: the ids of those that have not.

        A young lease without a record belongs to a create that an earlier process of the plugin refused until the
        kubelet's retry, so it becomes a hold again.  Devices that are set up for sharing without any lease are put
        back.
        """
        try:
            ended = [lease for lease in self.book.ledger.read() if lease["owner"] == "nri" and lease["id"] not in live]
        except ChandlerError:
            return  # a create that needs a lease gets this error as its refusal
        for lease in ended:
            age = time.time() - lease["since"]
            if self.book.holds.has(lease["id"]):
                continue
            if age >= _MINIMUM_AGE or leases.is_of_sandbox(lease):
                self.book.end(lease, undone=False)
            elif not self.book.has_record(lease["id"]):
                self.book.holds.add(
                    lease["pod"],
                    str(lease.get("container")),
                    Hold(lease, None, "", time.monotonic() + PATIENCE_FOR_RETRY - max(age, 0.0)),
                )
        self.book.note_leftover(None)

    def _wrapped(self) -> set[str]:
        """The ids of containers that chandler-runtime has equipped."""
        try:
            return {
                name.partition("-")[2][: -len(".json")] for name in os.listdir(grants.directory(self.book.state_dir))
            }
        except OSError:
            return set()
