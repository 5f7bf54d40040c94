"""Makes the edits of linux.resources for `resources.*` of a request.  Pure; part of the create path.

Units: cpu in thousandths of a CPU, memory in bytes (shim.request.schema).  Source: OCI runtime spec, config-linux.md,
"Control groups"; Documentation/scheduler/sched-bwc.rst for the smallest quota.
"""

from __future__ import annotations

from shim.edits import RESOURCE, Edits
from shim.oci import reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

    from shim.edits import Edit
    from shim.shapes import Document

_MIN_QUOTA = 1000  # microseconds: the kernel refuses less
# key of the request: (controller, key), for values that are taken as they are
_PLAIN = {
    "cpu_shares": ("cpu", "shares"),
    "cpuset": ("cpu", "cpus"),
    "memory": ("memory", "limit"),
    "memory_swap": ("memory", "swap"),
    "memory_reservation": ("memory", "reservation"),
    "pids_limit": ("pids", "limit"),
}


def edits(request: Document, document: Document, origin: str) -> Edits:
    """The edits for `request`, the resources of a request.  `document`: config.json, with what the engine has set."""
    items: List[Edit] = []
    for key, value in request.items():
        if key in _PLAIN:
            items.append((RESOURCE, _PLAIN[key], value, origin))
    if "cpu" in request:
        period = reader.resource(document, "cpu", "period") or reader.CPU_PERIOD
        items.append((RESOURCE, ("cpu", "period"), period, origin))
        items.append((RESOURCE, ("cpu", "quota"), max(request["cpu"] * period // 1000, _MIN_QUOTA), origin))
    if "memory" in request and "memory_swap" not in request:
        limit, swap = (reader.resource(document, "memory", key) for key in ("limit", "swap"))
        if type(limit) is int and type(swap) is int and 0 < limit <= swap:
            # OCI's swap is memory and swap together: with a lower memory limit and the same sum, more could be swapped
            items.append((RESOURCE, ("memory", "swap"), request["memory"] + swap - limit, origin))
    return Edits(items)
