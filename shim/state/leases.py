"""Leases: which container holds which physical device.  Values and rules; the ledger keeps them.

A device's key is made of device numbers (`c195:0`, or several joined by `+`).  Two keys stand in each other's way
when one has all the numbers of the other: a device and itself, a MIG device or partition and its parent, but not two
partitions of one parent.  A device that is shared, by MPS or time-slicing, is shared whole: with the containers that
share it in the same way (shim.sharing.terms), and with no other.  Pure; part of the create path where the
configuration says `allocator = "leases"`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterable, List, Optional

    # token; owner ("oci" or "nri"); id; oci: root, runtime, pid and started of the wrapper; nri: pod, and container,
    # its name there; names, keys; since (seconds since 1970); where the devices are shared: mode ("mps" or
    # "time-slice") and what must be alike among those who share (shim.sharing.terms)
    Lease = Dict[str, Any]


def clash(one: str, other: str) -> bool:
    """Whether two keys cannot be held by two containers at once."""
    if one == other:
        return True
    ours, theirs = set(one.split("+")), set(other.split("+"))
    return ours <= theirs or theirs <= ours


def holder(keys: Iterable[str], leases: List[Lease]) -> Optional[Lease]:
    """The first lease that stands in the way of any of `keys`, or None.

    One with `shares` (shim.sharing.terms.seen: the keys that whoever asks may have, too) stands in the way of parts
    of its devices, and of what they are a part of, alone.
    """
    for lease in leases:
        shares = lease.get("shares", ())
        for held in lease["keys"]:
            for key in keys:
                if clash(key, held) and not (key == held and key in shares):
                    return lease
    return None


def of_container(leases: List[Lease], owner: str, root: str, container: str) -> Optional[Lease]:
    """The lease of one container, or None."""
    for lease in leases:
        if lease["id"] == container and lease["owner"] == owner and lease.get("root", "") == root:
            return lease
    return None


def gives_way(lease: Lease, to: Lease) -> bool:
    """Whether a lease is the NRI plugin's for the container that the wrapper now creates: the plugin's answer came too
    late, or its edits did not reach the runtime, so that the wrapper does the work."""
    return bool(lease["owner"] == "nri" and to["owner"] == "oci" and lease["id"] == to["id"])


def words(lease: Lease) -> str:
    """Who holds what since when."""
    how = f" ({lease['mode']}{lease['words']})" if "mode" in lease else ""
    return f"{lease['id']} holds {', '.join(lease['names'])}{how} since {utc(lease['since'])}"


def utc(seconds: int) -> str:
    """A time in seconds since 1970 as RFC 3339, UTC; the end of the year 9999 for any later one."""
    from time import gmtime, strftime  # a refusal alone needs them

    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(min(seconds, 253402300799)))
