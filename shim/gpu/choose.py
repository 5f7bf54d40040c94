"""From `resources.gpu` to devices: CDI names where a CDI file describes the GPUs, the vendor's nodes where none does.

Pure (the host is asked through `look`); part of the create path.
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

    from shim.edits import Edit
    from shim.node.inventory import Inventory
    from shim.state.leases import Lease

    Look = Callable[[str], Tuple[str, int, int, int, int, str]]


class Grant:
    """What a GPU request came to: `names`, the devices (CDI names, or kind=number without CDI); `keys`, the
    physical device behind each; `edits`.  Of these an engine that knows CDI can make some by itself: `by_cdi` are
    the names to give it, `beside` the edits that are then left."""

    __slots__ = ("names", "keys", "edits", "by_cdi", "beside")

    def __init__(self, names: List[str], keys: List[str], edits: Edits, by_cdi: List[str], beside: Edits) -> None:
        self.names = names
        self.keys = keys
        self.edits = edits
        self.by_cdi = by_cdi
        self.beside = beside

    def joined(self, other: Grant) -> Grant:
        """Both together."""
        return Grant(
            self.names + other.names,
            self.keys + other.keys,
            merge(self.edits, other.edits),
            self.by_cdi + other.by_cdi,
            merge(self.beside, other.beside),
        )


def grant(
    wish: Optional[Dict[str, Any]],
    engine_names: List[str],
    inventory: Inventory,
    source: str,
    look: Look,
    held: Optional[List[Lease]] = None,
) -> Grant:
    """The devices for a request (None: no GPU is asked for) and for the qualified CDI names that the engine left.

    `look` gives type, numbers, permission bits, group and PCI vendor of a device node, or raises HostError.  `held` are the leases
    that stand in the way; None: nobody keeps leases here.  Raises RequestError, CdiError, HostError, or LeaseError
    when there would be devices but for the leases.
    """
    names = list(engine_names)
    nodes: Optional[Grant] = None
    if wish is not None:
        kind = _kind(wish.get("vendor", vendors.DEFAULT.name), source)
        asked, count = wish.get("devices"), wish.get("count", 1)
        if asked is not None and "count" in wish and ("all" in asked or count != len(asked)):
            raise errors.RequestError(
                f"{source}: resources.gpu asks for {count} devices and names {len(asked)}",
                "leave one of count and devices out",
            )
        if asked is not None and "prefer" in wish:
            raise errors.RequestError(
                f"{source}: resources.gpu.prefer says which devices a count takes, and these are named",
                "leave one of prefer and devices out",
            )
        if asked is None and inventory.config["gpu.allocator"] == "none":
            raise errors.RequestError(
                f'{source}: resources.gpu: an orchestrator allocates this node\'s devices (allocator = "none")',
                "name them in resources.gpu.devices",
            )
        picks = inventory.picks(kind)
        if picks or any("=" in name for name in asked or ()):
            names += (
                _counted(kind, count, picks, inventory, source, held, wish.get("prefer", ""))
                if asked is None
                else _named(kind, asked, inventory)
            )
        else:
            nodes = _from_nodes(kind, asked, count, inventory, source, look, held)
    found = _from_cdi(names, inventory, source, held)
    return found if nodes is None else found.joined(nodes)


def weighed(grant: Grant, inventory: Inventory) -> Tuple[int, List[str]]:
    """How many GPUs a grant comes to, and the names that stand, each alone, for every GPU of their kind of which there is
    more than one.  A device of a CDI file may hold several GPUs that the file does not describe singly: of the vendors
    that are known here their own nodes are counted."""
    count, every = len(grant.names) - len(grant.by_cdi), []
    single = len(grant.keys) == len(grant.names)
    for name in grant.by_cdi:
        found = inventory.lookup(name)
        if single and found and len(found[2]) < 2:
            count += 1
            continue
        kind = name.partition("=")[0]
        prefix = "".join(vendors.of_kind(kind).gpu_nodes[:1]).partition("{")[0]
        nodes = (
            [edit[1] for edit in found[2] if edit[0] == DEVICE and edit[1].startswith(prefix)]
            if found and prefix
            else []
        )
        if len(nodes) > 1:  # nvidia0 and its like, not nvidiactl
            nodes = [path for path in nodes if path[len(prefix) :].isdigit()]
        own = max(len(inventory.key(name)), len(nodes))
        count += own
        if own > 1 and own >= len(inventory.picks(kind)):
            every.append(name)
    return count, every


def numbers(kinds: Iterable[str], inventory: Inventory, look: Look) -> Dict[str, str]:
    """The device numbers (c195:0) of all GPUs of some kinds that this node may grant, each with the GPU's name."""
    found: Dict[str, str] = {}
    for kind in kinds:
        picks = inventory.picks(kind)
        keys = {f"{kind}={pick}": inventory.key(f"{kind}={pick}") for pick in picks}
        own = vendors.of_kind(kind).gpu_nodes
        if not picks and own and inventory.config["gpu.fallback"] == "devices":
            keys = {f"{kind}={number}": [_own_key(own, number, look)] for number in _numbers_there(own, look)}
        # the key of a device without a node of its own is its name
        found.update(
            (number, name)
            for name, own_keys in keys.items()
            for key in own_keys
            for number in key.split("+")
            if number[1:2].isdigit()
        )
    return found


