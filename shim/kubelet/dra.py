"""The DRA driver of this node: gives the devices of ResourceClaims to pods.

The scheduler chooses devices from the node's ResourceSlices (shim.kubelet.slices).  Before it starts a pod, the kubelet
asks to prepare the pod's claims.  A claim is prepared when it has a lease and a CDI file whose devices the engine then
adds to the containers.  The lease is made first and ends last, and each step can be done twice, so a driver that is
killed in between repeats all of it when the kubelet asks again.  After a restart of the machine, /run has neither lease
nor file, and the kubelet asks again, too.
Source: Kubernetes, "Dynamic Resource Allocation"; staging/src/k8s.io/kubelet/pkg/apis/dra/v1/api.proto.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Callable

from shim import engine
from shim.cdi import compile as cdi_compile
from shim.cdi import versions
from shim.edits import ENV, Edits
from shim.errors import ChandlerError, HostError, LeaseError, RequestError
from shim.gpu import choose
from shim.host import device_nodes, files
from shim.kubelet import dra_messages as m
from shim.kubelet import slices, sockets
from shim.node import cdi_files
from shim.request import parse
from shim.state import grants, leases, liveness
from shim.state.ledger import Ledger, dra_lease

if TYPE_CHECKING:
    from shim.edits import Edit
    from shim.kubelet.api_server import ApiServer
    from shim.node.inventory import Account, Inventory
    from shim.shapes import Document
    from shim.state.leases import Lease

SOCKET = f"{slices.DRIVER}-reg.sock"
CLAIM_KIND = f"{slices.DRIVER}/claim"
_THREADS = 4
_UID = re.compile("[A-Za-z0-9-]{1,64}")


class Driver:
    """The driver of one node.

    `inventory`: gives the inventory as it is now.  `directory`: where the kubelet looks for sockets of plugins.
    `say`: takes a subject and its problem for people, '' when there is none any more.  `tell`: takes a line for people.
    """

    def __init__(
        self,
        account: Account,
        inventory: Callable[[], Inventory],
        server: ApiServer,
        node: str,
        directory: str,
        say: Callable[[str, str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._account = account
        self._inventory = inventory
        self._api = server
        self._node = node
        self.path = os.path.join(directory, SOCKET)
        self._say = say
        self._tell = tell
        self._server: Any = None
        self._names: dict[str, str] = {}  # names of devices in slices: qualified CDI names
        self._lock = threading.Lock()  # of claims: the kubelet's calls come in several threads
        self._publisher = slices.Publisher(server, node, lambda problem: say("ResourceSlices", problem))

    def look(self, held: list[Lease] | None) -> None:
        """Does what has to be done now.  `held`: all leases, None where the ledger cannot be used."""
        found = slices.survey(self._inventory(), held)
        self._names = {device["name"]: name for name, device in found.items()}
        self._publisher.set(list(found.values()))
        try:
            if self._server is None or sockets.status(self.path) is None:
                self._stop_server()
                services = {m.REGISTRATION_SERVICE: self._registration(), m.DRA_SERVICE: self._methods()}
                self._server = sockets.listen(self.path, services, _THREADS)
            self._say(slices.DRIVER, "")
        except ChandlerError as error:
            self._say(slices.DRIVER, str(error))

    def start(self) -> None:
        self._publisher.start()

    def stop(self) -> None:
        self._publisher.stop()
        self._stop_server()
        self._api.close()

    def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop(0).wait()

    # --- the kubelet's calls --------------------------------------------------------------------------------------

    def _registration(self) -> dict[str, Any]:
        return {
            "GetInfo": sockets.unary(self._info, m.InfoRequest, m.PluginInfo),
            "NotifyRegistrationStatus": sockets.unary(
                self._registered, m.RegistrationStatus, m.RegistrationStatusResponse
            ),
        }

    def _methods(self) -> dict[str, Any]:
        return {
            "NodePrepareResources": sockets.unary(
                self._prepare_all, m.NodePrepareResourcesRequest, m.NodePrepareResourcesResponse
            ),
            "NodeUnprepareResources": sockets.unary(
                self._unprepare_all, m.NodeUnprepareResourcesRequest, m.NodeUnprepareResourcesResponse
            ),
        }

    def _info(self, request: Any, context: Any) -> Any:
        return m.PluginInfo(type=m.TYPE, name=slices.DRIVER, supported_versions=[m.VERSION])

    def _registered(self, request: Any, context: Any) -> Any:
        if request.plugin_registered:
            self._say("kubelet", "")
            self._tell(f"the kubelet has taken the DRA driver {slices.DRIVER}")
            self._publisher.look_soon()
        else:
            self._say("kubelet", f"it does not take the DRA driver {slices.DRIVER}: {request.error}")
        return m.RegistrationStatusResponse()

    def _prepare_all(self, request: Any, context: Any) -> Any:
        response = m.NodePrepareResourcesResponse()
        for each in request.claims:
            answer = response.claims[each.uid]
            try:
                with self._lock:
                    for device in self.prepare(each.uid, each.namespace, each.name):
                        answer.devices.add(**device)
            except ChandlerError as error:
                answer.error = str(error)
        return response

    def _unprepare_all(self, request: Any, context: Any) -> Any:
        response = m.NodeUnprepareResourcesResponse()
        for each in request.claims:
            answer = response.claims[each.uid]
            try:
                with self._lock:
                    self.unprepare(each.uid)
            except ChandlerError as error:
                answer.error = str(error)
        return response

    # --- claims ---------------------------------------------------------------------------------------------------

    def prepare(self, uid: str, namespace: str, name: str) -> list[Document]:
        """Leases the devices of a claim and writes its CDI file; gives the devices as the kubelet wants them.

        Raises ChandlerError.
        """
        source = f"ResourceClaim {namespace}/{name}"
        claim = self._api.claim(namespace, name)
        if not _UID.fullmatch(uid) or claim["metadata"].get("uid") != uid:
            raise RequestError(f"{source}: it is another one than the kubelet's, which has the uid {uid}")
        results = slices.of_claim(claim)
        check_parameters(claim, source)
        names = [self._device(result, source) for result in results]
        inventory = self._inventory()
        self._grant(uid, namespace, name, names, source, inventory)
        block = _cdi_file(uid, dict(zip((result["device"] for result in results), names)), inventory)
        self._write(uid, block)
        return [
            {
                "request_names": [result["request"]],
                "pool_name": result["pool"],
                "device_name": result["device"],
                "cdi_device_ids": [f"{CLAIM_KIND}={_id(uid, result['device'])}"],
            }
            for result in results
        ]

    def unprepare(self, uid: str) -> None:
        """Takes back what `prepare` has done, as much of it as there is.  Raises ChandlerError."""
        if not _UID.fullmatch(uid):
            return  # `prepare` has refused it
        path = self._path(uid)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise HostError(f"the CDI file {path} cannot be removed: {error.strerror}") from None
        state_dir = self._state_dir()
        grants.remove(state_dir, "", uid)
        ledger = self._ledger(state_dir)
        if ledger is not None:
            ledger.release(
                {lease["token"] for lease in ledger.read() if lease["owner"] == "dra" and lease["id"] == uid}
            )

    def _device(self, result: Document, source: str) -> str:
        """The qualified CDI name of an allocated device.  Raises RequestError or HostError."""
        if result.get("adminAccess"):
            raise RequestError(f"{source}: adminAccess is asked for, which {slices.DRIVER} does not have")
        name = self._names.get(result["device"]) if result["pool"] == self._node else None
        if name is None:
            raise HostError(
                f"{source}: {result['device']} of the pool {result['pool']} is no device of this node",
                "delete the claim's pods and the claim; another one gets what is there",
            )
        return name

    def _grant(self, uid: str, namespace: str, name: str, names: list[str], source: str, inventory: Inventory) -> None:
        """Leases the devices for a claim, unless it has them already, and records that.  Raises ChandlerError.

        What is done when this fails stays: the kubelet asks again, or to unprepare.
        """
        gpu = choose.with_allocated({}, names, source, "the scheduler chose them")
        request = parse.Request({"resources": {"gpu": gpu}}, source)
        facts: Any = {"devices": names, "namespace": namespace, "built": True}  # no engine has written anything yet
        state_dir = self._state_dir()
        ledger = self._ledger(state_dir)
        checked = engine.check_request({"process": {}}, inventory, "", request, facts, ledger is not None)
        if checked is None or not names:
            raise RequestError(f"{source}: no device of {slices.DRIVER} is allocated to it")
        now = int(time.time())
        lease = dra_lease(uid, namespace, name, now)
        present = None if ledger is None else leases.of_container(ledger.read(), "dra", "", uid)
        if ledger is not None and present is not None and liveness.of_another_boot(present):
            ledger.release({present["token"]})
            present = None
        if ledger is None or present is not None:
            plan = checked.choose_devices(None if ledger is None else [])
        else:
            # Without patience: this pod does not see the processes that decide whether another lease has ended.
            plan = ledger.allocate(lease, checked.choose_devices, patient=False)
        if present is not None:
            lease = present
            if sorted(present["names"]) != sorted(plan.names):
                raise LeaseError(
                    f"{source}: its lease has {', '.join(present['names'])}, not {', '.join(plan.names)}",
                    f"delete the claim's pods, then run `chandler leases release --force {uid}`",
                )
        plan.complete()
        record: Any = {
            "id": uid,
            "root": "",
            "runtime": "",
            "owner": "dra",
            "namespace": namespace,
            "name": name,
            "boot": lease["boot"],
            "source": source,
            "devices": plan.names,
            "physical": plan.keys,
            "time": now,
            "grant": plan.digest(),
            **({} if ledger is None else {"token": lease["token"]}),
        }
        try:
            grants.write(state_dir, record, self._account.rootless)
        except OSError as error:
            raise HostError(
                f"the grant cannot be recorded in {grants.directory(state_dir)}: {error.strerror}"
            ) from None

    def _state_dir(self) -> str:
        return self._account.trusted_state_dir(self._inventory().config["state-dir"])

    def _ledger(self, state_dir: str) -> Ledger | None:
        """None on a node that keeps no leases."""
        if self._inventory().config["gpu.allocator"] != "leases":
            return None
        return Ledger(state_dir, self._account.rootless)

    def _path(self, uid: str) -> str:
        """The CDI file of a claim."""
        return f"{self._inventory().config['cdi.spec-dirs'][-1]}/{cdi_files.CLAIMS}{uid}.json"

    def _write(self, uid: str, content: Document) -> None:
        path = self._path(uid)
        try:
            files.make_directory(os.path.dirname(path))
            files.replace(path, json.dumps(content).encode(), 0o600)
        except OSError as error:
            raise HostError(f"the CDI file {path} cannot be written: {error.strerror}") from None


def check_parameters(claim: Document, source: str) -> None:
    """Raises RequestError for parameters of this driver in a claim or its class: it has none yet."""
    for each in slices.allocated(claim).get("config") or ():
        opaque = each.get("opaque") or {}
        if opaque.get("driver") != slices.DRIVER:
            continue
        place = "its DeviceClass" if each.get("source") == "FromClass" else "it"
        parameters = opaque.get("parameters")
        if not isinstance(parameters, dict):
            raise RequestError(f"{source}: {place} has parameters of {slices.DRIVER} that are no object")
        if "sharing" in parameters:
            raise RequestError(
                f"{source}: {place} asks for sharing, which {slices.DRIVER} does not have yet",
                "share with the annotation resources.gpu of pods that have no claim",
            )
        if parameters:
            raise RequestError(
                f"{source}: {place} has the unknown parameter {min(parameters)} of {slices.DRIVER}", "remove it"
            )


def _id(uid: str, device: str) -> str:
    """The name of an allocated device in the claim's CDI file: containers may ask for single requests of a claim."""
    return f"{uid}-{device}"


