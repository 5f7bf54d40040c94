"""What a CDI file claims of its host, compared with the host.  Part of the create path."""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import HOOK, MOUNT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.edits import Edits


def check_paths(edits: Edits) -> None:
    """What is to be mounted or run as a hook must be on the host; a driver upgrade leaves CDI files that name others.

    Raises HostError with the path and the file that asks for it.
    """
    there, mode = posix.access, posix.F_OK  # for some sixty libraries
    for kind, key, value, origin in edits.items:
        if kind == MOUNT:
            path = value.get("source", "")
        elif kind == HOOK:
            path = value["path"]
        else:
            continue
        try:
            missing = path.startswith("/") and not there(path, mode)
        except ValueError:  # a NUL in it
            missing = True
        if missing:
            what = f"the hook {path}" if kind == HOOK else f"the host path {path} (for {key})"
            from shim.generate import driver_version

            raise errors.HostError(f"{origin}: {what} does not exist", driver_version.remedy(path))
