"""Device nodes of the host, and what edits leave open about them.

`complete` takes the function that looks at the host, so tests need no device nodes.  Part of the create path: no os,
no stat.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import DEVICE, Edits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Tuple

    from shim.edits import DeviceNode, Edit, Stat

_TYPES = {0o020000: "c", 0o060000: "b", 0o010000: "p"}
_FORMAT = 0o170000
# The key in a device node's edit that says which device it was when the inventory was compiled (such as c195:0).
COMPILED: Final = "compiled"


def lstat_device(path: str) -> Tuple[str, int, int, int]:
    """(type, major, minor, permission bits) of a device node or FIFO; links are not followed.

    Raises HostError when there is no such node.
    """
    try:
        status = posix.lstat(path)
    except FileNotFoundError:
        # Not the system's text ("No such file or directory"): podman takes that for a command that was not found.
        raise errors.HostError(f"{path} is not on this host") from None
    except (OSError, ValueError) as error:
        raise errors.HostError(f"{path} cannot be looked at ({getattr(error, 'strerror', error)})") from None
    kind = _TYPES.get(status.st_mode & _FORMAT)
    if kind is None:
        raise errors.HostError(f"{path} is not a device node")
    rdev = status.st_rdev
    return kind, posix.major(rdev), posix.minor(rdev), status.st_mode & 0o777


def is_certain(node: DeviceNode) -> bool:
    """Whether a CDI file says which device a node is, so that the host's node need not be looked at."""
    return bool(node.get("type")) and (bool(node.get("major")) or node["type"] == "p")


def complete(edits: Edits, lstat: Stat = lstat_device) -> Edits:
    """The edits with the missing type, numbers and permission bits of device nodes filled in from the host.

    A node with a type and a major number is taken as it is, so it can be injected even if the host does not have it.
    For any other, the host must have a node of the same type.  The owner is never taken from the host.
    Raises HostError, with the node and its origin, and ChangedError when the node has become another device since the
    CDI files were read.
    Source: CDI Go library, pkg/cdi/container-edits_unix.go (DeviceNode.fillMissingInfo).
    """
    return edits.with_values([_complete(edit, lstat) if edit[0] == DEVICE else edit for edit in edits.items])


def _complete(edit: Edit, lstat: Stat) -> Edit:
    node: DeviceNode
    kind, path, node, origin = edit
    declared = node.get("type")
    certain = is_certain(node)
    if certain and node.get("fileMode") is not None:
        return edit
    source = node.get("hostPath") or path
    try:
        actual, major, minor, mode = lstat(source)
    except errors.HostError as error:
        if certain:
            return edit
        raise error.within(origin) from None
    node = node.copy()
    if node.get("fileMode") is None:
        node["fileMode"] = mode
    if not certain:
        if not declared:
            node["type"] = actual
        elif declared != actual:
            raise errors.HostError(f"{origin}: {source} is a device of type {actual!r}, not {declared!r}")
        if not node.get("major") and actual != "p":
            node["major"], node["minor"] = major, minor
        compiled = node.pop(COMPILED, None)
        if compiled is not None and actual != "p" and compiled != f"{actual}{node['major']}:{node['minor']}":
            raise errors.ChangedError(
                f"{origin}: {source} is another device than when the CDI files were read", "run `chandler refresh`"
            )
    return kind, path, node, origin


def moved(edit: Edit) -> bool:
    """Whether the device node of an edit has another number than when the CDI files were read, or is gone."""
    kind, path, node, _ = edit
    if kind != DEVICE or COMPILED not in node:
        return False
    try:
        actual, major, minor, _ = lstat_device(node.get("hostPath") or path)
    except errors.HostError:
        return True
    return bool(node[COMPILED] != f"{actual}{major}:{minor}")


def read_node(path: str) -> Tuple[str, int, int, int, int]:
    """(type, major, minor, permission bits, group) of a device node.  Raises HostError."""
    return (*lstat_device(path), posix.lstat(path).st_gid)


def read_gpu_node(path: str) -> Tuple[str, int, int, int, int, str]:
    """What `read_node` gives for a device node, and its PCI vendor (`0x10de`) or ''.  Raises HostError."""
    node = read_node(path)
    return (*node, _pci_vendor(node[1], node[2]))


def _pci_vendor(major: int, minor: int) -> str:
    """The vendor id of a device's PCI function, such as `0x10de`; '' when it has none.

    Source: sysfs-dev-char, sysfs-bus-pci (Linux, Documentation/ABI).
    """
    try:
        descriptor = posix.open(f"/sys/dev/char/{major}:{minor}/device/vendor", posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return posix.read(descriptor, 64).decode("ascii", "replace").strip()
    except OSError:
        return ""
    finally:
        posix.close(descriptor)