def again(wish: Dict[str, Any], names: List[str], engine_names: List[str]) -> Dict[str, Any]:
    """The request of a container that is restored: for the devices that it had, of which the engine brings some itself."""
    own = [name for name in names if name not in engine_names]
    if not own:
        return wish
    name = wish.get("vendor", vendors.DEFAULT.name)
    vendor = vendors.by_name(name)
    kind = name if vendor is None else vendor.kind
    return {
        **{key: value for key, value in wish.items() if key not in ("count", "prefer")},
        "devices": [name.partition("=")[2] if name.partition("=")[0] == kind else name for name in own],
    }


def _kind(name: str, source: str) -> str:
    """The CDI kind that resources.gpu.vendor means: that of a vendor, or itself."""
    vendor = vendors.by_name(name)
    if vendor is not None and vendor.gpu_nodes:
        return vendor.kind
    if "/" in name:
        return name
    known = ", ".join(each for vendor in vendors.with_gpus() for each in vendor.names)
    raise errors.RequestError(
        f"{source}: resources.gpu.vendor: unknown vendor {name!r}",
        f"known: {known}, or a CDI kind such as example.com/gpu",
    )


# --- through CDI ----------------------------------------------------------------------------------------------


def _counted(
    kind: str, count: int, picks: List[str], inventory: Inventory, source: str, held: Optional[List[Lease]], prefer: str
) -> List[str]:
    """The first `count` devices of a kind, or of those that are free, where `prefer` says so those that are neighbours."""
    names = [f"{kind}={device}" for device in picks]
    if count > len(names):
        raise errors.RequestError(
            f"{source}: resources.gpu asks for {count} devices of {kind}; this node has {len(names)}",
            f"they are {', '.join(names)}",
        )
    if held:
        names = _free([(name, inventory.key(name)) for name in names], count, kind, source, held)
    if prefer and held is not None:
        from shim.gpu import neighbours

        free = {name.partition("=")[2] for name in names}
        places = [place for place, pick in enumerate(picks) if pick in free]
        return [f"{kind}={picks[place]}" for place in neighbours.choose(places, count, prefer, inventory.near(kind))]
    return names[:count]


def _free(devices: List[Tuple[str, List[str]]], count: int, kind: str, source: str, held: List[Lease]) -> List[str]:
    """The names of the devices that no lease stands in the way of.  Raises LeaseError when they are fewer than `count`."""
    from shim.state import leases

    free = []
    holders: List[str] = []
    for name, keys in devices:
        lease = leases.holder(keys, held)
        if lease is None:
            free.append(name)
        elif leases.words(lease) not in holders:
            holders.append(leases.words(lease))
    if len(free) < count:
        raise errors.LeaseError(
            f"{source}: resources.gpu asks for {count} devices of {kind}; {len(free)} of {len(devices)} "
            f"are free: {'; '.join(holders)}",
            "end one of these containers, or run `chandler leases`",
        )
    return free


def _named(kind: str, asked: List[str], inventory: Inventory) -> List[str]:
    """The qualified names of `devices`; `all` is the device of that name, or every device where there is none."""
    names: List[str] = []
    for device in asked:
        if "=" in device:
            names.append(device)
        elif device == "all" and inventory.lookup(f"{kind}=all") is None:
            names.extend(f"{kind}={each}" for each in inventory.picks(kind))
        else:
            names.append(f"{kind}={device}")
    return names


