"""Chooses the devices for `resources.gpu`, and makes the edits that add them to the container.

Where a CDI file describes the GPUs, a device is a CDI name.  Where none does, it is the vendor's own device nodes.
Pure: the caller passes a function, `read_node`, that looks at device nodes.  Part of the create path.
"""

from __future__ import annotations

from shim import errors
from shim.cdi import names as cdi_names
from shim.cdi import resolve as cdi_resolve
from shim.edits import DEVICE, ENV, GID, Edits, merge
from shim.gpu import vendors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

    from shim.edits import DeviceNode, Edit
    from shim.node.inventory import Inventory
    from shim.shapes import Document
    from shim.state.leases import Lease

    ReadNode = Callable[[str], Tuple[str, int, int, int, int, str]]


class Grant:
    """The devices that a GPU request gets.

    `names`: the devices, as CDI names, or as kind=number without CDI.
    `keys`: the physical devices behind them, such as c195:0.  One name can stand for several.
    `edits`: everything that the container needs for them.
    `by_cdi`, `own_edits`: the same in two parts, for an engine that injects CDI devices itself: the CDI names to give
    to the engine, and the edits that Chandler still makes.
    """

    __slots__ = ("names", "keys", "edits", "by_cdi", "own_edits")

    def __init__(self, names: List[str], keys: List[str], edits: Edits, by_cdi: List[str], own_edits: Edits) -> None:
        self.names = names
        self.keys = keys
        self.edits = edits
        self.by_cdi = by_cdi
        self.own_edits = own_edits

    def joined(self, other: Grant) -> Grant:
        """A grant of the devices of both."""
        return Grant(
            self.names + other.names,
            self.keys + other.keys,
            merge(self.edits, other.edits),
            self.by_cdi + other.by_cdi,
            merge(self.own_edits, other.own_edits),
        )


def grant(
    request: Optional[Document],
    engine_names: List[str],
    inventory: Inventory,
    source: str,
    read_node: ReadNode,
    held: Optional[List[Lease]] = None,
) -> Grant:
    """Chooses the devices for a request and for the qualified CDI names that the engine left to Chandler.

    `request`: the value of resources.gpu; None when the container asks for no GPU.
    `read_node`: gives type, major and minor number, permission bits, group and PCI vendor of a device node, or raises
    HostError.
    `held`: the leases of other containers; None on a node that keeps no leases.

    Raises RequestError, CdiError or HostError, and LeaseError when leases alone prevent the grant.
    """
    names = list(engine_names)
    nodes: Optional[Grant] = None
    if request is not None:
        kind = kind_of(request.get("vendor", vendors.DEFAULT.name), source)
        asked, count = request.get("devices"), request.get("count", 1)
        if asked is not None and "count" in request and ("all" in asked or count != len(asked)):
            raise errors.RequestError(
                f"{source}: resources.gpu asks for {count} devices and names {len(asked)}",
                "leave out count or devices",
            )
        if asked is not None and "prefer" in request:
            raise errors.RequestError(
                f"{source}: resources.gpu.prefer says which devices a count takes, and these are named",
                "leave out prefer or devices",
            )
        if asked is None and inventory.config["gpu.allocator"] == "none":
            raise errors.RequestError(
                f'{source}: resources.gpu: an orchestrator allocates this node\'s devices (allocator = "none")',
                "name them in resources.gpu.devices",
            )
        picks = inventory.picks(kind)
        # a qualified name needs a CDI file, even where no file describes the devices of this vendor
        if picks or any("=" in name for name in asked or ()):
            names += (
                _counted(kind, count, picks, inventory, source, held, request.get("prefer", ""))
                if asked is None
                else _named(kind, asked, inventory)
            )
        else:
            nodes = _from_nodes(kind, asked, count, inventory, source, read_node, held)
    cdi_grant = _from_cdi(names, inventory, source, held)
    return cdi_grant if nodes is None else cdi_grant.joined(nodes)


