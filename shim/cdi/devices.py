"""Which device names mean the same piece of hardware, and which to take when only a number is asked for.

Our own rules; CDI says nothing about it.  Plain data in and out, `{name: key}`, so that any index can use it.
"""

from __future__ import annotations

from shim.errors import ChandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, Sequence, Set, Tuple

    from shim.edits import Stat

    Key = Tuple[str, ...]


class Identities:
    """What the device nodes of one file are on the host: `sets`, those of each device; `shared`, what all of these
    have; `common`, those of the file's own edits, which every container with one of its devices gets."""

    __slots__ = ("sets", "shared", "common")

    def __init__(
        self, nodes: Mapping[str, Sequence[Mapping[str, Any]]], stat: Stat, common: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.sets = {name: frozenset(identity(node, stat) for node in own) for name, own in nodes.items()}
        self.common = frozenset(identity(node, stat) for node in common)
        if not any(self.sets.values()):
            self.sets = dict.fromkeys(self.sets, self.common)  # one piece of hardware under several names
        self.shared: FrozenSet[str] = frozenset.intersection(*self.sets.values()) if self.sets else frozenset()

    def telling(self) -> FrozenSet[str]:
        """What tells the devices of this file apart; nothing in a file with one device."""
        return frozenset().union(*self.sets.values()) - self.shared if len(self.sets) > 1 else frozenset()

    def brought(self, telling: FrozenSet[str]) -> List[str]:
        """What every device of the file brings of that which tells devices apart, in this file or in any
        (`telling`)."""
        return sorted(self.common & (telling | self.telling()))

    def keys(self, telling: FrozenSet[str] = frozenset()) -> Dict[str, Key]:
        """The physical key of each device: the sorted set of its nodes, less what every device of the file shares; if
        that leaves nothing, the whole set; without nodes, the name itself.  Equal keys mean one physical device.

        `telling`: what tells devices apart in any file.  A GPU that is part of every device of a file is no node that
        all GPUs share.
        """
        common = self.shared - telling
        return {name: tuple(sorted(own - common or own)) or (name,) for name, own in self.sets.items()}


def device_keys(nodes: Mapping[str, Sequence[Mapping[str, Any]]], stat: Stat) -> Dict[str, Key]:
    """The physical key of each device of one file that is alone, from the device nodes of each."""
    return Identities(nodes, stat).keys()


def identity(node: Mapping[str, Any], stat: Stat) -> str:
    """`c195:0` where the numbers are known, else the path on the host."""
    path: str = node.get("hostPath") or node["path"]
    kind, major, minor = node.get("type", ""), node.get("major", 0), node.get("minor", 0)
    if not (kind and major):
        try:
            found = stat(path)
        except ChandlerError:  # not there, or not a device: the path still tells nodes apart
            found = None
        if found is None or found[0] not in "bc":
            return path
        kind = found[0]
        major, minor = (major, minor) if major else found[1:3]
    return f"{'c' if kind == 'u' else kind}{major}:{minor}"


class Sets:
    """Sets that can be asked for those that share an element, without looking at all of them."""

    def __init__(self) -> None:
        self.holders: Dict[str, List[FrozenSet[str]]] = {}

    def add(self, one: FrozenSet[str]) -> None:
        for element in one:
            self.holders.setdefault(element, []).append(one)

    def near(self, one: FrozenSet[str]) -> Set[FrozenSet[str]]:
        return {other for element in one for other in self.holders.get(element, ())}


def aggregates(keys: Iterable[Key]) -> Set[Key]:
    """The keys that stand for several devices (`all`): strict supersets of at least two disjoint others."""
    wholes = {frozenset(key): key for key in keys}
    sets = Sets()
    for one in wholes:
        sets.add(one)
    return {
        key
        for whole, key in wholes.items()
        if len(whole) > 1 and _any_disjoint([part for part in sets.near(whole) if part < whole])
    }


def smallest(keys: Iterable[Key]) -> Sets:
    """Those of some keys of which no other is a part."""
    every, found = Sets(), Sets()
    wholes = {frozenset(key) for key in keys}
    for one in wholes:
        every.add(one)
    for one in wholes:
        if not any(part < one for part in every.near(one)):
            found.add(one)
    return found


def _any_disjoint(parts: List[FrozenSet[str]]) -> bool:
    return any(not one & other for index, one in enumerate(parts) for other in parts[:index])


def groups(keys: Mapping[str, Key]) -> List[Tuple[Key, List[str]]]:
    """Each physical key with its names, the best name first, in the order in which `pick` takes them."""
    found: Dict[Key, List[str]] = {}
    for name in sorted(keys, key=natural):
        found.setdefault(keys[name], []).append(name)
    return list(found.items())


def pick(keys: Mapping[str, Key], count: int) -> List[str]:
    """The names of the first `count` different physical devices, fewer if there are not so many.

    Index-like names come first, in natural order.  An aggregate is never taken, nor a device that is a part of
    one already taken, or has one as its part.
    """
    skipped = aggregates(keys.values())
    taken = Sets()
    names: List[str] = []
    for key, alike in groups(keys):
        if len(names) >= count:
            break
        own = frozenset(key)
        if key not in skipped and not any(own <= other or other <= own for other in taken.near(own)):
            taken.add(own)
            names.append(alike[0])
    return names


def natural(name: str) -> Tuple[bool, Tuple[int, ...], str]:
    """A sort key: names like 0, 10, gpu0, 0:1, mig0:1 or card0 by their numbers, then all others by spelling."""
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    parts = digits.split(":")
    if name.isascii() and all(part.isdigit() and len(part) <= 9 for part in parts):
        return False, tuple(int(part) for part in parts), name
    return True, (), name
