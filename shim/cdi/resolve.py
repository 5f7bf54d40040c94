"""Turns qualified CDI device names into Edits.

Source: CDI SPEC.md, "OCI Edits" and "Error Handling"; CDI Go library 1.1.2, pkg/cdi/cache.go (InjectDevices).
Part of the create path: imports only shim.errors and shim.edits.
"""

from __future__ import annotations

from shim import errors
from shim.edits import NET_DEVICE, Edits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

    from shim.edits import Edit

    # name -> (an id of its file, the file's own edits, the device's edits); None for an unknown device
    Lookup = Callable[[str], Optional[Tuple[Any, Tuple[Edit, ...], Tuple[Edit, ...]]]]


def resolve(names: Iterable[str], lookup: Lookup) -> Edits:
    """The edits of all devices, in the order of `names`.

    A file's own edits come once, before those of its first device.  A repeated name counts once.  Raises CdiError,
    which names every device that `lookup` does not know, or two network devices that exclude each other.
    """
    entries = [(name, lookup(name)) for name in dict.fromkeys(names)]
    missing = [name for name, entry in entries if entry is None]
    if missing:
        raise unresolvable(missing)
    items: List[Edit] = []
    seen = set()
    for _, entry in entries:
        if entry is None:
            continue
        file, file_edits, device_edits = entry
        if file not in seen:
            seen.add(file)
            items += file_edits
        items += device_edits
    _check_net_devices([item for item in items if item[0] == NET_DEVICE])
    return Edits(items)


def _check_net_devices(items: List[Edit]) -> None:
    """Raises CdiError when two interfaces of the host get one name in the container, or one interface gets two names.

    The kernel would refuse the second change; the CDI Go library refuses before it changes anything.  Unlike that
    library we accept the same change from two devices, as for every other kind of edit.
    """
    names: Dict[str, Edit] = {}
    hosts: Dict[str, Edit] = {}
    for item in items:
        _, interface, name, origin = item
        other = hosts.setdefault(interface, item)
        if other[2] != name:
            raise errors.CdiError(
                f"the network interface {interface} cannot be both {other[2]} ({other[3]}) and {name} ({origin}) "
                "in one container",
                "ask for one of the two devices",
            )
        other = names.setdefault(name, item)
        if other[1] != interface:
            raise errors.CdiError(
                f"the network interfaces {other[1]} ({other[3]}) and {interface} ({origin}) cannot both be {name} "
                "in one container",
                "ask for one of the two devices",
            )


def unresolvable(missing: Iterable[str], why: str = "", todo: str = "") -> errors.CdiError:
    """The error for names that no file defines; `why` are the reasons, where they are known."""
    names = ", ".join(name or '""' for name in missing)
    return errors.CdiError(f"unresolvable CDI devices {names}" + (f" ({why})" if why else ""), todo)
