"""Devices of a container in a user namespace, where none can be made: the runtime mounts the host's own.

It takes the node of the same path, whatever that is.  So a node that lies elsewhere on the host becomes a mount, and
one that is missing, or another device than the one that was chosen, is refused.  Source: runc,
libcontainer/rootfs_linux.go (createDeviceNode); crun, src/libcrun/linux.c (create_missing_devs).
"""

from __future__ import annotations

from shim import errors
from shim.edits import DEVICE, DEVICE_RULE, MOUNT, Edits
from shim.host import device_nodes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Tuple

    from shim.edits import Edit

_OPTIONS = ["bind", "rw", "nosuid", "noexec"]


def split(edits: Edits) -> Tuple[Edits, Edits]:
    """(the edits without devices that lie elsewhere on the host, what these become).  Edits must be complete.

    Raises HostError, which names the node and where it came from.
    """
    rest: List[Edit] = []
    bound: List[Edit] = []
    for edit in edits.items:
        if edit[0] != DEVICE:
            rest.append(edit)
            continue
        _, path, node, origin = edit
        source = node.get("hostPath") or path
        _check(source, node, origin)
        if source == path:
            rest.append(edit)
            continue
        bound.append(
            (MOUNT, path, {"destination": path, "type": "bind", "source": source, "options": _OPTIONS}, origin)
        )
        access = node.get("permissions") or "rwm"
        if node["type"] != "p" and access != "none":
            kind, major, minor = _numbers(node)
            bound.append(
                (
                    DEVICE_RULE,
                    f"{kind} {major}:{minor} {access}",
                    {"allow": True, "type": kind, "major": major, "minor": minor, "access": access},
                    origin,
                )
            )
    return Edits(rest), Edits(bound)


def _check(source: str, node: Dict[str, Any], origin: str) -> None:
    try:
        kind, major, minor, _ = device_nodes.lstat_device(source)
    except errors.HostError as error:
        raise errors.HostError(
            f"{origin}: {error.what}, and in a user namespace no device can be made",
            "load the driver, or run the container as root without a user namespace",
        ) from None
    wanted = _numbers(node)
    found = _numbers({"type": kind, "major": major, "minor": minor})
    if found != wanted:
        raise errors.HostError(
            f"{origin}: {source} is {_words(found)} on this host, not {_words(wanted)}, and in a user namespace "
            "no device can be made",
            "`chandler cdi diff` shows whether the CDI file is out of date",
        )


def _numbers(node: Dict[str, Any]) -> Tuple[str, int, int]:
    """Type, major and minor, 0 for a FIFO's."""
    if node["type"] == "p":
        return "p", 0, 0
    return node["type"], node.get("major", 0), node.get("minor", 0)


def _words(numbers: Tuple[str, int, int]) -> str:
    return "{} {}:{}".format(*numbers)
