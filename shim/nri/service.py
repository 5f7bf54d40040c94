"""The plugin's work: turns a container's request into an adjustment, keeps the grant, and logs one line for each.

No handler waits.  The inventory is in memory, and a handler only looks at device nodes and reads or writes small files.
NRI creates the container unadjusted when a handler takes more than two seconds, and containerd asks for one container
at a time, so a slow handler delays every other container as well.  Slow work (sharing a GPU, or putting one back after
it was shared) runs in another process (shim.nri.work).  A create waits a moment for that process; shim.nri.holds says
how long, and what happens afterwards.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Callable

from shim import engine, jsontext, report
from shim.edits import MOUNT, Edits, merge
from shim.errors import BundleError, ChandlerError, ChangedError, LeaseError, PolicyError
from shim.gpu import choose
from shim.host import device_nodes
from shim.node import cdi_check
from shim.nri import adjust, as_config, evict, other_plugins
from shim.nri.adjust import Runtime
from shim.nri.book import NOTHING, GrantBook, Granted
from shim.nri.holds import PATIENCE, Hold, PendingCreate, Starting
from shim.nri.sweeps import Sweeps
from shim.oci import reader
from shim.policy import engines, words
from shim.policy.caller import Caller
from shim.request.parse import MARK
from shim.sharing.terms import MPS
from shim.state import leases, ledger

if TYPE_CHECKING:
    from shim.node.inventory import Account, Inventory
    from shim.nri.work import Task
    from shim.policy.caller import CallFacts
    from shim.shapes import Document
    from shim.sharing.terms import Sharing
    from shim.state.leases import Lease

_PATIENCE = 1.0  # seconds that a provider of secrets may take during a create
_CDI = "cdi.k8s.io"  # how the keys of CDI annotations begin (CDI SPEC.md)
# How the annotations begin that containerd and CRI-O put on a container that they restore from a checkpoint.  The other
# annotations of such a container come from the checkpoint.
_RESTORED = (
    "restored",
    "checkpointedAt",
    "checkpointImage",
    "org.criu.checkpoint.",
    "io.kubernetes.cri-o.annotations.checkpoint",
)
_ENGINES = {"containerd": "containerd", "cri-o": "crio"}  # runtime's name in NRI: engine's name in the policy


class RuntimeGaveUp(ChandlerError):
    """The runtime has stopped waiting for a create, so no answer can reach the container any more."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(
            f"{runtime} no longer waits for the answer to this create, so nothing is granted",
            "see why chandler-nri was held up: a stopped process, swapping, a slow disk",
        )


