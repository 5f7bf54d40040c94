"""What the plugin does for containers: requests to adjustments, grants kept and given back, one log line each.

Nothing here waits: the inventory is in memory, and a handler's only effects are looks at device nodes and one small
file.  NRI creates the container unadjusted when a handler takes more than two seconds.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Set

from shim import engine, files, grants, jsontext, leases, ledger, report
from shim.errors import ChandlerError, HostError, LeaseError
from shim.nri import adjust, document, evict, messages
from shim.nri.adjust import Runtime
from shim.nri.metrics import Metrics
from shim.request import MARK

if TYPE_CHECKING:
    from shim.inventory import Inventory, Place

# A record is written before its container can be listed, so a younger one is not given up.
_MINIMUM_AGE = 60.0  # seconds
_PATIENCE = 1.0  # seconds
_CDI = "cdi.k8s.io"


class Held(NamedTuple):
    """What a container was given: the CDI devices by name, and the device nodes' paths, that the adjustment named."""

    names: Set[str]
    paths: Set[str]


class Service:
    """One for the life of the process; connections come and go.  `inventory` may be replaced at any time."""

    def __init__(self, place: Place, inventory: Inventory, log: Callable[[Dict[str, Any]], None]) -> None:
        self.place = place
        self.inventory = inventory
        self.log = log
        self.metrics = Metrics()
        self.runtime = Runtime("", "")
        self.held: Dict[str, Held] = {}
        self._collecting: Optional[threading.Thread] = None
        self.evict: Callable[[str, int], None] = evict.end

    @property
    def _state_dir(self) -> str:
        return str(self.inventory.config["state-dir"] or self.place.state_dir)

    @property
    def _records(self) -> str:
        return grants.nri(self._state_dir)

    @property
    def _ledger(self) -> ledger.Ledger:
        return ledger.Ledger(self._state_dir, self.place.rootless)

    # --- one container ----------------------------------------------------------------------------------------

    def create(self, pod: Any, container: Any) -> Optional[Any]:
        """The adjustment for a new container, None when it asks for nothing.  Raises ChandlerError to refuse it."""
        started = time.perf_counter()
        annotations = document.merged_annotations(pod, container)
        if not self._asks(annotations):
            self.metrics.created("nothing", time.perf_counter() - started)
            return None
        line: Dict[str, Any] = {"time": report.now(), "container": container.id, "name": container.name, "pod": pod.name,
                                "namespace": pod.namespace}
        try:
            made = self._grant(pod, container, annotations, line)
        except ChandlerError as error:
            seconds = time.perf_counter() - started
            self.metrics.created("refused", seconds, type(error).__name__)
            self.log({**line, "level": "error", "refused": str(error), "ms": _ms(seconds)})
            raise
        seconds = time.perf_counter() - started
        self.metrics.created("nothing" if made is None else "granted", seconds)
        if made is not None:
            self.log({**line, "ms": _ms(seconds)})
        return made

    def _asks(self, annotations: Iterable[str]) -> bool:
        config = self.inventory.config
        prefix: str = config["annotation-prefix"]
        return any(key.startswith(prefix) for key in annotations) or (
            config["cdi.annotations"] and any(key.startswith(_CDI) for key in annotations))

    def _grant(self, pod: Any, container: Any, annotations: Dict[str, str], line: Dict[str, Any]) -> Optional[Any]:
        wanted = document.build(container, annotations)
        result: Any = None

        def planned(held: Any) -> Optional[engine.Plan]:
            nonlocal result
            made = engine.plan(wanted, self.inventory, container.name, held, known=_known(pod))
            if made is not None:
                result = adjust.adjustment(made, self.runtime, wanted)
            return made

        plan = self._leased(pod, container, planned)
        if plan is None:
            return None
        nodes = adjust.nodes(plan)
        record = {
            "id": container.id, "root": "", "owner": "nri", "runtime": str(self.runtime), "pod": pod.id,
            "namespace": pod.namespace, "name": container.name, "source": plan.request.source, "devices": plan.names,
            "physical": plan.keys, "nodes": nodes, "time": int(time.time()),
            "grant": files.digest(jsontext.dumps([plan.request.document, plan.names])),
        }
        try:
            grants.write(self._records, record, self.place.rootless)
        except (OSError, ChandlerError) as error:
            self._end_lease(container.id)
            if isinstance(error, OSError):
                raise HostError(f"the grant cannot be recorded in {self._records}: {error.strerror}") from None
            raise
        self.held[container.id] = Held({device.name for device in result.CDI_devices},
                                       {device.path for device in result.linux.devices})
        self.metrics.grants = len(self.held)
        counts: Dict[str, int] = {}
        for edit in plan.edits.items:
            counts[edit[0]] = counts.get(edit[0], 0) + 1
        line.update(source=plan.request.source, devices=plan.names, edits=counts, runtime=str(self.runtime))
        return result

    def _leased(self, pod: Any, container: Any, plan: Callable[[Any], Optional[engine.Plan]]) -> Optional[engine.Plan]:
        """The plan, its devices held by nobody else where leases are kept.  Raises ChandlerError."""
        if self.inventory.config["gpu.allocator"] != "leases":
            return plan(None)
        try:
            made: Optional[engine.Plan] = self._ledger.allocate(
                ledger.nri_lease(container.id, pod.id, int(time.time())), plan, patient=False)
        except LeaseError:
            # Runtimes are asked off the handler; when a lease turns out to be nobody's, the kubelet's next try finds it.
            if self._collecting is None or not self._collecting.is_alive():
                self._collecting = threading.Thread(target=self._collect, args=(self._ledger,), daemon=True)
                self._collecting.start()
            raise
        return made

    def _collect(self, book: ledger.Ledger) -> None:
        try:
            book.take_back()
        except ChandlerError as error:
            self.log({"time": report.now(), "level": "error", "error": str(error)})

    def validate(self, container: Any, adjustment: Any) -> str:
        """Why the adjustment that all plugins together made must not be used; empty when it may."""
        held = self.held.get(container.id)
        if held is None:
            return ""
        missing = (held.names - {device.name for device in adjustment.CDI_devices}
                   | held.paths - {device.path for device in adjustment.linux.devices})
        return f"another NRI plugin took away {', '.join(sorted(missing))}, which Chandler had granted" if missing else ""

    def stop(self, container_id: str, pid: int) -> None:
        """The container's processes have ended, or its create has failed; one that still runs keeps its devices."""
        if not evict.runs(container_id, pid):
            self._end_lease(container_id)

    def remove(self, container_id: str) -> None:
        """The container is gone."""
        if self.held.pop(container_id, None) is not None or self._recorded(container_id):
            self._release(container_id)

    def _release(self, container_id: str) -> None:
        """Gives back all that a container held."""
        self._end_lease(container_id)
        grants.remove(self._records, "", container_id)
        self.metrics.grants = len(self.held)

    def _end_lease(self, container_id: str) -> None:
        """The one place where leases end.  Never raises: an event has nobody to tell."""
        try:
            lease = leases.of_container(self._ledger.read(), "nri", "", container_id)
            if lease is not None:
                self._ledger.release({lease["token"]})
        except ChandlerError as error:
            self.log({"time": report.now(), "level": "error", "container": container_id, "error": str(error)})

    def _recorded(self, container_id: str) -> bool:
        return os.path.exists(grants.record_path(self._records, "", container_id))

    def measured(self) -> str:
        """The metrics, as they are now."""
        try:
            self.metrics.leases = sum(lease["owner"] == "nri" for lease in self._ledger.read())
        except ChandlerError:
            pass  # the number before stays
        return self.metrics.text()

    # --- all containers ---------------------------------------------------------------------------------------

    def configure(self, runtime: Runtime) -> None:
        """Remembers the runtime that has just connected."""
        self.runtime = runtime

    def synchronize(self, pods: Dict[str, Any], containers: List[Any]) -> None:
        """Compares grants with what runs.

        Grants of containers that are gone are given back.  Containers that asked and were not served, because they
        were created while no plugin was there, are reported, and evicted where the policy says so.
        """
        ids = {container.id for container in containers}
        recorded = self._sweep(ids)
        self._sweep_leases({container.id for container in containers if container.state in messages.LIVE_STATES})
        others = self._wrapped()
        for container in containers:
            if container.id in recorded or container.id in others or container.state not in messages.LIVE_STATES:
                continue
            pod = pods.get(container.pod_sandbox_id)
            reason = self._unserved(pod, container)
            if reason:
                self.metrics.unadjusted += 1
                line = {"time": report.now(), "level": "warning", "container": container.id, "name": container.name,
                        "pod": pod.name if pod else "", "unadjusted": reason, "evicted": False}
                if self.inventory.config["policy.evict-unadjusted"]:
                    try:
                        self.evict(container.id, container.pid)
                        line["evicted"] = True
                    except ChandlerError as error:
                        line["error"] = str(error)
                self.log(line)

    def _unserved(self, pod: Any, container: Any) -> str:
        annotations = document.merged_annotations(pod, container) if pod else dict(container.annotations)
        if not self._asks(annotations):
            return ""
        # Our own mark has come back to us with the container's annotations; here it tells nothing either way.
        annotations.pop(f"{self.inventory.config['annotation-prefix']}{MARK}", None)
        try:
            plan = engine.plan(document.build(container, annotations), self.inventory, container.name,
                               known=_known(pod) if pod else None)
        except ChandlerError as error:
            return f"it runs without what it asked for, which would be refused: {error}"
        return "it runs without what it asked for: it was created while chandler-nri was not there" if plan else ""

    def _sweep(self, ids: Set[str]) -> Set[str]:
        """The containers that have a record; records of containers that are gone are removed."""
        directory = grants.directory(self._records)
        recorded: Set[str] = set()
        try:
            names = os.listdir(directory)
        except OSError:
            names = []
        for name in names:
            try:
                data, found = files.read(f"{directory}/{name}", grants.MAX_RECORD)
                container = jsontext.loads(data)["id"]
            except (OSError, ChandlerError, KeyError, TypeError):
                continue
            if container in ids or time.time() - found.st_mtime < _MINIMUM_AGE:
                recorded.add(container)
                self.held.setdefault(container, Held(set(), set()))
            else:
                self.held.pop(container, None)
                self._release(container)
        self.metrics.grants = len(self.held)
        return recorded

    def _sweep_leases(self, live: Set[str]) -> None:
        """Ends the leases of containers that ended while no plugin was told."""
        try:
            gone = [lease["id"] for lease in self._ledger.read()
                    if lease["owner"] == "nri" and lease["id"] not in live and time.time() - lease["since"] >= _MINIMUM_AGE]
        except ChandlerError:
            return  # whoever wants a lease is told
        for container in gone:
            self._end_lease(container)

    def _wrapped(self) -> Set[str]:
        """The containers that the runtime wrapper has equipped."""
        try:
            return {name.partition("-")[2][:-len(".json")] for name in os.listdir(grants.directory(self._state_dir))}
        except OSError:
            return set()


def _known(pod: Any) -> Dict[str, Any]:
    """What the runtime says of a pod, for the policy's rules; a handler must not wait for a provider of secrets."""
    return {"namespace": pod.namespace, "pod": pod.name, "handler": pod.runtime_handler, "seconds": _PATIENCE}


def _ms(seconds: float) -> jsontext.Number:
    return jsontext.Number(f"{seconds * 1000:.3f}")