def count_gpus(grant: Grant, inventory: Inventory) -> Tuple[int, List[str]]:
    """Counts the GPUs of a grant, for the policy's max-gpus and `gpu.all`.

    Gives their number, and the names that stand for all GPUs of their kind where there are several.  A device of a CDI
    file may hold GPUs that no other device of the file describes, so the vendor's own device nodes are counted, too,
    where the vendor table knows them.
    """
    count, aggregates = len(grant.names) - len(grant.by_cdi), []
    one_key_each = len(grant.keys) == len(grant.names)
    for name in grant.by_cdi:
        device = inventory.lookup(name)
        if one_key_each and device and len(device[2]) < 2:  # one edit at most: no room for a second GPU
            count += 1
            continue
        kind = name.partition("=")[0]
        prefix = "".join(vendors.of_kind(kind).gpu_nodes[:1]).partition("{")[0]
        nodes = (
            [edit[1] for edit in device[2] if edit[0] == DEVICE and edit[1].startswith(prefix)]
            if device and prefix
            else []
        )
        if len(nodes) > 1:  # count nvidia0 and its like, not nvidiactl
            nodes = [path for path in nodes if path[len(prefix) :].isdigit()]
        gpus = max(len(inventory.key(name)), len(nodes))
        count += gpus
        if gpus > 1 and gpus >= len(inventory.picks(kind)):
            aggregates.append(name)
    return count, aggregates


def gpu_names_by_number(kinds: Iterable[str], inventory: Inventory, read_node: ReadNode) -> Dict[str, str]:
    """The device numbers (such as c195:0) of all GPUs of some kinds that this node may grant, with the GPUs' names."""
    gpu_names: Dict[str, str] = {}
    for kind in kinds:
        # A key joins the numbers of all nodes of a device with "+".  The key of a device without nodes is its name.
        gpu_names.update(
            (number, name)
            for name, device_keys in keys_by_name(kind, inventory, read_node).items()
            for key in device_keys
            for number in key.split("+")
            if number[1:2].isdigit()
        )
    return gpu_names


def keys_by_name(kind: str, inventory: Inventory, read_node: ReadNode) -> Dict[str, List[str]]:
    """The devices of a kind from which a count takes, in that order: qualified name, and keys of physical devices."""
    picks = inventory.picks(kind)
    templates = vendors.of_kind(kind).gpu_nodes
    if not picks and templates and inventory.config["gpu.fallback"] == "devices":
        return {
            f"{kind}={index}": [_key_of_nodes(templates, index, read_node)]
            for index in _present_numbers(templates, read_node)
        }
    return {f"{kind}={pick}": inventory.key(f"{kind}={pick}") for pick in picks}


def with_devices(request: Document, names: List[str], engine_names: List[str]) -> Document:
    """The value of resources.gpu, changed to name devices: those that a restored container had, or that the kubelet has
    allocated.

    `names`: qualified names.  `engine_names`: the names that the engine asks for itself, which the request leaves out.
    """
    remaining = [name for name in names if name not in engine_names]
    if not remaining:
        return request
    name = request.get("vendor", vendors.DEFAULT.name)
    vendor = vendors.by_name(name)
    kind = name if vendor is None else vendor.kind
    return {
        **{key: value for key, value in request.items() if key not in ("count", "prefer")},
        "devices": [name.partition("=")[2] if name.partition("=")[0] == kind else name for name in remaining],
    }


def with_allocated(asked: Document, names: List[str], source: str, given: str) -> Document:
    """The value of resources.gpu, with number and vendor of devices that have been chosen already.

    The kubelet has chosen them, as the pod's limits ask (`chandler.oci/nvidia: 2`), or another container of the pod has
    got them.  The annotation, `asked`, may say the same once more, and how the devices are used.
    `names`: qualified CDI names.  `given`: who chose them, for errors.  Raises RequestError where the annotation asks
    for something else.
    """
    kinds = list(dict.fromkeys(name.partition("=")[0] for name in names))
    if "devices" in asked:
        kind = kind_of(asked.get("vendor", vendors.DEFAULT.name), source)
        if {name if "=" in name else f"{kind}={name}" for name in asked["devices"]} != set(names):
            raise errors.RequestError(
                f"{source}: resources.gpu.devices names {', '.join(asked['devices'])}, and {given}",
                "leave out devices",
            )
        return asked
    if asked.get("count", len(names)) != len(names):
        raise errors.RequestError(
            f"{source}: resources.gpu.count is {asked['count']}, and {given}",
            "write the same number in both, or leave out count",
        )
    if "vendor" in asked and kinds != [kind_of(asked["vendor"], source)]:
        raise errors.RequestError(
            f"{source}: resources.gpu.vendor is {asked['vendor']}, and {given}",
            "write the same vendor in both, or leave out vendor",
        )
    request = {key: value for key, value in asked.items() if key != "prefer"}  # it is too late to choose
    request["count"] = len(names)
    other = next((kind for kind in kinds if kind != vendors.DEFAULT.kind), "")
    if other:
        request.setdefault("vendor", other)
    return request


