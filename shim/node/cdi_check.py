"""Checks that the host has what CDI edits name.  Part of the create path."""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import HOOK, MOUNT
from shim.host import device_nodes
from shim.node import inventory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.edits import Edits


def check_paths(edits: Edits) -> None:
    """Raises HostError, with the path and the CDI file, when a mount source or a hook's program does not exist.

    After a driver upgrade, CDI files still name the files of the old driver.
    """
    access, mode = posix.access, posix.F_OK  # local names are faster, and a driver has some sixty libraries
    for kind, key, value, origin in edits.items:
        if kind == MOUNT:
            path = value.get("source", "")
        elif kind == HOOK:
            path = value["path"]
        else:
            continue
        try:
            missing = path.startswith("/") and not access(path, mode)
        except ValueError:  # the path has a NUL character
            missing = True
        if missing:
            what = f"the hook {path}" if kind == HOOK else f"the host path {path} (for {key})"
            from shim.generate import driver_version

            raise errors.HostError(f"{origin}: {what} does not exist", driver_version.remedy(path))


def moved(stored: inventory.Inventory) -> bool:
    """Whether a device node has another number than when this inventory was compiled, or the inventory is out of date.

    Leases are kept by device number, so such an inventory does not tell who holds a device.
    """
    try:
        return any(
            device_nodes.moved(edit)
            for kind in stored.kinds()
            for device in stored.picks(kind)
            for edit in (stored.lookup(f"{kind}={device}") or ((), (), ()))[2]
        )
    except inventory.Stale:  # a part of it was replaced, or is damaged
        return True
