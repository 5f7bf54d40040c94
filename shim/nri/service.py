"""What the plugin does for containers: requests to adjustments, grants kept and given back, one log line each.

Nothing here waits: the inventory is in memory, and a handler's only effects are looks at device nodes and small files.
NRI creates the container unadjusted when a handler takes more than two seconds, and containerd asks for one container
after the other, so that all others wait, too.  What may take its time (sharing a GPU, and putting one back) is the
work of another process (shim.nri.work), for which the answer to a create waits a moment; shim.nri.holds has the rest.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

from shim import engine, jsontext, report
from shim.edits import MOUNT, Edits, merge
from shim.errors import BundleError, ChandlerError, ChangedError, LeaseError, PolicyError
from shim.gpu import choose
from shim.host import device_nodes
from shim.nri import adjust, as_config, beside, evict, messages
from shim.nri.adjust import Runtime
from shim.nri.holds import PATIENCE, PATIENCE_FOR_RETRY, Hold, Holds, Later, Starting
from shim.nri.metrics import Metrics
from shim.oci import reader
from shim.policy import engines, words
from shim.policy.caller import Caller
from shim.request.parse import MARK
from shim.sharing.terms import MPS
from shim.state import grants, leases, ledger, records

if TYPE_CHECKING:
    from shim.node.inventory import Inventory, Place
    from shim.nri.work import Work
    from shim.sharing.terms import Sharing
    from shim.state.leases import Lease

# A record is written before its container can be listed, so a younger one is not given up.
_MINIMUM_AGE = 60.0  # seconds
_NEVER_REACHED = (
    "the container was created without what had been granted: the runtime had stopped waiting for the answer"
)
_PATIENCE = 1.0  # seconds
_CDI = "cdi.k8s.io"
_NOWHERE = "/dev/null"  # as a directory it has nothing in it, and nothing can be made there
# What containerd and CRI-O write on a container that they restore: its other annotations are those of the checkpoint.
_RESTORED = (
    "restored",
    "checkpointedAt",
    "checkpointImage",
    "org.criu.checkpoint.",
    "io.kubernetes.cri-o.annotations.checkpoint",
)
_ENGINES = {"containerd": "containerd", "cri-o": "crio"}  # by the names that runtimes give themselves through NRI


class Held(NamedTuple):
    """What a container was given: the CDI devices by name, and the device nodes' paths, that the adjustment named, and
    the physical devices; and when (time.monotonic), 0 for by an earlier process."""

    names: Set[str]
    paths: Set[str]
    keys: List[str]
    since: float


_NOTHING = Held(set(), set(), [], 0.0)


class Unawaited(ChandlerError):
    """The runtime has given a create up: whatever is answered now does not reach the container."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            f"{runtime} waits for the answer to this create no longer, so nothing is granted",
            "see why chandler-nri was held up: a stopped process, swapping, a slow disk",
        )


