"""What the host knows: device nodes, mount sources, and the completion of edits with it.

`complete` asks through a function that is passed in, so it can be tried without a host.  Part of the create
path: no os, no stat.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import DEVICE, Edits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Tuple

    from shim.edits import Edit, Stat

_TYPES = {0o020000: "c", 0o060000: "b", 0o010000: "p"}
_FORMAT = 0o170000
COMPILED = "compiled"  # in a device node's edit: which device it was when the inventory was compiled


def lstat_device(path: str) -> Tuple[str, int, int, int]:
    """(type, major, minor, permission bits) of a device node or FIFO; links are not followed.

    Raises HostError when nothing is there, or something else.
    """
    try:
        found = posix.lstat(path)
    except FileNotFoundError:  # in our words: podman takes the system's for a command that it did not find
        raise errors.HostError(f"{path} is not on this host") from None
    except (OSError, ValueError) as error:
        raise errors.HostError(f"{path} cannot be looked at ({getattr(error, 'strerror', error)})") from None
    kind = _TYPES.get(found.st_mode & _FORMAT)
    if kind is None:
        raise errors.HostError(f"{path} is not a device node")
    rdev = found.st_rdev
    return kind, posix.major(rdev), posix.minor(rdev), found.st_mode & 0o777


def is_certain(node: Dict[str, Any]) -> bool:
    """Whether a CDI file says which device a node is, so that nothing has to be asked of the host."""
    return bool(node.get("type")) and (bool(node.get("major")) or node["type"] == "p")


def complete(edits: Edits, lstat: Stat = lstat_device) -> Edits:
    """The same edits with what they leave open about device nodes filled in from the host.

    A node that gives its type and major number is believed, so that it can be injected while the host lacks
    it; of any other the host must have a node of the same type.  Only permission bits are taken from the host
    otherwise, never the owner.  Raises HostError, which names the node and where it came from.
    Source: CDI Go library, pkg/cdi/container-edits_unix.go (DeviceNode.fillMissingInfo).
    """
    return edits.with_values([_complete(edit, lstat) if edit[0] == DEVICE else edit for edit in edits.items])


def _complete(edit: Edit, lstat: Stat) -> Edit:
    kind, path, node, origin = edit
    declared = node.get("type")
    certain = is_certain(node)
    if certain and node.get("fileMode") is not None:
        return edit
    source = node.get("hostPath") or path
    try:
        found, major, minor, mode = lstat(source)
    except errors.HostError as error:
        if certain:
            return edit
        raise error.within(origin) from None
    node = dict(node)
    if node.get("fileMode") is None:
        node["fileMode"] = mode
    if not certain:
        if not declared:
            node["type"] = found
        elif declared != found:
            raise errors.HostError(f"{origin}: {source} is a device of type {found!r}, not {declared!r}")
        if not node.get("major") and found != "p":
            node["major"], node["minor"] = major, minor
        before = node.pop(COMPILED, None)
        if before is not None and found != "p" and before != f"{found}{node['major']}:{node['minor']}":
            raise errors.ChangedError(
                f"{origin}: {source} is another device than when the CDI files were read", "run `chandler refresh`"
            )
    return kind, path, node, origin


def look(path: str) -> Tuple[str, int, int, int, int]:
    """(type, major, minor, permission bits, group) of a device node.  Raises HostError."""
    return (*lstat_device(path), posix.lstat(path).st_gid)


def look_at_gpu(path: str) -> Tuple[str, int, int, int, int, str]:
    """What `look` says of a device node, and its PCI vendor or ''.  Raises HostError."""
    found = look(path)
    return (*found, _pci_vendor(found[1], found[2]))


def _pci_vendor(major: int, minor: int) -> str:
    """`0x10de` and the like, '' where the device is no PCI function's.  Source: sysfs-dev-char, sysfs-bus-pci."""
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
