"""Prepares the devices of a container in a user namespace, where a runtime cannot make device nodes.

There the runtime bind-mounts the host's node of the same path, whatever device that is.  So a device whose node has
another path on the host becomes a mount.  A node that is missing on the host, or has other numbers than the CDI file
says, is refused.
Source: runc, libcontainer/rootfs_linux.go (createDeviceNode); crun, src/libcrun/linux.c (create_missing_devs).
"""

from __future__ import annotations

from shim import errors
from shim.edits import DEVICE, DEVICE_RULE, MOUNT, Edits
from shim.host import device_nodes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.edits import DeviceNode, Edit, Mount

_OPTIONS = ["bind", "rw", "nosuid", "noexec"]


def split(edits: Edits) -> tuple[Edits, Edits]:
    """Takes out the devices whose node has another path on the host.

    Returns (the other edits, the mounts and device rules that replace the devices).  Edits must be complete
    (host.complete).  Raises HostError, which names the node and where its edit came from, when the host lacks that
    device.
    """
    rest: list[Edit] = []
    replacements: list[Edit] = []
    node: DeviceNode
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
        mount: Mount = {"destination": path, "type": "bind", "source": source, "options": _OPTIONS}
        replacements.append((MOUNT, path, mount, origin))
        access = node.get("permissions") or "rwm"
        if node["type"] != "p" and access != "none":
            kind, major, minor = _numbers(node)
            replacements.append(
                (
                    DEVICE_RULE,
                    f"{kind} {major}:{minor} {access}",
                    {"allow": True, "type": kind, "major": major, "minor": minor, "access": access},
                    origin,
                )
            )
    return Edits(rest), Edits(replacements)


def _check(source: str, node: DeviceNode, origin: str) -> None:
    """Raises HostError unless `source` on the host is the device that the edit's node says."""
    try:
        kind, major, minor, _ = device_nodes.lstat_device(source)
    except errors.HostError as error:
        raise errors.HostError(
            f"{origin}: {error.what}, and in a user namespace no device can be made",
            "load the driver, or run the container as root without a user namespace",
        ) from None
    wanted = _numbers(node)
    actual = _numbers({"type": kind, "major": major, "minor": minor})
    if actual != wanted:
        raise errors.HostError(
            f"{origin}: {source} is {_words(actual)} on this host, not {_words(wanted)}, and in a user namespace "
            "no device can be made",
            "`chandler cdi diff` shows whether the CDI file is out of date",
        )


def _numbers(node: DeviceNode) -> tuple[str, int, int]:
    """(type, major, minor) of a node; a FIFO has the numbers 0."""
    if node["type"] == "p":
        return "p", 0, 0
    return node["type"], node.get("major", 0), node.get("minor", 0)


def _words(numbers: tuple[str, int, int]) -> str:
    return "{} {}:{}".format(*numbers)