def kind_of(name: str, source: str) -> str:
    """The CDI kind that resources.gpu.vendor means: that of a known vendor, or the value itself, if it is a kind."""
    vendor = vendors.by_name(name)
    if vendor is not None and vendor.gpu_nodes:
        return vendor.kind
    if "/" in name:
        return name
    known = ", ".join(alias for vendor in vendors.with_gpus() for alias in vendor.names)
    raise errors.RequestError(
        f"{source}: resources.gpu.vendor: unknown vendor {name!r}",
        f"known: {known}, or a CDI kind such as example.com/gpu",
    )


# --- through CDI ----------------------------------------------------------------------------------------------


def _counted(
    kind: str, count: int, picks: List[str], inventory: Inventory, source: str, held: Optional[List[Lease]], prefer: str
) -> List[str]:
    """The qualified names of `count` devices of a kind: the first free ones, or with `prefer` neighbours."""
    names = [f"{kind}={device}" for device in picks]
    if count > len(names):
        raise errors.RequestError(
            f"{source}: resources.gpu asks for {_devices(count)} of {kind}; this node has {len(names)}",
            f"they are {', '.join(names)}",
        )
    if held:
        names = _free([(name, inventory.key(name)) for name in names], count, kind, source, held)
    if prefer and held is not None:  # a node without leases always grants the first devices
        from shim.gpu import neighbours

        free = {name.partition("=")[2] for name in names}
        indexes = [index for index, pick in enumerate(picks) if pick in free]
        return [f"{kind}={picks[index]}" for index in neighbours.choose(indexes, count, prefer, inventory.near(kind))]
    return names[:count]


def _devices(count: int) -> str:
    return f"{count} device{'' if count == 1 else 's'}"


def _free(devices: List[Tuple[str, List[str]]], count: int, kind: str, source: str, held: List[Lease]) -> List[str]:
    """The names of the devices that no lease holds.  Raises LeaseError when there are fewer than `count`."""
    from shim.state import leases

    free = []
    holders: List[str] = []
    for name, keys in devices:
        lease = leases.holder(keys, held)
        if lease is None:
            free.append(name)
        elif leases.describe(lease) not in holders:
            holders.append(leases.describe(lease))
    if len(free) < count:
        raise errors.LeaseError(
            f"{source}: resources.gpu asks for {_devices(count)} of {kind}; {len(free)} of {len(devices)} "
            f"are free: {'; '.join(holders)}",
            "end one of these containers, or run `chandler leases`",
        )
    return free


def _named(kind: str, asked: List[str], inventory: Inventory) -> List[str]:
    """The qualified names of resources.gpu.devices.

    `all` means the device of that name.  Where no CDI file has one, it means every device of the kind.
    """
    names: List[str] = []
    for device in asked:
        if "=" in device:
            names.append(device)
        elif device == "all" and inventory.lookup(f"{kind}=all") is None:
            names.extend(f"{kind}={pick}" for pick in inventory.picks(kind))
        else:
            names.append(f"{kind}={device}")
    return names


def _from_cdi(names: List[str], inventory: Inventory, source: str, held: Optional[List[Lease]]) -> Grant:
    """The grant of some qualified CDI names.  Raises CdiError, RequestError or LeaseError."""
    keys: List[str] = []
    per_kind: Dict[str, int] = {}
    for name in names:
        kind = cdi_names.kind(name)
        if inventory.lookup(name) is None:
            inventory.explain_missing([missing for missing in names if inventory.lookup(missing) is None])
        device_keys = inventory.key(name)
        if any(key in keys for key in device_keys):
            raise errors.RequestError(
                f"{source}: {name} asks for a device that another of the names asks for, too",
                "name each device once",
            )
        _check_free(name, device_keys, source, held)
        keys += device_keys
        per_kind[kind] = per_kind.get(kind, 0) + len(device_keys)
    edits = cdi_resolve.resolve(names, inventory.lookup)
    set_by_cdi = {edit[1] for edit in edits.items if edit[0] == ENV}
    # a variable that the CDI file sets keeps the file's value
    visible = Edits(
        [edit for kind, number in per_kind.items() for edit in _visibility(kind, number) if edit[1] not in set_by_cdi]
    )
    return Grant(names, keys, edits.followed_by(visible), names, visible)


def _check_free(name: str, keys: List[str], source: str, held: Optional[List[Lease]]) -> None:
    if not held:
        return
    from shim.state import leases

    lease = leases.holder(keys, held)
    if lease is not None:
        raise errors.LeaseError(
            f"{source}: {name} is not free: {leases.describe(lease)}", "end that container, or run `chandler leases`"
        )


