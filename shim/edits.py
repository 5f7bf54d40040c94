"""Edits: everything that a source (a CDI file, a request, the vendor table) changes in a container, as one value.

An Edit is a tuple (kind, key, value, origin); the origin names the source, for errors and for `chandler explain`.  An
Edits is an ordered, normalised tuple of them.  Of two edits with the same kind and key, the later one wins.  Property
tests check these laws: EMPTY is the identity of `merge`; `merge` is associative; inputs are never changed.
Interpreters apply the edits: shim.oci.writer, shim.nri.adjust, shim.cli.explain.

Values are plain JSON values.  They are shared and never copied, so copy one before you change it.
Part of the create path: no imports.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, Tuple, TypedDict

    class DeviceNode(TypedDict, total=False):
        """A deviceNode (CDI SPEC.md).  shim.host.device_nodes.complete adds what only the host knows."""

        path: str
        hostPath: str
        type: str  # c, b, u or p
        major: int
        minor: int
        fileMode: int
        permissions: str
        uid: int
        gid: int
        compiled: str  # see shim.host.device_nodes.COMPILED

    class Mount(TypedDict, total=False):
        """A mount (OCI runtime specification, "Mounts")."""

        destination: str
        type: str
        source: str
        options: List[str]

    class Hook(TypedDict, total=False):
        """A hook (OCI runtime specification, "POSIX-platform Hooks")."""

        path: str
        args: List[str]
        env: List[str]
        timeout: int

    # The value is a DeviceNode, Mount or Hook where the kind says so: annotate it where you take it out.
    Edit = Tuple[str, Any, Any, str]
    # path -> (type c|b|p, major, minor, permission bits); raises HostError where there is no device node
    Stat = Callable[[str], Tuple[str, int, int, int]]

# The kinds, each with its key and its value.
ENV = "env"  # the name of a variable: its value, a string
DEVICE = "device"  # path in the container: a DeviceNode
NET_DEVICE = "netDevice"  # interface of the host: its name in the container
MOUNT = "mount"  # destination: a Mount
HOOK = "hook"  # stage: a Hook
RDT = "intelRdt"  # "": the whole OCI object
GID = "additionalGid"  # the group id: None
RESOURCE = "resource"  # (controller, key): the OCI value under linux.resources
ANNOTATION = "annotation"  # the annotation's key: a string
PROCESS = "process"  # args, cwd, oomScoreAdj, noNewPrivileges, apparmorProfile: the OCI value; None removes it
USER = "user"  # uid or gid: the number
CAPABILITY = "capability"  # name of the OCI set: the whole list
RLIMIT = "rlimit"  # such as RLIMIT_NOFILE: {"soft": …, "hard": …}
HOSTNAME = "hostname"  # "": the name
ROOT = "root"  # readonly: the OCI value
SYSCTL = "sysctl"  # its name with dots: a string; None removes it
NAMESPACE = "namespace"  # its type: a path, "" for a new namespace, None for the host's
LINUX = "linux"  # cgroupsPath, maskedPaths, readonlyPaths, seccomp…: the OCI value; None removes it
HUGEPAGES = "hugepages"  # size of a page, such as 2MB: the limit in bytes
DEVICE_RULE = "deviceRule"  # any text: an OCI rule of linux.resources.devices

LEASE = "lease"  # the origin of the hook that ends a lease; this hook runs before all others of its stage

# When a later edit has the same kind and key as an earlier one, it usually takes the earlier one's place in the order,
# as a variable does that is set twice.  A later mount goes to the end, since the order of mounts matters.  Devices and
# hooks are all kept: each device gives a cgroup rule (the interpreter takes the last node of a path), and two equal
# hooks may be intended.
_EVERY = frozenset((DEVICE, HOOK))


class Edits:
    """An ordered set of edits.  `items`: a tuple of (kind, key, value, origin)."""

    __slots__ = ("items",)

    def __init__(self, items: Iterable[Edit] = ()) -> None:
        kept: Dict[Any, Edit] = {}
        for number, item in enumerate(items):
            kind = item[0]
            identity: Any = number if kind in _EVERY else (kind, item[1])
            if kind == MOUNT:
                kept.pop(identity, None)  # so that it comes last
            kept[identity] = item
        self.items: Tuple[Edit, ...] = tuple(kept.values())

    def with_values(self, items: Iterable[Edit]) -> Edits:
        """The same edits with other values.  Kinds, keys and order are the same, so they are not normalised again."""
        result = Edits()
        result.items = tuple(items)
        return result

    def followed_by(self, others: Edits) -> Edits:
        """These edits, then `others`.  The two have no kind and key in common, so they are not normalised again."""
        return self.with_values((*self.items, *others.items))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edits) and self.items == other.items

    def __hash__(self) -> int:
        raise TypeError("edits hold JSON values and are not hashable")

    def __bool__(self) -> bool:
        return bool(self.items)

    def __repr__(self) -> str:
        return f"Edits({list(self.items)!r})"

    def of(self, kind: str) -> List[Edit]:
        """The edits of one kind, in order."""
        return [item for item in self.items if item[0] == kind]


EMPTY = Edits()


def merge(*parts: Edits) -> Edits:
    """All edits of all parts in order.  A later one wins over an earlier one with the same kind and key."""
    nonempty = [part for part in parts if part.items]
    if len(nonempty) == 1:
        return nonempty[0]
    return Edits([item for part in nonempty for item in part.items])
