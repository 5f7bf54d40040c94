"""Decides which device names mean the same hardware, and which devices to take when a request gives only a count.

These are our own rules: CDI has none.  The functions take and return plain data, `{name: key}`, so that any index of
devices can use them.  A key is the set of device nodes that a device brings; devices with equal keys are one piece of
hardware.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.errors import ChandlerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.edits import DeviceNode, Stat

Key = tuple[str, ...]


class Identities:
    """The device nodes of one CDI file, as identity() names them.

    `nodes_by_name`: the nodes of each device, by device name; `shared`: the nodes that all of its devices have;
    `common`: the nodes of the file's own edits, which every container with one of its devices gets.
    """

    __slots__ = ("nodes_by_name", "shared", "common")

    def __init__(
        self, nodes: Mapping[str, Sequence[DeviceNode]], stat: Stat, common: Sequence[DeviceNode] = ()
    ) -> None:
        self.nodes_by_name = {
            name: frozenset(identity(node, stat) for node in device_nodes) for name, device_nodes in nodes.items()
        }
        self.common = frozenset(identity(node, stat) for node in common)
        if not any(self.nodes_by_name.values()):
            # No device has nodes of its own: all names mean the hardware of the file's own edits.
            self.nodes_by_name = dict.fromkeys(self.nodes_by_name, self.common)
        self.shared: frozenset[str] = (
            frozenset.intersection(*self.nodes_by_name.values()) if self.nodes_by_name else frozenset()
        )

    def distinguishing(self) -> frozenset[str]:
        """The nodes that some devices of this file have and others have not; empty for a file with one device."""
        return (
            frozenset().union(*self.nodes_by_name.values()) - self.shared
            if len(self.nodes_by_name) > 1
            else frozenset()
        )

    def leased_with_file(self, distinguishing: frozenset[str]) -> list[str]:
        """The nodes of the file's own edits that tell devices apart, in this file or in any (`distinguishing`), sorted.

        Every container with a device of this file gets these nodes.
        """
        return sorted(self.common & (distinguishing | self.distinguishing()))

    def keys(self, distinguishing: frozenset[str] = frozenset()) -> dict[str, Key]:
        """The physical key of each device, by name.  Equal keys mean one physical device.

        The key is the sorted nodes of the device without those that all devices of the file share; if no node is left,
        all of its nodes; without nodes, its name.  `distinguishing`: the nodes that tell devices apart in any file.
        These stay in the key even where all devices of this file share them: such a node is a GPU that each of the
        devices includes, not a node that all GPUs need.
        """
        common = self.shared - distinguishing
        return {name: tuple(sorted(nodes - common or nodes)) or (name,) for name, nodes in self.nodes_by_name.items()}


def device_keys(nodes: Mapping[str, Sequence[DeviceNode]], stat: Stat) -> dict[str, Key]:
    """The physical key of each device of a file, without regard to other files.  `nodes`: device name to CDI nodes."""
    return Identities(nodes, stat).keys()


def identity(node: DeviceNode, stat: Stat) -> str:
    """What a CDI device node is on the host: its number (c195:0) where known, otherwise its path on the host.

    The type and numbers in the node count before those of the host.
    """
    path: str = node.get("hostPath") or node["path"]
    kind, major, minor = node.get("type", ""), node.get("major", 0), node.get("minor", 0)
    if not (kind and major):
        try:
            status = stat(path)
        except ChandlerError:  # missing, or not a device: the path still tells nodes apart
            status = None
        if status is None or status[0] not in "bc":
            return path
        kind = status[0]
        major, minor = (major, minor) if major else status[1:3]
    return f"{'c' if kind == 'u' else kind}{major}:{minor}"


class OverlapIndex:
    """A collection of sets.  It finds the sets that overlap a given one without comparing that with all of them."""

    def __init__(self) -> None:
        self.holders: dict[str, list[frozenset[str]]] = {}  # element -> the sets that hold it

    def add(self, members: frozenset[str]) -> None:
        """Adds a set to the collection."""
        for element in members:
            self.holders.setdefault(element, []).append(members)

    def overlapping(self, members: frozenset[str]) -> set[frozenset[str]]:
        """The sets of the collection that share an element with `members`."""
        return {other for element in members for other in self.holders.get(element, ())}


def aggregates(keys: Iterable[Key]) -> set[Key]:
    """The keys that stand for several devices (such as `all`): strict supersets of at least two disjoint keys."""
    wholes = {frozenset(key): key for key in keys}
    index = OverlapIndex()
    for whole in wholes:
        index.add(whole)
    return {
        key
        for whole, key in wholes.items()
        if len(whole) > 1 and _any_disjoint([part for part in index.overlapping(whole) if part < whole])
    }


def smallest(keys: Iterable[Key]) -> OverlapIndex:
    """The keys, as sets, that have no other key as a strict subset."""
    every, minimal = OverlapIndex(), OverlapIndex()
    wholes = {frozenset(key) for key in keys}
    for whole in wholes:
        every.add(whole)
    for whole in wholes:
        if not any(part < whole for part in every.overlapping(whole)):
            minimal.add(whole)
    return minimal


def _any_disjoint(parts: list[frozenset[str]]) -> bool:
    return any(not part & other for index, part in enumerate(parts) for other in parts[:index])


def groups(keys: Mapping[str, Key]) -> list[tuple[Key, list[str]]]:
    """Each physical key with its names.  Names and keys are in the order of `natural`, in which `pick` takes them."""
    names: dict[Key, list[str]] = {}
    for name in sorted(keys, key=natural):
        names.setdefault(keys[name], []).append(name)
    return list(names.items())


def pick(keys: Mapping[str, Key], count: int) -> list[str]:
    """The names of the first `count` physical devices; fewer if there are not as many.

    Names that are indexes come first, in natural order.  Never takes an aggregate, nor a device that includes, or is
    part of, one already taken (a GPU and its MIG devices).
    """
    skipped = aggregates(keys.values())
    taken = OverlapIndex()
    names: list[str] = []
    for key, alike in groups(keys):
        if len(names) >= count:
            break
        nodes = frozenset(key)
        if key not in skipped and not any(nodes <= other or other <= nodes for other in taken.overlapping(nodes)):
            taken.add(nodes)
            names.append(alike[0])
    return names


def natural(name: str) -> tuple[bool, tuple[int, ...], str]:
    """A sort key: names such as 0, 10, gpu0, 0:1, mig0:1 and card0 by number, then all others alphabetically."""
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    parts = digits.split(":")
    if name.isascii() and all(part.isdigit() and len(part) <= 9 for part in parts):
        return False, tuple(int(part) for part in parts), name
    return True, (), name