def _visibility(kind: str, count: int) -> List[Edit]:
    """The vendor's variables, which list `count` devices.  Inside the container devices are always numbered from 0."""
    indexes = ",".join(str(index) for index in range(count))
    return [(ENV, variable, indexes, f"vendor table, {kind}") for variable in vendors.of_kind(kind).variables]


# --- without CDI ----------------------------------------------------------------------------------------------


def _from_nodes(
    kind: str,
    asked: Any,
    count: int,
    inventory: Inventory,
    source: str,
    read_node: ReadNode,
    held: Optional[List[Lease]],
) -> Grant:
    """The grant of a vendor's own device nodes, for a host without a CDI file for the kind."""
    vendor = vendors.of_kind(kind)
    templates = vendor.gpu_nodes
    # where a CDI file cannot be used, its error is shown, and no nodes take its place
    if inventory.config["gpu.fallback"] != "devices" or not templates or inventory.problems:
        inventory.explain_missing([f"{kind}={device}" for device in asked or ("0",)])
    if asked is not None:
        numbers = [_device_number(device, kind, source) for device in asked]
    elif held:
        present = _present_numbers(templates, read_node)
        free = _free(
            [(str(number), [_key_of_nodes(templates, number, read_node)]) for number in present],
            min(count, len(present)),
            kind,
            source,
            held,
        )
        # numbers beyond those of the host fail below, with the name of the node that is missing
        numbers = [int(name) for name in free[:count]] + list(range(len(present), count))
    else:
        numbers = list(range(count))
    if len(set(numbers)) != len(numbers):
        raise errors.RequestError(f"{source}: resources.gpu.devices names one device twice")
    origin = f"vendor table, {kind}"
    edits: List[Edit] = []
    keys: List[str] = []
    try:
        for path in vendor.control_nodes:
            edits.extend(_node(path, origin, read_node))
        for number in numbers:
            for template in templates:
                edits.extend(_node(template.format(number, 128 + number), origin, read_node, vendor.pci))
            keys.append(_key_of_nodes(templates, number, read_node))
            _check_free(f"{kind}={number}", keys[-1:], source, held)
    except errors.HostError as error:
        raise errors.HostError(
            f"{source}: resources.gpu asks for {_devices(len(numbers))} of {kind}, but {error.what}, and no CDI "
            f"file describes {kind}",
            f"load the driver with `{vendor.load}`, or give the node a CDI file with `chandler cdi generate`",
        ) from None
    names = [f"{kind}={number}" for number in numbers]
    all_edits = Edits(edits + _visibility(kind, len(numbers)))
    return Grant(names, keys, all_edits, [], all_edits)


def _key_of_nodes(templates: Tuple[str, ...], number: int, read_node: ReadNode) -> str:
    """The key of a GPU, made of the numbers of its device nodes.  A CDI file with the same nodes gives the same key."""
    parts = []
    for template in templates:
        kind, major, minor, _, _, _ = read_node(template.format(number, 128 + number))
        parts.append(f"{kind}{major}:{minor}")
    return "+".join(sorted(parts))


def _present_numbers(templates: Tuple[str, ...], read_node: ReadNode) -> List[int]:
    """The numbers of the GPUs whose device nodes are on the host: 0, 1 and so on, up to the first that is missing."""
    numbers: List[int] = []
    while True:
        try:
            _key_of_nodes(templates, len(numbers), read_node)
        except errors.HostError:
            return numbers
        numbers.append(len(numbers))


def _device_number(device: str, kind: str, source: str) -> int:
    if not device.isdigit() or not device.isascii():
        raise errors.RequestError(
            f"{source}: resources.gpu.devices: without a CDI file for {kind} a device is a number, not {device!r}",
            "give the node a CDI file",
        )
    return int(device)


def _node(path: str, origin: str, read_node: ReadNode, vendor: str = "") -> List[Edit]:
    """The edits that add a device node as the host has it.

    The container's process also joins the node's group where its members may use the node and others may not, as with
    /dev/dri and /dev/kfd.  Raises HostError when the host says that the device is another vendor's.
    """
    kind, major, minor, mode, group, pci_vendor = read_node(path)
    if vendor and pci_vendor and pci_vendor != vendor:
        raise errors.HostError(f"{path} is a device of the PCI vendor {pci_vendor}, not {vendor}")
    node: DeviceNode = {"path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode}
    if not group or mode & 0o006 == 0o006 or mode & 0o060 != 0o060:
        return [(DEVICE, path, node, origin)]
    node["gid"] = group
    return [(DEVICE, path, node, origin), (GID, group, None, origin)]
