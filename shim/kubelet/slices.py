"""The ResourceSlices of this node: what the scheduler knows of its devices, and how they are kept true.

Source: Kubernetes, staging/src/k8s.io/api/resource/v1/types.go.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Callable

from shim.errors import ChandlerError
from shim.generate import nvproc, pci
from shim.generate.tree import HostTree
from shim.gpu import neighbours, vendors
from shim.host import files
from shim.kubelet import devices

if TYPE_CHECKING:
    from shim.kubelet.api_server import ApiServer
    from shim.node.inventory import Inventory
    from shim.shapes import Document
    from shim.state.leases import Lease

DRIVER = "gpu.chandler.oci"
TAINT = f"{DRIVER}/unavailable"  # of a device that cannot be given now
_STANDARD = "resource.kubernetes.io/"  # attributes that all drivers spell alike
_MAX_DEVICES = 64  # in one slice, where a device has a taint
_MAX_TEXT = 64  # characters of an attribute
_LABEL = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LONGEST = 60.0  # seconds between two looks at the slices, which others can delete
_FIRST = 1.0  # seconds to the look after a change; each look that finds nothing doubles it


def device_name(name: str) -> str:
    """The name, a DNS label, that a device has in a slice.  It depends on its qualified CDI name alone."""
    kind, _, device = name.partition("=")
    text = f"{vendors.of_kind(kind).name or kind}-{device}"
    if _LABEL.fullmatch(text):
        return text
    return f"{re.sub('[^a-z0-9]+', '-', text.lower()).strip('-')[:48]}-{files.digest(name.encode())[:8]}".lstrip("-")


def survey(inventory: Inventory, held: list[Lease] | None, tree: HostTree | None = None) -> dict[str, Document]:
    """All devices of this node as a slice has them, by qualified CDI name.

    `held`: all leases, None where the ledger cannot be used.
    """
    tree = tree or HostTree()
    # The scheduler itself knows which devices claims have.  It does not know what else is leased, device plugin or not.
    others: list[Lease] | None = None
    if held is not None:
        others = [{**lease, "allocated": False} for lease in held if lease["owner"] != "dra"]
    found: dict[str, Document] = {}
    for kind in devices.resources(inventory):
        lines = inventory.near(kind).split("\n")
        version = nvproc.kernel_version(tree) if kind == vendors.NVIDIA.kind else ""
        for index, device in enumerate(devices.survey(kind, inventory, others)):
            line = lines[index] if index < len(lines) else ""
            made: Document = {
                "name": device_name(device.name),
                "attributes": _attributes(device.name, line, version, inventory),
            }
            memory = tree.text(f"{pci.DEVICES}/{neighbours.pci_path(line)[-1]}/mem_info_vram_total") if line else ""
            if memory.isdigit():  # amdgpu's
                made["capacity"] = {"memory": {"value": memory}}
            if device.problem:
                made["taints"] = [{"key": TAINT, "effect": "NoSchedule"}]
            found[device.name] = made
    return found


def _attributes(name: str, line: str, version: str, inventory: Inventory) -> Document:
    kind, _, device = name.partition("=")
    texts = {"vendor": vendors.of_kind(kind).name, "kind": kind, "name": device}
    keys = inventory.key(name)
    aliases = inventory.names(kind, keys[0]) if len(keys) == 1 else []
    texts["uuid"] = next((alias for alias in aliases if alias.startswith(("GPU-", "MIG-"))), "")
    numbers: dict[str, int] = {}
    if line:
        path, numa = neighbours.pci_path(line), neighbours.numa_node(line)
        if path[0]:
            texts[_STANDARD + "pcieRoot"], texts[_STANDARD + "pciBusID"] = path[0], path[-1]
        if numa is not None:
            numbers["numa"] = numa
    made: Document = {key: {"string": text} for key, text in texts.items() if 0 < len(text) <= _MAX_TEXT}
    made.update((key, {"int": number}) for key, number in numbers.items())
    if version:
        parts = [str(int(part)) for part in version.split(".")]  # as Semantic Versioning has them: 550.54.5
        made["driverVersion"] = {"version": ".".join((parts + ["0", "0"])[:3])}
    return made


class Publisher:
    """Keeps the slices of one node at the API server as `set` says, in a thread of its own.

    `say` takes a problem for people, '' when there is none any more.
    """

    def __init__(self, server: ApiServer, node: str, say: Callable[[str], None]) -> None:
        self._server = server
        self._node = node
        self._say = say
        self._wanted: list[Document] | None = None
        self._changed = threading.Event()
        self._stopped = False
        self._taints = True  # whether this cluster knows taints of devices
        self._owner: Document | None = None
        # The slices as they were written last.  The API server spells some values in its own way.
        self._specs: dict[str, Document] = {}
        self._versions: dict[str, str] = {}  # resourceVersion by name
        self._thread = threading.Thread(target=self._run, name="slices", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The slices stay: the kubelet deletes them if no driver comes back within half a minute."""
        self._stopped = True
        self._changed.set()

    def set(self, wanted: list[Document]) -> None:
        """The devices as slices have them."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()

    def look_soon(self) -> None:
        """Somebody else may have deleted slices: the kubelet does when it starts."""
        self._changed.set()

    def _run(self) -> None:
        pause = _FIRST
        while True:
            if self._changed.wait(pause):
                pause = _FIRST
            self._changed.clear()
            if self._stopped:
                return
            wanted = self._wanted
            if wanted is None:
                continue
            try:
                while self._publish(wanted):
                    pass
                self._say("")
            except ChandlerError as error:
                self._say(str(error))
            except (AttributeError, KeyError, TypeError) as error:
                self._say(f"an answer of the API server has not the form of a ResourceSlice: {error!r}")
            pause = min(2 * pause, _LONGEST)

    def _publish(self, wanted: list[Document]) -> bool:
        """Writes what differs.  Gives whether to do it once more, since the cluster knows no taints."""
        if not self._taints:
            wanted = [device for device in wanted if "taints" not in device]
        present = {found["metadata"]["name"]: found for found in self._server.slices(self._node, DRIVER)}
        chunks = [wanted[at : at + _MAX_DEVICES] for at in range(0, len(wanted), _MAX_DEVICES)]
        specs: dict[str, Document] = {
            f"{self._node[:200]}-{DRIVER}-{number}": {
                "driver": DRIVER,
                "nodeName": self._node,
                "pool": {"name": self._node, "resourceSliceCount": len(chunks)},
                "devices": chunk,
            }
            for number, chunk in enumerate(chunks)
        }
        versions = {name: found["metadata"]["resourceVersion"] for name, found in present.items()}
        if versions != self._versions or specs != self._specs:
            generation = max((found["spec"]["pool"]["generation"] for found in present.values()), default=0) + 1
            self._versions, self._specs = {}, specs
            for name, spec in specs.items():
                # A consumer believes the slices with the highest generation, once it has all of them.
                pool: Document = {**spec["pool"], "generation": generation}
                if self._write(name, {**spec, "pool": pool}, versions.get(name)):
                    return True
            for name in present.keys() - specs.keys():
                self._server.delete_slice(name)
        return False

    def _write(self, name: str, spec: Document, version: str | None) -> bool:
        """Writes one slice.  Gives whether the cluster has dropped its taints."""
        metadata: Document = {"name": name, "ownerReferences": [self._of_node()]}
        if version is not None:
            metadata["resourceVersion"] = version
        made = self._server.write_slice(
            {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": metadata, "spec": spec}
        )
        self._versions[name] = made["metadata"]["resourceVersion"]
        kept = any("taints" in device for device in made.get("spec", {}).get("devices", ()))
        if any("taints" in device for device in spec["devices"]) and not kept:
            self._taints = False
            return True
        return False

    def _of_node(self) -> Document:
        """The node as owner: with it, its slices are deleted."""
        if self._owner is None:
            node = self._server.node(self._node)
            self._owner = {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": node["metadata"]["uid"]}
        return self._owner


def allocated(claim: Document) -> Document:
    """What the scheduler has allocated to a ResourceClaim: `results` and `config`."""
    allocation = (claim.get("status") or {}).get("allocation") or {}
    found: Document = allocation.get("devices") or {}
    return found


def of_claim(claim: Document) -> list[Document]:
    """The results of a ResourceClaim's allocation that are this driver's."""
    return [each for each in allocated(claim).get("results") or () if each.get("driver") == DRIVER]
