"""Edits: everything that a source wants changed in a container, as one value.

An Edit is a tuple (kind, key, value, origin).  An Edits is an ordered, normalised tuple of them; of two with
the same kind and key the later one wins.  Laws, held by property tests: EMPTY is the identity of `merge`;
merge is associative; inputs are never changed.  Interpreters (oci, nri, explain) give the kinds their meaning.

Values are plain JSON values and are shared, never copied: whoever changes one makes a copy first.
Part of the create path: no imports.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, Tuple

    Edit = Tuple[str, Any, Any, str]
    # path -> (type c|b|p, major, minor, permission bits), or HostError: there is no device node
    Stat = Callable[[str], Tuple[str, int, int, int]]

# kind          key                    value
ENV = "env"  # variable name          its value, a string
DEVICE = "device"  # path in the container  a CDI deviceNode: path, hostPath, type, major, minor, fileMode,
#                        uid, gid, permissions; complete() adds what the host knows
NET_DEVICE = "netDevice"  # host interface         name in the container
MOUNT = "mount"  # destination            an OCI mount
HOOK = "hook"  # stage                  an OCI hook
RDT = "intelRdt"  # ""                     the whole OCI object
GID = "additionalGid"  # the group id           None
RESOURCE = "resource"  # (controller, key)      the OCI value under linux.resources
ANNOTATION = "annotation"  # annotation key         a string
PROCESS = "process"  # args, cwd, oomScoreAdj, noNewPrivileges, apparmorProfile   the OCI value; None takes it away
USER = "user"  # uid or gid             the number
CAPABILITY = "capability"  # the OCI set            the whole list
RLIMIT = "rlimit"  # RLIMIT_NOFILE          {"soft": …, "hard": …}
HOSTNAME = "hostname"  # ""                     the name
ROOT = "root"  # readonly               the OCI value
SYSCTL = "sysctl"  # its name with dots     a string
NAMESPACE = "namespace"  # its type               a path, "" for a new one, None for the host's
LINUX = "linux"  # cgroupsPath, maskedPaths, readonlyPaths, seccomp…          the OCI value; None takes it away
HUGEPAGES = "hugepages"  # size of a page, 2MB    the limit in bytes
DEVICE_RULE = "deviceRule"  # any text               an OCI rule of linux.resources.devices

LEASE = "lease"  # the origin of the hook that ends a lease: it comes before all others of its stage

# How a later edit of one kind and key meets an earlier one.  Most keep the first place and take the last value,
# as a variable set twice does.  A mount is taken out and put at the end, since the order of mounts matters.
# Every device stays, because each gives its cgroup rule (the interpreter lets the later node of a path win), and
# every hook, because two equal hooks may be meant.
_EVERY = frozenset((DEVICE, HOOK))


class Edits:
    """An ordered set of edits; `items` is the tuple of (kind, key, value, origin)."""

    __slots__ = ("items",)

    def __init__(self, items: Iterable[Edit] = ()) -> None:
        kept: Dict[Any, Edit] = {}
        for number, item in enumerate(items):
            kind = item[0]
            place: Any = number if kind in _EVERY else (kind, item[1])
            if kind == MOUNT:
                kept.pop(place, None)
            kept[place] = item
        self.items: Tuple[Edit, ...] = tuple(kept.values())

    def with_values(self, items: Iterable[Edit]) -> Edits:
        """The same edits with other values: kinds, keys and order are as they were, so there is nothing to put right."""
        result = Edits()
        result.items = tuple(items)
        return result

    def beside(self, others: Edits) -> Edits:
        """These, then others that have no kind and key in common with them, so that there is nothing to put right."""
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
    """All edits of all parts in order; a later one wins over an earlier one of the same kind and key."""
    full = [part for part in parts if part.items]
    if len(full) == 1:
        return full[0]
    return Edits([item for part in full for item in part.items])
