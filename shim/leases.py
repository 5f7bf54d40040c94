"""Leases: which container holds which physical device.  Values and rules; the ledger keeps them.

A device's key is made of device numbers (`c195:0`, or several joined by `+`).  Two keys stand in each other's way when
one has all the numbers of the other: a device and itself, a MIG device or partition and its parent, but not two
partitions of one parent.  Pure; part of the create path where the configuration says `allocator = "leases"`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterable, List, Optional

    # token; owner ("oci" or "nri"); id; oci: root, runtime, pid and started of the wrapper; nri: pod; names, keys;
    # since (seconds since 1970)
    Lease = Dict[str, Any]


def clash(one: str, other: str) -> bool:
    """Whether two keys cannot be held by two containers at once."""
    if one == other:
        return True
    ours, theirs = set(one.split("+")), set(other.split("+"))
    return ours <= theirs or theirs <= ours


def holder(keys: Iterable[str], leases: List[Lease]) -> Optional[Lease]:
    """The first lease that stands in the way of any of `keys`, or None."""
    for lease in leases:
        for held in lease["keys"]:
            for key in keys:
                if clash(key, held):
                    return lease
    return None


def of_container(leases: List[Lease], owner: str, root: str, container: str) -> Optional[Lease]:
    """The lease of one container, or None."""
    for lease in leases:
        if lease["id"] == container and lease["owner"] == owner and lease.get("root", "") == root:
            return lease
    return None


def words(lease: Lease) -> str:
    """Who holds what since when."""
    import time
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(lease["since"]))
    return f"{lease['id']} holds {', '.join(lease['names'])} since {since}"
