"""The devices that the kubelet may allocate: which resource they belong to, and whether they can be given now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from shim.edits import Edits
from shim.errors import ChandlerError, ConfigError
from shim.gpu import choose, neighbours, vendors
from shim.host import device_nodes
from shim.state import leases

if TYPE_CHECKING:
    from shim.gpu.choose import ReadNode
    from shim.node.inventory import Inventory
    from shim.state.leases import Lease


class Device(NamedTuple):
    """One device, or one partition of it.

    `name`: its qualified CDI name, which is its ID at the kubelet.  `problem`: why it cannot be given now, '' if it
    can.  `numa`: its NUMA node, None where the host does not report one.
    """

    name: str
    problem: str
    numa: int | None


def resources(inventory: Inventory) -> dict[str, str]:
    """{CDI kind: name of its resource} for the kinds that may have devices on this node.

    A vendor's resource is called after it (`chandler.oci/nvidia`), unless `kubernetes.resources` names it.  Other kinds
    have a resource only where that key gives them one.  Raises ConfigError for two kinds with one name, and for one
    kind with two.
    """
    config = inventory.config
    names: dict[str, str] = {}
    configured = dict(config["kubernetes.resources"])
    for vendor in vendors.with_gpus():
        given = [configured.pop(word) for word in (*vendor.names, vendor.kind) if word in configured]
        if len(given) > 1:
            raise ConfigError(f"kubernetes.resources: {vendor.kind} has several names: {', '.join(given)}")
        names[vendor.kind] = given[0] if given else config["annotation-prefix"] + vendor.name
    names.update(configured)
    for kind, name in names.items():
        if list(names.values()).count(name) > 1:
            raise ConfigError(f"kubernetes.resources: {name} is the resource of {kind} and of another kind")
    return names


def survey(
    kind: str,
    inventory: Inventory,
    held: list[Lease] | None,
    read_node: ReadNode = device_nodes.read_gpu_node,
    complete: Callable[[Edits], Edits] = device_nodes.complete,
) -> list[Device]:
    """The devices of a kind, in the order in which a count takes them.

    `held`: all leases; None where the ledger cannot be used, so that no device can be given.
    """
    lines = inventory.near(kind).split("\n")
    devices = []
    for index, (name, keys) in enumerate(choose.keys_by_name(kind, inventory, read_node).items()):
        numa = neighbours.numa_node(lines[index]) if index < len(lines) and lines[index] else None
        problem = _missing(name, inventory, complete) or _in_use(name, keys, held)
        devices.append(Device(name, problem, numa))
    return devices


def preferred(
    available: list[str], included: list[str], count: int, kind: str, inventory: Inventory, order: Mapping[str, int]
) -> list[str]:
    """`count` of the available devices that are close to each other, those of `included` among them.

    `order`: for each device of the kind its number in `survey`.
    """
    names = {number: name for name, number in order.items()}
    free = sorted(order[name] for name in available if name in order)
    wanted = [order[name] for name in included if name in order]
    return [names[number] for number in neighbours.choose(free, count, "link", inventory.near(kind), wanted)]


def _missing(name: str, inventory: Inventory, complete: Callable[[Edits], Edits]) -> str:
    """Why the device nodes of a device cannot be used; '' if they can, or if no CDI file describes the device."""
    described = inventory.lookup(name)
    if described is None:
        return ""
    try:
        complete(Edits(list(described[2])))
    except ChandlerError as error:
        return error.what
    return ""


def _in_use(name: str, keys: list[str], held: list[Lease] | None) -> str:
    """Why the kubelet cannot give a device to a container: a container has it that did not get it from the kubelet.

    The kubelet knows which devices it has allocated itself; those stay healthy.
    """
    if held is None:
        return "the ledger of leases cannot be used"
    lease = leases.holder(keys, [lease for lease in held if not (lease.get("allocated") and name in lease["names"])])
    return "" if lease is None else leases.describe(lease)