class Service:
    """One for the life of the process; connections come and go.  `inventory` may be replaced at any time.

    `rejects_hooks`: whether the runtime that has just connected creates no container for which a plugin adds OCI hooks.
    """

    def __init__(
        self,
        place: Place,
        inventory: Inventory,
        log: Callable[[Dict[str, Any]], None],
        rejects_hooks: Callable[[], bool] = lambda: False,
    ) -> None:
        self.place = place
        self.inventory = inventory
        self.log = log
        self._rejects_hooks = rejects_hooks
        self.outdated = False  # whether the inventory has to be compiled anew
        self.hooks = True  # whether containers may be given OCI hooks
        self.metrics = Metrics()
        self.runtime = Runtime("", "")
        self.held: Dict[str, Held] = {}
        self.holds = Holds(self._end)
        self.patience = PATIENCE
        self._leftover: Set[str] = set()
        self._putting_back: Optional[Work] = None
        self._collecting: Optional[threading.Thread] = None
        self.evict: Callable[[str, int], None] = evict.end
        self._unlisted: Dict[
            str, float
        ] = {}  # containers with young grants that the runtime does not list, and until when it may
        self._numbers: Optional[Tuple[Inventory, Dict[str, str]]] = None  # the GPUs' device numbers, of one inventory
        self._reported: Set[str] = set()  # unserved containers that have been named

    @property
    def _state_dir(self) -> str:
        """A place where nothing is while others may write to the state directory: an event has nobody to tell."""
        try:
            return self._trusted_state_dir()
        except ChandlerError:
            return _NOWHERE

    def _trusted_state_dir(self) -> str:
        """Raises TrustError or HostError."""
        return self.place.trusted_state_dir(self.inventory.config["state-dir"])

    @property
    def _records(self) -> str:
        return grants.nri(self._state_dir)

    @property
    def _ledger(self) -> _Ledger:
        return _Ledger(self._state_dir, self.place.rootless, self._left)

    def _left(self, keys: Optional[List[str]]) -> None:
        """Devices that may have to be put back, since a lease that shared them has ended; None: any that are shared."""
        if keys is not None:
            self._leftover.update(keys)
        elif os.path.exists(self._state_dir + "/shared"):
            from shim.sharing import pages

            self._leftover.update(page["key"] for page in pages.every(self._state_dir) if "key" in page)

    # --- one container ----------------------------------------------------------------------------------------

    def create(self, pod: Any, container: Any, awaited: Callable[[], bool] = lambda: True) -> Any:
        """The adjustment for a new container, None when it asks for nothing, or a Later that gives it.

        `awaited`: whether the runtime still waits for the answer.  Raises ChandlerError to refuse the container.
        """
        started = time.perf_counter()
        annotations = as_config.merged_annotations(pod, container)
        if not self._asks(annotations):
            self.metrics.created("nothing", time.perf_counter() - started)
            return None
        line: Dict[str, Any] = {
            "time": report.now(),
            "container": container.id,
            "name": container.name,
            "pod": pod.name,
            "namespace": pod.namespace,
        }

        def answered(make: Callable[[], Any]) -> Any:
            try:
                made = make()
            except ChandlerError as error:
                self.outdated = self.outdated or isinstance(error, ChangedError)
                seconds = time.perf_counter() - started
                rule = self._rule(pod, container, annotations) if isinstance(error, PolicyError) else ""
                self.metrics.created("refused", seconds, type(error).__name__, rule)
                self.log({**line, "level": "error", "refused": str(error), "ms": _ms(seconds)})
                raise
            if isinstance(made, Later):
                return made
            seconds = time.perf_counter() - started
            self.metrics.created("nothing" if made is None else "granted", seconds)
            if made is not None:
                self.log({**line, "ms": _ms(seconds)})
            return made

        made = answered(lambda: self._grant(pod, container, annotations, line, awaited))
        if isinstance(made, Later):
            answer = made.answer
            made.answer = lambda: answered(answer)
        return made

    def _rule(self, pod: Any, container: Any, annotations: Dict[str, str]) -> str:
        """Which part of the policy is for a container."""
        config = self.inventory.config
        if config["policy.rule"]:
            from shim.keys import host_facts
            from shim.policy import rules

            config = rules.applied(
                config,
                annotations,
                {**self._known(pod, container), "container": container.name, "user": host_facts.caller()},
            )
        return words.by(config)

    def _known(self, pod: Any, container: Any) -> Dict[str, Any]:
        """What the runtime says of a pod, for the policy's rules; a handler must not wait for a provider of secrets."""
        caller = Caller(
            _ENGINES.get(self.runtime.name, engines.OTHER),
            f"it names itself {self.runtime.name or 'nothing'} through NRI",
        )
        caller.restores = any(key.startswith(_RESTORED) for key in container.annotations)
        return {
            "caller": caller,
            "namespace": pod.namespace,
            "pod": pod.name,
            "handler": pod.runtime_handler,
            "seconds": _PATIENCE,
        }

    def _asks(self, annotations: Iterable[str]) -> bool:
        config = self.inventory.config
        prefix: str = config["annotation-prefix"]
        return any(key.startswith(prefix) for key in annotations) or (
            config["cdi.annotations"] and any(key.startswith(_CDI) for key in annotations)
        )

    def _grant(
        self, pod: Any, container: Any, annotations: Dict[str, str], line: Dict[str, Any], awaited: Callable[[], bool]
    ) -> Any:
        if not awaited():
            raise Unawaited(self.runtime)
        now = time.monotonic()
        hold = self.holds.claim(pod.id, container.name, now)
        wanted = as_config.build(container, annotations)
        lease = None
        if self.inventory.config["gpu.allocator"] == "leases":
            lease = {**ledger.nri_lease(container.id, pod.id, int(time.time())), "container": container.name}
        try:  # secrets and the like, before the ledger is locked
            asked = engine.want(
                wanted, self.inventory, container.name, known=self._known(pod, container), leased=lease is not None
            )
        except BundleError as error:
            raise adjust.Unsupported(error.what, adjust.WAY_OUT) from None
        if asked is None:
            return None
        self._trusted_state_dir()
        granting = engine.Granting(
            self._state_dir,
            self._records,
            "",
            container.id,
            self.place.rootless,
            self._ledger if lease is not None else None,
            lease,
        )
        plan = self._reserved(granting, asked, hold.token if hold is not None else "")
        if not plan.keys:
            lease = None
        try:
            if lease is not None and self.holds.late(plan.keys, now):
                raise Starting(self._words(plan))
            if reader.in_user_namespace(wanted):
                self._check_bound(plan)
            if plan.sharing is not None:
                plan.add(self._share(plan.sharing, container.HasField("user")))
            if self.hooks:  # else StopContainer and RemoveContainer end the lease, and Synchronize what was missed
                granting.release_with_container()
            result = adjust.adjustment(plan, self.runtime, wanted)
            if not self.hooks and result.HasField("hooks"):
                raise adjust.Unsupported(
                    f"{plan.request.source}: what is asked for needs an OCI hook, and {self.runtime} lets no NRI plugin "
                    "add one (reject_oci_hook_adjustment of its default validator)",
                    adjust.WAY_OUT,
                )
        except BaseException:
            granting.undo()
            raise
        if hold is not None:
            self.holds.drop(pod.id, container.name)
            if hold.lease is not None:
                self._end(hold.lease)
        task = self._task(plan, lease)
        if task is None:
            return self._recorded(pod, container, granting, plan, result, line, awaited)
        return self._later(task, now, pod, container, granting, plan, result, lease, line, awaited)

    def _later(
        self,
        task: Dict[str, Any],
        now: float,
        pod: Any,
        container: Any,
        granting: engine.Granting,
        plan: engine.Plan,
        result: Any,
        lease: Optional[Lease],
        line: Dict[str, Any],
        awaited: Callable[[], bool],
    ) -> Later:
        """The answer to a create that something slow has to come before."""
        from shim.nri.work import Work

        work = Work(task)
        words = self._words(plan)

        def abandon() -> None:
            self.holds.add(pod.id, container.name, Hold(lease, work, words))

        def answer() -> Any:
            if not work.done:
                abandon()
                raise Starting(words)
            if work.error is not None:
                self._end_lease(container.id)
                raise work.error
            if not awaited():
                abandon()
                raise Unawaited(self.runtime)
            return self._recorded(pod, container, granting, plan, result, line, awaited)

        return Later(work, self.holds.deadline(work, plan.keys, now, self.patience), answer, abandon)

    def _task(self, plan: engine.Plan, lease: Optional[Lease]) -> Optional[Dict[str, Any]]:
        """What is slow and has to come before this plan's container; mostly nothing."""
        keys = plan.keys if lease is not None else []
        if plan.sharing is None:
            if not keys or not os.path.exists(self._state_dir + "/shared"):
                return None
            from shim.sharing import pages

            if not any(leases.clash(page.get("key", ""), key) for page in pages.every(self._state_dir) for key in keys):
                return None
        from shim.nri import work

        return work.task(self._state_dir, self.place.rootless, keys, plan.sharing)

    def _check_bound(self, plan: engine.Plan) -> None:
        """In a user namespace a device is a mount of the host's node, for which NRI knows no rule.  Raises
        ChandlerError."""
        from shim.oci import userns_devices

        for kind, path, mount, origin in userns_devices.split(plan.edits)[1].items:
            if kind == MOUNT:
                raise adjust.Unsupported(
                    f"{origin}: {self.runtime} cannot be told through NRI that {path}, in a user namespace, is the "
                    f"host's {mount['source']}",
                    adjust.WAY_OUT,
                )

    def _share(self, share: Sharing, user_told: bool) -> Edits:
        """What a container's share of its GPUs needs, with a hook that keeps it true without us: a daemon may end
        while no plugin runs."""
        from shim.sharing import setup

        ready = setup.hook(share, self._state_dir)
        if not user_told:
            # The runtime does not say who the container's user is, and an MPS daemon serves one alone: the hook, which
            # can see it, holds the container to what we took for granted.
            ready = Edits(
                [
                    (kind, stage, {**hook, "args": [*hook["args"], str(share.uid)]}, origin)
                    for kind, stage, hook, origin in ready.items
                ]
            )
        return merge(setup.edits(share, self._state_dir), ready)

    def _words(self, plan: engine.Plan) -> str:
        """What a container waits for."""
        names = ", ".join(plan.names)
        share = plan.sharing
        if share is None:
            what = f"{names} is being put back after it was shared"
        elif share.mode == MPS:
            known = [uuid for _, uuid in share.devices if uuid]
            what = f"MPS for {known[0] if known else names} is starting"
        else:
            what = f"time slices of {names} are being set"
        return f"{plan.request.source}: {what}, retry"

    def _recorded(
        self,
        pod: Any,
        container: Any,
        granting: engine.Granting,
        plan: engine.Plan,
        result: Any,
        line: Dict[str, Any],
        awaited: Callable[[], bool],
    ) -> Any:
        """Records the grant, and gives the adjustment.  Raises HostError, TrustError or Unawaited; the lease then has
        ended."""
        try:
            granting.record(
                {
                    "owner": "nri",
                    "runtime": str(self.runtime),
                    "pod": pod.id,
                    "namespace": pod.namespace,
                    "name": container.name,
                    "nodes": adjust.nodes(plan),
                    "mark": [f"{self.inventory.config['annotation-prefix']}{MARK}", ",".join(plan.names)],
                }
            )
            if not awaited():
                raise Unawaited(self.runtime)
        except BaseException:
            granting.undo()
            raise
        self.held[container.id] = Held(
            {device.name for device in result.CDI_devices},
            {device.path for device in result.linux.devices},
            plan.keys,
            time.monotonic(),
        )
        self.metrics.grants = len(self.held)
        counts: Dict[str, int] = {}
        for edit in plan.edits.items:
            counts[edit[0]] = counts.get(edit[0], 0) + 1
        line.update(source=plan.request.source, devices=plan.names, edits=counts, runtime=str(self.runtime))
        if plan.sharing is not None:
            line["sharing"] = plan.sharing.marks
        return result

    def _reserved(self, granting: engine.Granting, asked: engine.Wanted, spared: str) -> engine.Plan:
        """The plan, its devices held by nobody else where leases are kept.  Raises ChandlerError."""
        try:
            return granting.reserve(asked, spared=spared, patient=False)
        except LeaseError:
            # Runtimes are asked off the handler; when a lease turns out to be nobody's, the kubelet's next try finds
            # it.
            if self._collecting is None or not self._collecting.is_alive():
                book = ledger.Ledger(self._state_dir, self.place.rootless)  # there it may wait
                self._collecting = threading.Thread(target=self._collect, args=(book,), daemon=True)
                self._collecting.start()
            raise

    def _collect(self, book: ledger.Ledger) -> None:
        try:
            book.take_back()
        except ChandlerError as error:
            self._complain(error)

    def validate(self, container: Any, adjustment: Any) -> str:
        """Why the adjustment that all plugins together made must not be used; empty when it may."""
        held = self.held.get(container.id, _NOTHING)
        missing = held.names - {device.name for device in adjustment.CDI_devices} | held.paths - {
            device.path for device in adjustment.linux.devices
        }
        if missing:
            return f"another NRI plugin took away {', '.join(sorted(missing))}, which Chandler had granted"
        if not adjustment.CDI_devices and not adjustment.linux.devices and not adjustment.linux.resources.devices:
            return ""
        if self._numbers is None or self._numbers[0] is not self.inventory:
            self._numbers = (
                self.inventory,
                choose.numbers(self.inventory.config["policy.kinds"], self.inventory, device_nodes.look_at_gpu),
            )
        added = list(beside.added(adjustment, held.names, held.keys, *self._numbers))
        if not added:
            return ""
        if self.inventory.config["gpu.allocator"] == "leases":
            try:
                found = [
                    lease for lease in self._ledger.read() if lease["owner"] != "nri" or lease["id"] != container.id
                ]
            except ChandlerError as error:
                return f"another NRI plugin adds {added[0][0]}, and nobody can say whether it is held: {error}"
            for what, key in added:
                holder = leases.holder([key], found)
                if holder is not None:
                    return f"another NRI plugin adds {what}, but {leases.words(holder)}"
        names = ", ".join(what for what, _ in added)
        if held.keys:
            return f"another NRI plugin adds {names} beside the GPUs that Chandler granted: a container's GPUs come from one of them"
        # Not our business: whoever runs that plugin has given this GPU away.  No lease is kept for it.
        self.log(
            {
                "time": report.now(),
                "level": "warning",
                "container": container.id,
                "name": container.name,
                "beside": f"another NRI plugin adds {names}, of which Chandler keeps no lease",
            }
        )
        return ""

    def stop(self, container_id: str, pid: int) -> None:
        """The container's processes have ended, or its create has failed; one that still runs keeps its devices."""
        if not evict.runs(container_id, pid) and not self.holds.has(container_id):
            self._end_lease(container_id)

    def start(self, pod: Any, container: Any) -> None:
        """The container's processes are about to run.  Raises PolicyError to refuse one that asked and was not
        served: its create was not answered, and nobody could be told of it then."""
        self._unlisted.pop(container.id, None)
        if not self._asks(as_config.merged_annotations(pod, container)):
            return
        served = False
        if self._has_record(container.id):
            served = self._reached(records.read(self._records, "", container.id), container)
            if not served:
                self.undo(container.id, _NEVER_REACHED)
        reason = "" if served or container.id in self._wrapped() else self._unserved(pod, container)
        if not reason:
            return
        refused = bool(self.inventory.config["policy.evict-unadjusted"])
        self._report(pod, container, reason, refused)
        if refused:
            raise PolicyError(reason, "delete this container, so that it is created anew: evict-unadjusted is set")

    def remove(self, container_id: str) -> None:
        """The container is gone."""
        self._unlisted.pop(container_id, None)
        self._reported.discard(container_id)
        if container_id in self.held or self._has_record(container_id):
            self._release(container_id)

    def undo(self, container_id: str, why: str) -> None:
        """Takes back a grant that never reached its container."""
        self._release(container_id)
        self.log({"time": report.now(), "level": "warning", "container": container_id, "undone": why})

    def end_pod(self, pod: str) -> None:
        """A pod ends: what is held for its containers has lost its purpose."""
        self.holds.end_pod(pod)

    def _release(self, container_id: str) -> None:
        """Gives back all that a container held."""
        self.held.pop(container_id, None)
        self._unlisted.pop(container_id, None)
        self._end_lease(container_id)
        grants.remove(self._records, "", container_id)
        self.metrics.grants = len(self.held)

    def _end_lease(self, container_id: str) -> None:
        """Ends a container's lease, if it has one."""
        try:
            lease = leases.of_container(self._ledger.read(), "nri", "", container_id)
        except ChandlerError as error:
            self._complain(error, container_id)
        else:
            if lease is not None:
                self._end(lease)

    def _end(self, lease: Lease) -> None:
        """The one place where leases end.  Never raises: an event has nobody to tell."""
        try:
            self._ledger.release({lease["token"]})
        except ChandlerError as error:
            self._complain(error, lease["id"])

    def _complain(self, error: ChandlerError, container_id: str = "") -> None:
        self.log(
            {
                "time": report.now(),
                "level": "error",
                **({"container": container_id} if container_id else {}),
                "error": str(error),
            }
        )

    # --- what goes on beside -----------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Looks after work that goes on in other processes: when one of them has ended, and at `due`."""
        self.holds.tick(now)
        for container_id in [each for each, until in self._unlisted.items() if now >= until]:
            self.undo(container_id, "the runtime has no such container")
        if self._putting_back is not None and self._putting_back.done:
            if self._putting_back.error is not None:
                self._complain(self._putting_back.error)  # the pages stay, and whoever takes the devices tries again
            self._putting_back = None
        if self._leftover and self._putting_back is None:
            keys = sorted(self._leftover)
            self._leftover.clear()
            if os.path.exists(self._state_dir + "/shared"):
                from shim.nri import work

                self._putting_back = work.Work(work.task(self._state_dir, self.place.rootless, keys))

    def due(self) -> List[float]:
        """When `tick` is to be called at the latest (time.monotonic)."""
        return [
            *self.holds.due(),
            *self._unlisted.values(),
            *([self._putting_back.until] if self._putting_back is not None else []),
        ]

    def _has_record(self, container_id: str) -> bool:
        return os.path.exists(grants.record_path(self._records, "", container_id))

    def measured(self) -> str:
        """The metrics, as they are now."""
        self.metrics.holds = len(self.holds)
        try:
            self.metrics.leases = sum(lease["owner"] == "nri" for lease in self._ledger.read())
        except ChandlerError:
            pass  # the number before stays
        return self.metrics.text()

    # --- all containers ---------------------------------------------------------------------------------------

    def configure(self, runtime: Runtime, request_timeout: float = 0.0) -> None:
        """Remembers the runtime that has just connected, which may say how many seconds it waits for an answer."""
        self.runtime = runtime
        self.patience = min(PATIENCE, request_timeout * 0.75) if request_timeout > 0 else PATIENCE
        try:
            self.hooks = not self._rejects_hooks()
        except ChandlerError as error:
            self.hooks = True
            self._complain(error)

    def synchronize(self, pods: Dict[str, Any], containers: List[Any]) -> None:
        """Compares grants with what runs.

        Grants of containers that are gone are given back, and those of containers that do not have what was granted:
        the answer came too late.  Containers that asked and were not served, because they were created while no plugin
        was there or while it was held up, are reported, and evicted where the policy says so.
        """
        recorded = self._sweep({container.id: container for container in containers})
        self._reported &= {container.id for container in containers}
        self._sweep_leases({container.id for container in containers if container.state in messages.LIVE_STATES})
        others = self._wrapped()
        for container in containers:
            if container.id in recorded or container.id in others or container.state not in messages.LIVE_STATES:
                continue
            pod = pods.get(container.pod_sandbox_id)
            reason = self._unserved(pod, container)
            if reason:
                evicted, error = False, ""
                if self.inventory.config["policy.evict-unadjusted"]:
                    try:
                        self.evict(container.id, container.pid)
                        evicted = True
                    except ChandlerError as problem:
                        error = str(problem)
                self._report(pod, container, reason, evicted, error)

    def _report(self, pod: Any, container: Any, reason: str, evicted: bool, error: str = "") -> None:
        """Names an unserved container: once, and again when it is ended."""
        if container.id not in self._reported:
            self._reported.add(container.id)
            self.metrics.unadjusted += 1
        elif not evicted:
            return
        self.log(
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

    def _unserved(self, pod: Any, container: Any) -> str:
        annotations = as_config.merged_annotations(pod, container) if pod else dict(container.annotations)
        if not self._asks(annotations):
            return ""
        # Our own mark has come back to us with the container's annotations; here it tells nothing either way.
        annotations.pop(f"{self.inventory.config['annotation-prefix']}{MARK}", None)
        held: Optional[List[Lease]] = [] if self.inventory.config["gpu.allocator"] == "leases" else None
        try:
            plan = engine.plan(
                as_config.build(container, annotations),
                self.inventory,
                container.name,
                held,
                known=self._known(pod, container) if pod else None,
            )
        except ChandlerError as error:
            return f"it runs without what it asked for, which would be refused: {error}"
        return "it runs without what it asked for: it was created while chandler-nri did not answer" if plan else ""

    def _reached(self, record: Optional[Dict[str, Any]], container: Any) -> bool:
        """Whether a grant's answer reached its container: the runtime then tells of it with our mark and with the
        devices.

        The mark alone proves nothing, since a pod can carry it that we never saw; nor does the record, which is written
        before the answer leaves.  Of a record that cannot be read (None), the mark is all that there is to see.
        """
        try:
            assert record is not None
            key, value = record.get("mark", ("", ""))  # releases before this key had none
            present = {(device.path, device.major, device.minor) for device in container.linux.devices}
            return (not key or container.annotations.get(key) == value) and all(
                (path, major, minor) in present for path, _, major, minor in record["nodes"]
            )
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
            return f"{self.inventory.config['annotation-prefix']}{MARK}" in container.annotations

    def _sweep(self, listed: Dict[str, Any]) -> Set[str]:
        """The containers that have what their record says; records of others are removed."""
        recorded: Set[str] = set()
        for path, record in records.every(self._records):
            try:
                age_of_file = time.time() - os.stat(path).st_mtime
            except OSError:
                continue
            if record is None:  # damaged
                container_id = os.path.basename(path).partition("-")[2][: -len(".json")]
                if container_id in listed and self._reached(None, listed[container_id]):
                    recorded.add(container_id)
                continue
            container_id = record["id"]
            container = listed.get(container_id)
            if container is not None and not self._reached(record, container):
                self.undo(container_id, _NEVER_REACHED)
                continue
            held = self.held.setdefault(container_id, Held(set(), set(), list(record.get("physical", [])), 0.0))
            recorded.add(container_id)
            if container is not None:
                self._unlisted.pop(container_id, None)
                continue
            # By our own clock where we can: the time of day may have been set since.
            age = time.monotonic() - held.since if held.since else age_of_file
            if age < _MINIMUM_AGE:
                self._unlisted[container_id] = time.monotonic() + _MINIMUM_AGE - max(age, 0.0)
            else:
                recorded.discard(container_id)
                self._release(container_id)
        self.metrics.grants = len(self.held)
        return recorded

    def _sweep_leases(self, live: Set[str]) -> None:
        """Ends the leases of containers that ended while no plugin was told.

        A lease without a record is what a create has left that was refused until a retry, by a plugin that is gone:
        it is held on.  What was begun for a share that has no lease at all is put back.
        """
        try:
            found = [lease for lease in self._ledger.read() if lease["owner"] == "nri" and lease["id"] not in live]
        except ChandlerError:
            return  # whoever wants a lease is told
        for lease in found:
            age = time.time() - lease["since"]
            if self.holds.has(lease["id"]):
                continue
            if age >= _MINIMUM_AGE:
                self._end(lease)
            elif not self._has_record(lease["id"]):
                self.holds.add(
                    lease["pod"],
                    str(lease.get("container")),
                    Hold(lease, None, "", time.monotonic() + PATIENCE_FOR_RETRY - max(age, 0.0)),
                )
        self._left(None)

    def _wrapped(self) -> Set[str]:
        """The containers that the runtime wrapper has equipped."""
        try:
            return {name.partition("-")[2][: -len(".json")] for name in os.listdir(grants.directory(self._state_dir))}
        except OSError:
            return set()


class _Ledger(ledger.Ledger):
    """The ledger, for a thread that must not wait: what was set up for sharing is not ended with its last lease but
    told to `leftover`."""

    __slots__ = ("_left",)

    def __init__(self, state_dir: str, private: bool, leftover: Callable[[Optional[List[str]]], None]) -> None:
        super().__init__(state_dir, private)
        self._left = leftover

    def settle(self, keys: Optional[List[str]]) -> None:
        """Leaves it to others."""
        self._left(keys)


def _ms(seconds: float) -> jsontext.Number:
    return jsontext.Number(f"{seconds * 1000:.3f}")