class Service(GrantBook):
    """The handlers of all NRI events.  One object lives as long as the process, across all connections to the runtime.

    `rejects_hooks` tells whether the runtime that has just connected refuses containers for which a plugin adds OCI
    hooks.  It may raise ChandlerError.
    """

    def __init__(
        self,
        account: Account,
        inventory: Inventory,
        log: Callable[[Document], None],
        rejects_hooks: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(account, inventory, log)
        self.sweeps = Sweeps(self, self._unserved)
        self._rejects_hooks = rejects_hooks
        self.outdated = False  # whether the inventory has to be compiled anew
        self.hooks = True  # whether containers may be given OCI hooks
        self._started: set[str] = set()  # the containers with a request that have been started
        self.runtime = Runtime("", "")
        self.patience = PATIENCE
        self._lease_cleanup: threading.Thread | None = None  # ends the leases of containers that are gone
        self._numbers: tuple[Inventory, dict[str, str]] | None = None  # an inventory, and its GPUs' device numbers

    # --- creating a container ---------------------------------------------------------------------------------

    def create(self, pod: Any, container: Any, awaited: Callable[[], bool] = lambda: True) -> Any:
        """The adjustment for a new container; None when it asks for nothing.

        Gives a PendingCreate when slow work has to come first.

        `awaited` tells whether the runtime still waits for the answer.  Raises ChandlerError to refuse the container.
        """
        started = time.perf_counter()
        annotations = as_config.merged_annotations(pod, container)
        if not self._has_request(annotations):
            self.metrics.created("nothing", time.perf_counter() - started)
            return None
        line: Document = {
            "time": report.now(),
            "container": container.id,
            "name": container.name,
            "pod": pod.name,
            "namespace": pod.namespace,
        }

        def answered(grant: Callable[[], Any]) -> Any:
            """What `grant` gives, counted and logged.  For a PendingCreate that is done with its own answer, later."""
            try:
                result = grant()
            except ChandlerError as error:
                self.outdated = (
                    self.outdated
                    or isinstance(error, ChangedError)
                    or isinstance(error, LeaseError)
                    and cdi_check.moved(self.inventory)
                )
                seconds = time.perf_counter() - started
                rule = self._rule(pod, container, annotations) if isinstance(error, PolicyError) else ""
                self.metrics.created("refused", seconds, type(error).__name__, rule)
                self.log({**line, "level": "error", "refused": str(error), "ms": _ms(seconds)})
                raise
            if isinstance(result, PendingCreate):
                return result
            seconds = time.perf_counter() - started
            self.metrics.created("nothing" if result is None else "granted", seconds)
            if result is not None:
                self.log({**line, "ms": _ms(seconds)})
            return result

        result = answered(lambda: self._grant(pod, container, annotations, line, awaited))
        if isinstance(result, PendingCreate):
            answer = result.answer
            result.answer = lambda: answered(answer)
        return result

    def _rule(self, pod: Any, container: Any, annotations: dict[str, str]) -> str:
        """The name of the policy's part that applies to a container, as in words.source_of_policy, for the metrics."""
        config = self.inventory.config
        if config["policy.rule"]:
            from shim.keys import host_facts
            from shim.policy import rules

            config = rules.applied(
                config,
                annotations,
                {**self._pod_facts(pod, container), "container": container.name, "user": host_facts.caller()},
            )
        return words.source_of_policy(config)

    def _pod_facts(self, pod: Any, container: Any) -> CallFacts:
        """What the runtime says of a pod, for the policy's rules, and the time limit of a provider of secrets, since a
        handler must not wait long."""
        caller = Caller(
            _ENGINES.get(self.runtime.name, engines.OTHER),
            f"it names itself {self.runtime.name or 'nothing'} through NRI",
        )
        caller.restores = any(key.startswith(_RESTORED) for key in container.annotations)
        return {
            "caller": caller,
            "namespace": pod.namespace,
            "pod": pod.name,
            "sandbox": pod.id,
            "called": f"{pod.namespace}/{pod.name}/{container.name}",
            "handler": pod.runtime_handler,
            "seconds": _PATIENCE,
        }

    def _has_request(self, annotations: Iterable[str]) -> bool:
        """Whether any of these annotation keys is a request to Chandler, or a CDI annotation that it serves."""
        config = self.inventory.config
        prefix: str = config["annotation-prefix"]
        return any(key.startswith(prefix) for key in annotations) or (
            config["cdi.annotations"] and any(key.startswith(_CDI) for key in annotations)
        )

    def _grant(
        self, pod: Any, container: Any, annotations: dict[str, str], line: Document, awaited: Callable[[], bool]
    ) -> Any:
        """The answer of `create` for a container with a request; adds to the log line `line`."""
        if not awaited():
            raise RuntimeGaveUp(self.runtime)
        now = time.monotonic()
        hold = self.holds.claim(pod.id, container.name, now)
        document = as_config.build(container, annotations)
        lease: Lease | None = None
        if self.inventory.config["gpu.allocator"] == "leases":
            lease = {**ledger.nri_lease(container.id, pod.id, int(time.time())), "container": container.name}
        # Secrets and the like are fetched here: no look-up may take place while the ledger is locked.
        try:
            checked = engine.check_request(
                document,
                self.inventory,
                container.name,
                call_facts=self._pod_facts(pod, container),
                leased=lease is not None,
            )
        except BundleError as error:
            raise adjust.Unsupported(error.what, adjust.WAY_OUT) from None
        if checked is None:
            return None
        self.trusted_state_dir()  # raises where others may write to the state directory
        granting = engine.Granting(
            self.state_dir,
            self.records_directory,
            "",
            container.id,
            self.account.rootless,
            self.ledger if lease is not None else None,
            lease,
        )
        plan = self._reserve(granting, checked, hold.token if hold is not None else "")
        if not plan.keys:
            lease = None
        try:
            if lease is not None and self.holds.late(plan.keys, now):
                raise Starting(self._waits_for(plan))
            if reader.in_user_namespace(document):
                self._check_bind_mounts(plan)
            if plan.sharing is not None:
                plan.add(self._sharing_edits(plan.sharing, container.HasField("user")))
            # Without the hook StopContainer and RemoveContainer end the lease, and Synchronize ends those that were
            # missed.
            if self.hooks:
                granting.release_with_container()
            result = adjust.adjustment(plan, self.runtime, document)
            if not self.hooks and result.HasField("hooks"):
                raise adjust.Unsupported(
                    f"{plan.request.source}: what is asked for needs an OCI hook, and {self.runtime} lets no NRI "
                    "plugin add one (reject_oci_hook_adjustment of its default validator)",
                    adjust.WAY_OUT,
                )
        except BaseException:
            granting.undo()
            raise
        if hold is not None:
            self.holds.drop(pod.id, container.name)
            if hold.lease is not None:
                self.end(hold.lease)
        task = self._slow_work(plan, lease)
        if task is None:
            return self._record(pod, container, granting, plan, result, line, awaited)
        return self._start_work(task, now, pod, container, granting, plan, result, lease, line, awaited)

    def _start_work(
        self,
        task: Task,
        now: float,
        pod: Any,
        container: Any,
        granting: engine.Granting,
        plan: engine.Plan,
        result: Any,
        lease: Lease | None,
        line: Document,
        awaited: Callable[[], bool],
    ) -> PendingCreate:
        """Starts the slow work of `task`, and gives the PendingCreate that answers the create when the work has ended.

        When the answer cannot be given in time, the lease and the work become a hold for the kubelet's retry.
        """
        from shim.nri.work import Work

        work = Work(task)
        words = self._waits_for(plan)

        def abandon() -> None:
            self.holds.add(pod.id, container.name, Hold(lease, work, words))

        def answer() -> Any:
            if not work.done:
                abandon()
                raise Starting(words)
            if work.error is not None:
                self.end_lease(container.id)
                raise work.error
            if not awaited():
                abandon()
                raise RuntimeGaveUp(self.runtime)
            return self._record(pod, container, granting, plan, result, line, awaited)

        return PendingCreate(work, self.holds.deadline(work, plan.keys, now, self.patience), answer, abandon)

    def _slow_work(self, plan: engine.Plan, lease: Lease | None) -> Task | None:
        """The task (shim.nri.work) that must end before this plan's container starts; None for most containers.

        Sharing has to be set up, and a GPU that is now to be used alone has to be put back if it was shared.
        """
        keys = plan.keys if lease is not None else []
        if plan.sharing is None:
            if not keys or not os.path.exists(self.state_dir + "/shared"):
                return None
            from shim.sharing import pages

            if not any(leases.clash(page.get("key", ""), key) for page in pages.every(self.state_dir) for key in keys):
                return None
        from shim.nri import work

        return work.task(self.state_dir, self.account.rootless, keys, plan.sharing)

    def _check_bind_mounts(self, plan: engine.Plan) -> None:
        """Checks the devices of a container in a user namespace.  Raises ChandlerError.

        There the runtime bind-mounts the host's node of the same path.  A node that has another path on the host would
        need a mount and a device rule, and an adjustment has no field for the rule.
        """
        from shim.oci import userns_devices

        for kind, path, mount, origin in userns_devices.split(plan.edits)[1].items:
            if kind == MOUNT:
                raise adjust.Unsupported(
                    f"{origin}: {self.runtime} cannot be told through NRI that {path}, in a user namespace, is the "
                    f"host's {mount['source']}",
                    adjust.WAY_OUT,
                )

    def _sharing_edits(self, share: Sharing, user_told: bool) -> Edits:
        """The edits that let a container share its GPUs, with a hook that checks the sharing again when the container
        starts: the MPS daemon may have ended while no plugin was running.

        `user_told`: whether the runtime has said which user the container runs as.
        """
        from shim.sharing import setup

        hook_edits = setup.hook(share, self.state_dir)
        if not user_told:
            # An MPS daemon serves only one user, and here we have assumed which.  The hook can see the container's
            # user, so it gets the assumed uid as its last argument and refuses any other.
            hook_edits = Edits(
                [
                    (kind, stage, {**hook, "args": [*hook["args"], str(share.uid)]}, origin)
                    for kind, stage, hook, origin in hook_edits.items
                ]
            )
        return merge(setup.edits(share, self.state_dir), hook_edits)

    def _waits_for(self, plan: engine.Plan) -> str:
        """What a container waits for, as the text of its refusal."""
        names = ", ".join(plan.names)
        share = plan.sharing
        if share is None:
            what = f"{names} is being put back after it was shared"
        elif share.mode == MPS:
            uuids = [uuid for _, uuid in share.devices if uuid]
            what = f"MPS for {uuids[0] if uuids else names} is starting"
        else:
            what = f"time slices of {names} are being set"
        return f"{plan.request.source}: {what}, retry"

    def _record(
        self,
        pod: Any,
        container: Any,
        granting: engine.Granting,
        plan: engine.Plan,
        result: Any,
        line: Document,
        awaited: Callable[[], bool],
    ) -> Any:
        """Writes the grant record, and gives the adjustment `result`; adds to the log line `line`.

        Raises HostError, TrustError or RuntimeGaveUp, after the lease and the record were taken back.
        """
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
                raise RuntimeGaveUp(self.runtime)
        except BaseException:
            granting.undo()
            raise
        self.granted[container.id] = Granted(
            {device.name for device in result.CDI_devices},
            {device.path for device in result.linux.devices},
            plan.keys,
            time.monotonic(),
        )
        self.metrics.grants = len(self.granted)
        counts: dict[str, int] = {}
        for edit in plan.edits.items:
            counts[edit[0]] = counts.get(edit[0], 0) + 1
        line.update(source=plan.request.source, devices=plan.names, edits=counts, runtime=str(self.runtime))
        if plan.sharing is not None:
            line["sharing"] = plan.sharing.marks
        return result

    def _reserve(self, granting: engine.Granting, checked: engine.CheckedRequest, spared: str) -> engine.Plan:
        """The plan, with its devices leased where the node keeps leases.

        `spared`: the token of a lease that does not count, '' for none.  Raises ChandlerError.
        """
        try:
            return granting.reserve(checked, spared=spared, patient=False)
        except LeaseError:
            # Asking the runtimes which leases are stale is too slow for a handler, so a thread does it.  The kubelet's
            # retry then finds the devices free.
            if self._lease_cleanup is None or not self._lease_cleanup.is_alive():
                # Not self.ledger, which never waits: this thread may.
                patient_ledger = ledger.Ledger(self.state_dir, self.account.rootless)
                self._lease_cleanup = threading.Thread(
                    target=self._end_stale_leases, args=(patient_ledger,), daemon=True
                )
                self._lease_cleanup.start()
            raise

    def _end_stale_leases(self, patient_ledger: ledger.Ledger) -> None:
        try:
            patient_ledger.end_stale_leases()
        except ChandlerError as error:
            self.complain(error)

    # --- the other events of a container ---------------------------------------------------------------------

    def validate(self, container: Any, adjustment: Any) -> str:
        """The reason to reject the adjustment that all plugins together have made; empty to accept it."""
        grant = self.granted.get(container.id, NOTHING)
        missing = grant.names - {device.name for device in adjustment.CDI_devices} | grant.paths - {
            device.path for device in adjustment.linux.devices
        }
        if missing:
            return f"another NRI plugin took away {', '.join(sorted(missing))}, which Chandler had granted"
        if not adjustment.CDI_devices and not adjustment.linux.devices and not adjustment.linux.resources.devices:
            return ""
        if self._numbers is None or self._numbers[0] is not self.inventory:
            self._numbers = (
                self.inventory,
                choose.gpu_names_by_number(
                    self.inventory.config["policy.kinds"], self.inventory, device_nodes.read_gpu_node
                ),
            )
        added = list(other_plugins.added(adjustment, grant.names, grant.keys, *self._numbers))
        if not added:
            return ""
        if self.inventory.config["gpu.allocator"] == "leases":
            try:
                others = [
                    lease for lease in self.ledger.read() if lease["owner"] != "nri" or lease["id"] != container.id
                ]
            except ChandlerError as error:
                return (
                    f"another NRI plugin adds {added[0][0]}, and whether a container holds it cannot be read: {error}"
                )
            for what, key in added:
                holder = leases.holder([key], others)
                if holder is not None:
                    return f"another NRI plugin adds {what}, but {leases.describe(holder)}"
        names = ", ".join(what for what, _ in added)
        if grant.keys:
            return (
                f"another NRI plugin adds {names} beside the GPUs that Chandler granted: a container's GPUs come from "
                "one of them"
            )
        # Whoever runs that plugin has decided to give this GPU away, so the container may have it.  Chandler keeps no
        # lease for it.
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
        """StopContainer: the container's processes have ended, or its create has failed.  Ends its lease.

        A container whose process `pid` still runs keeps its devices, and so does one whose lease is held for a retry.
        """
        if not evict.runs(container_id, pid) and not self.holds.has(container_id):
            self.end_lease(container_id, self._never_started(container_id))

    def _never_started(self, container_id: str) -> bool:
        """Whether we granted a container something, and it ends without having been started: its create failed."""
        return container_id not in self._started and self.granted.get(container_id, NOTHING).since > 0

    def start(self, pod: Any, container: Any) -> None:
        """StartContainer: the container's processes are about to run.

        Raises PolicyError to refuse a container that asked and was not served.
        """
        self.unlisted.pop(container.id, None)
        if self._has_request(as_config.merged_annotations(pod, container)):
            self._started.add(container.id)
            self.sweeps.start(pod, container)

    def remove(self, container_id: str) -> None:
        """RemoveContainer: the container is gone."""
        self.unlisted.pop(container_id, None)
        self.sweeps.forget(container_id)
        if container_id in self.granted or self.has_record(container_id):
            self.release(container_id, self._never_started(container_id))
        self._started.discard(container_id)

    def end_pod(self, pod: str) -> None:
        """StopPodSandbox: no container of this pod will be tried again, so its holds end, and the lease of the pod."""
        self.holds.end_pod(pod)
        self.end_lease(pod)

    # --- all containers ---------------------------------------------------------------------------------------

    def configure(self, runtime: Runtime, request_timeout: float = 0.0) -> None:
        """Configure: remembers the runtime that has just connected.

        `request_timeout`: how many seconds it waits for an answer, 0 when it does not say.
        """
        self.runtime = runtime
        self.patience = min(PATIENCE, request_timeout * 0.75) if request_timeout > 0 else PATIENCE
        try:
            self.hooks = not self._rejects_hooks()
        except ChandlerError as error:
            self.hooks = True
            self.complain(error)

    def synchronize(self, pods: dict[str, Any], containers: list[Any]) -> None:
        """Synchronize: compares the grants with the runtime's containers.  `pods`: by id."""
        self.sweeps.synchronize(pods, containers)

    def metrics_text(self) -> str:
        """The metrics as they are now, in Prometheus' text format."""
        self.metrics.holds = len(self.holds)
        try:
            self.metrics.leases = sum(
                lease["owner"] == "nri" and not leases.is_of_sandbox(lease) for lease in self.ledger.read()
            )
        except ChandlerError:
            pass  # the metric keeps its last value
        return self.metrics.text()

    def _unserved(self, pod: Any, container: Any) -> str:
        """Why a container without a grant runs without what it asked for; empty when it asked for nothing.

        `pod` is None where the runtime has not told of it.
        """
        annotations = as_config.merged_annotations(pod, container) if pod else dict(container.annotations)
        if not self._has_request(annotations):
            return ""
        # The runtime may list the container with the mark of an earlier adjustment.  It proves nothing, and would be
        # refused as a forged request below.
        annotations.pop(f"{self.inventory.config['annotation-prefix']}{MARK}", None)
        held: list[Lease] | None = [] if self.inventory.config["gpu.allocator"] == "leases" else None
        try:
            plan = engine.plan(
                as_config.build(container, annotations),
                self.inventory,
                container.name,
                held,
                call_facts=self._pod_facts(pod, container) if pod else None,
            )
        except ChandlerError as error:
            return f"it runs without what it asked for, which would be refused: {error}"
        return "it runs without what it asked for: it was created while chandler-nri did not answer" if plan else ""


def _ms(seconds: float) -> jsontext.Number:
    return jsontext.Number(f"{seconds * 1000:.3f}")
