"""`resources.*` of a request as edits of linux.resources.  Pure; part of the create path.

Units: cpu in thousandths of a CPU, memory in bytes (shim.request.parse).  Source: OCI runtime specification,
"Control groups"; sched-bwc for the quota's floor.
"""

from __future__ import annotations

from shim.edits import RESOURCE, Edits
from shim.oci import reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

    from shim.edits import Edit

_MIN_QUOTA = 1000  # microseconds: the kernel refuses less
_PLAIN = {
    "cpu_shares": ("cpu", "shares"),
    "cpuset": ("cpu", "cpus"),
    "memory": ("memory", "limit"),
    "memory_swap": ("memory", "swap"),
    "memory_reservation": ("memory", "reservation"),
    "pids_limit": ("pids", "limit"),
}


def edits(wish: Dict[str, Any], document: Dict[str, Any], origin: str) -> Edits:
    """The edits for a request's resources, given what the engine has set already."""
    items: List[Edit] = []
    for key, value in wish.items():
        if key in _PLAIN:
            items.append((RESOURCE, _PLAIN[key], value, origin))
    if "cpu" in wish:
        period = reader.resource(document, "cpu", "period") or reader.CPU_PERIOD
        items.append((RESOURCE, ("cpu", "period"), period, origin))
        items.append((RESOURCE, ("cpu", "quota"), max(wish["cpu"] * period // 1000, _MIN_QUOTA), origin))
    if "memory" in wish and "memory_swap" not in wish:
        limit, swap = (reader.resource(document, "memory", key) for key in ("limit", "swap"))
        if type(limit) is int and type(swap) is int and 0 < limit <= swap:
            # OCI's swap is memory and swap together: a lower memory limit must not become more room to swap
            items.append((RESOURCE, ("memory", "swap"), wish["memory"] + swap - limit, origin))
    return Edits(items)
