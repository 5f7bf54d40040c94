"""What the host knows: device nodes, mount sources, and the completion of edits with it.

`complete` asks through a function that is passed in, so it can be tried without a host.  Part of the create
path: no os, no stat.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import DEVICE, HOOK, MOUNT, Edits

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
    Source: CDI reference library, DeviceNode.fillMissingInfo.
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
            raise errors.ChangedError(f"{origin}: {source} is another device than when the CDI files were read", "run `chandler refresh`")
    return kind, path, node, origin


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
            from shim.generate import stale
            raise errors.HostError(f"{origin}: {what} does not exist", stale.remedy(path))


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is none.  Source: proc(5), /proc/pid/stat."""
    try:
        return int(_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _text(path: str) -> str:
    """The first 4 KiB of one of the kernel's files.  Raises OSError."""
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return posix.read(descriptor, 4096).decode("utf-8", "replace")
    finally:
        posix.close(descriptor)


def boot() -> str:
    """Which boot of the kernel this is; '' when the kernel does not say."""
    try:
        return _text("/proc/sys/kernel/random/boot_id").strip()
    except OSError:
        return ""


def namespace(kind: str, pid: str = "self") -> str:
    """The namespace of one kind (`pid`, `time`) that a process is in, such as `pid:[4026531836]`; '' when it cannot be seen."""
    try:
        return posix.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def creation(root: str) -> Dict[str, Any]:
    """By what another process can tell later whether the create that runs in this one goes on: pid and start time, in which
    boot, PID namespace and time namespace these count, and `place`, which file system the runtime's root was seen on (its
    path or that of the nearest directory above it that is there, device number, inode)."""
    pid = posix.getpid()
    place = root
    while True:
        try:
            found = posix.stat(place)
            break
        except OSError:
            place = place.rpartition("/")[0] or "/"
    return {"pid": pid, "started": started(pid), "boot": boot(), "pidns": namespace("pid"), "timens": namespace("time"),
            "place": [place, found.st_dev, found.st_ino]}


def exists(path: str) -> bool:
    """Whether there is something at `path`, links followed."""
    try:
        return posix.access(path, posix.F_OK)
    except ValueError:  # a NUL in it
        return False


def unified_cgroups() -> bool:
    """Whether this node has cgroup v2 alone.  Source: cgroups(7)."""
    return exists("/sys/fs/cgroup/cgroup.controllers")


def oom_score() -> int:
    """This process' oom_score_adj.  Source: proc_pid_oom_score_adj(5)."""
    try:
        return int(_text("/proc/self/oom_score_adj"))
    except (OSError, ValueError):
        return 0


def user_namespace() -> str:
    """The uid map of our user namespace with single blanks; `0 0 4294967295` is the initial one.

    Source: user_namespaces(7).
    """
    try:
        descriptor = posix.open("/proc/self/uid_map", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return " ".join(posix.read(descriptor, 65536).decode().split())
        finally:
            posix.close(descriptor)
    except OSError:
        return "0 0 4294967295"  # no /proc: an initial namespace is the careful guess, it trusts root alone


INITIAL_NAMESPACE = "0 0 4294967295"


def trusted_owners(uid_map: str) -> Dict[int, str]:
    """The uids whose files may decide what we do, with their names for a message.

    In the initial user namespace root, and the caller when that is somebody else.  In another namespace its
    root, and the kernel's overflow uid, as which the host's root shows there, unless the map gives that number
    to somebody: then files.check_trust has to look at each file.
    """
    euid = posix.geteuid()
    owners: Dict[int, str] = {0: "root"}
    if euid:
        owners[euid] = "the caller"
    if uid_map != INITIAL_NAMESPACE:
        overflow = overflow_uid()
        numbers = [int(word) for word in uid_map.split()]
        inside = zip(numbers[0::3], numbers[2::3])
        if not any(first <= overflow < first + count for first, count in inside):
            owners[overflow] = "the host's root"
    return owners


def outer_uid(uid: int, uid_map: str) -> int:
    """The number that an id of a user namespace has outside of it."""
    numbers = [int(word) for word in uid_map.split()]
    for inside, outside, count in zip(numbers[0::3], numbers[1::3], numbers[2::3]):
        if inside <= uid < inside + count:
            return outside + uid - inside
    return uid


def overflow_uid() -> int:
    """The number that files of owners without an id in our user namespace show.  Source: proc_sys_kernel(5)."""
    try:
        descriptor = posix.open("/proc/sys/kernel/overflowuid", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return int(posix.read(descriptor, 64))
        finally:
            posix.close(descriptor)
    except (OSError, ValueError):
        return 65534


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