def _cdi_file(uid: str, names: dict[str, str], inventory: Inventory) -> Document:
    """The CDI file of a claim.  `names`: by the devices' names in slices, their qualified CDI names.

    It has no variables of the vendor that number the devices, since a container may have several claims.
    """
    parts: dict[str, tuple[str, tuple[Edit, ...], tuple[Edit, ...]]] = {}
    for device, name in names.items():
        found = inventory.lookup(name)
        if found is None:  # the vendor's own nodes, without a CDI file
            asked = {"vendor": name.partition("=")[0], "devices": [name.partition("=")[2]]}
            nodes = choose.grant(asked, [], inventory, name, device_nodes.read_gpu_node).edits.items
            found = name, (), tuple(edit for edit in nodes if edit[0] != ENV)
        parts[device] = found
    # What all devices of one file need comes once, also for a container with several of them.
    alike = len({part for part, _, _ in parts.values()}) == 1
    common = next(iter(parts.values()))[1] if alike else ()
    made: Document = {
        "kind": CLAIM_KIND,
        "containerEdits": _block(common),
        "devices": [
            {"name": _id(uid, device), "containerEdits": _block(own if alike else (*before, *own))}
            for device, (_, before, own) in parts.items()
        ],
    }
    return {"cdiVersion": versions.minimum(made)[0], **made}


def _block(edits: tuple[Edit, ...]) -> Document:
    """`containerEdits` with the numbers that device nodes have now."""
    return cdi_compile.container_edits(device_nodes.complete(Edits(edits)).items)