def _from_cdi(names: List[str], inventory: Inventory, source: str, held: Optional[List[Lease]]) -> Grant:
    keys: List[str] = []
    per_kind: Dict[str, int] = {}
    for name in names:
        kind = cdi_names.kind(name)
        if inventory.lookup(name) is None:
            inventory.explain_missing([each for each in names if inventory.lookup(each) is None])
        own = inventory.key(name)
        if any(key in keys for key in own):
            raise errors.RequestError(
                f"{source}: {name} is a device that another of the names asked for stands for, too",
                "name each device once",
            )
        _check_free(name, own, source, held)
        keys += own
        per_kind[kind] = per_kind.get(kind, 0) + len(own)
    edits = cdi_resolve.resolve(names, inventory.lookup)
    set_by_cdi = {edit[1] for edit in edits.items if edit[0] == ENV}
    visible = Edits(
        [edit for kind, number in per_kind.items() for edit in _visibility(kind, number) if edit[1] not in set_by_cdi]
    )
    return Grant(names, keys, edits.beside(visible), names, visible)


def _check_free(name: str, keys: List[str], source: str, held: Optional[List[Lease]]) -> None:
    if not held:
        return
    from shim.state import leases

    lease = leases.holder(keys, held)
    if lease is not None:
        raise errors.LeaseError(
            f"{source}: {name} is not free: {leases.words(lease)}", "end that container, or run `chandler leases`"
        )


def _visibility(kind: str, count: int) -> List[Edit]:
    """The vendor's variables: inside the container its devices are numbered from 0, whatever they are outside."""
    listed = ",".join(str(number) for number in range(count))
    return [(ENV, variable, listed, f"vendor table, {kind}") for variable in vendors.of_kind(kind).variables]


# --- without CDI ----------------------------------------------------------------------------------------------


def _from_nodes(
    kind: str, asked: Any, count: int, inventory: Inventory, source: str, look: Look, held: Optional[List[Lease]]
) -> Grant:
    """The vendor's own device nodes, for a host without a CDI file for the kind."""
    vendor = vendors.of_kind(kind)
    own = vendor.gpu_nodes
    if inventory.config["gpu.fallback"] != "devices" or not own or inventory.problems:
        inventory.explain_missing([f"{kind}={device}" for device in asked or ("0",)])
    if asked is not None:
        numbers = [_device_number(device, kind, source) for device in asked]
    elif held:
        there = _numbers_there(own, look)
        free = _free(
            [(str(number), [_own_key(own, number, look)]) for number in there],
            min(count, len(there)),
            kind,
            source,
            held,
        )
        numbers = [int(name) for name in free[:count]] + list(range(len(there), count))
    else:
        numbers = list(range(count))
    if len(set(numbers)) != len(numbers):
        raise errors.RequestError(f"{source}: resources.gpu.devices names one device twice")
    origin = f"vendor table, {kind}"
    edits: List[Edit] = []
    keys: List[str] = []
    try:
        for path in vendor.control_nodes:
            edits.extend(_node(path, origin, look))
        for number in numbers:
            for template in own:
                edits.extend(_node(template.format(number, 128 + number), origin, look, vendor.pci))
            keys.append(_own_key(own, number, look))
            _check_free(f"{kind}={number}", keys[-1:], source, held)
    except errors.HostError as error:
        raise errors.HostError(
            f"{source}: resources.gpu asks for {len(numbers)} devices of {kind}, but {error.what}, and no CDI "
            f"file describes {kind}",
            f"load the driver with `{vendor.load}`, or give the node a CDI file with `chandler cdi generate`",
        ) from None
    names = [f"{kind}={number}" for number in numbers]
    made = Edits(edits + _visibility(kind, len(numbers)))
    return Grant(names, keys, made, [], made)


def _own_key(own: Tuple[str, ...], number: int, look: Look) -> str:
    """The physical key of a GPU from its own nodes, as a CDI file with the same nodes would give it."""
    parts = []
    for template in own:
        kind, major, minor, _, _, _ = look(template.format(number, 128 + number))
        parts.append(f"{kind}{major}:{minor}")
    return "+".join(sorted(parts))


def _numbers_there(own: Tuple[str, ...], look: Look) -> List[int]:
    """The numbers, from 0 without a gap, of the GPUs whose nodes are on the host."""
    numbers: List[int] = []
    while True:
        try:
            _own_key(own, len(numbers), look)
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


def _node(path: str, origin: str, look: Look, vendor: str = "") -> List[Edit]:
    """A node as the host has it, and its group where others may not open it (/dev/dri and /dev/kfd).

    Raises HostError when it is another vendor's, as far as the host says.
    """
    kind, major, minor, mode, group, found = look(path)
    if vendor and found and found != vendor:
        raise errors.HostError(f"{path} is a device of the PCI vendor {found}, not {vendor}")
    node = {"path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode}
    if not group or mode & 0o006 == 0o006 or mode & 0o060 != 0o060:
        return [(DEVICE, path, node, origin)]
    return [(DEVICE, path, {**node, "gid": group}, origin), (GID, group, None, origin)]
