"""The config.json that every built bundle begins with.  The edits for what its service asks for come on top of it.

Source: OCI runtime specification 1.0.2, "Configuration"; the defaults are those of Docker and containerd.  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from shim.shapes import Document

OCI_VERSION = "1.0.2"  # every runtime accepts it; some refuse a newer one
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = "TERM=xterm"
ROOTFS = "rootfs"  # a root file system in the bundle itself
_TTY_GROUP = 5  # the group tty, which has this number on every distribution; the default of Docker and containerd

CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
)
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# (major, minor) of null, zero, full, random, urandom, tty, console and ptmx, and the major number of all pts
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))
_KERNEL_FS = ("nosuid", "noexec", "nodev")

Mapping = dict[str, int]  # keys as in linux.uidMappings: containerID, hostID, size


class Node(NamedTuple):
    """The facts about this host that config.json depends on.

    `unified`: whether the host has cgroup v2 only.
    `rootless`: whether the caller lacks the rights to add devices and to make most mounts.
    `own_uids`, `own_gids`: the mappings of the container's user namespace; empty where it needs none of its own.
    `uids`, `gids`: the ids that exist in the container, asked with `in` (shim.bundle.rootless.Ids); None for all ids.
    """

    unified: bool = False
    rootless: bool = False
    own_uids: Sequence[Mapping] = ()
    own_gids: Sequence[Mapping] = ()
    uids: Any = None
    gids: Any = None


class Process(NamedTuple):
    """The container's process.

    `args`: its command line.  `env`: NAME=VALUE entries, without those of the service.  `cwd`: its working directory.
    """

    args: Sequence[str]
    env: Sequence[str]
    cwd: str


def config(
    process: Process,
    hostname: str,
    root: str,
    node: Node,
    host_network: bool = False,
    privileged: bool = False,
    confined: bool = True,
) -> Document:
    """The config.json of a container.

    `root`: the path of its root file system.  `host_network`: whether it uses the host's network namespace.
    `privileged`: whether it may open all devices and write to all of /proc and /sys.
    `confined`: whether to set noNewPrivileges, so that no program in it gains privileges by set-user-ID.
    """
    linux: Document = {
        "namespaces": [{"type": kind} for kind in namespaces(node, host_network)],
        "rootfsPropagation": "private",
        "maskedPaths": [] if privileged else list(MASKED),
        "readonlyPaths": [] if privileged else list(READONLY),
    }
    if node.own_uids:
        linux["uidMappings"] = list(node.own_uids)
        linux["gidMappings"] = list(node.own_gids)
    if not node.rootless:
        linux["resources"] = {"devices": device_rules(privileged)}
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(process.args),
            "env": environment(process.env),
            "cwd": process.cwd,
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
            "noNewPrivileges": confined and not privileged,
        },
        "root": {"path": root, "readonly": False},
        "hostname": hostname,
        "mounts": mounts(node, host_network, privileged),
        "linux": linux,
    }


def environment(*layers: Sequence[str]) -> list[str]:
    """Merges lists of NAME=VALUE entries.  A later value replaces an earlier one; PATH and TERM get defaults."""
    entries: dict[str, str] = {}  # by the name of the variable
    for layer in layers:
        for entry in layer:
            entries[entry.partition("=")[0]] = entry
    for entry in (PATH, TERM):
        entries.setdefault(entry.partition("=")[0], entry)
    return list(entries.values())


def namespaces(node: Node, host_network: bool) -> list[str]:
    """The types of the namespaces that the container gets for itself.

    With cgroup v2 it gets a cgroup namespace, which hides the host's control groups from it.
    """
    kinds = ["pid", "ipc", "uts", "mount"]
    if not host_network:
        kinds.append("network")
    if node.own_uids:
        kinds.append("user")
    if node.own_uids or node.unified:
        kinds.append("cgroup")
    return kinds


def mounts(node: Node, host_network: bool, privileged: bool) -> list[Document]:
    """The mounts that every container gets."""
    readonly = () if privileged else ("ro",)
    tty = (f"gid={_TTY_GROUP}",) if node.gids is None or _TTY_GROUP in node.gids else ()
    result = [
        _mount("/proc", "proc", "proc", *_KERNEL_FS),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *tty),
        _mount("/dev/shm", "tmpfs", "shm", *_KERNEL_FS, "mode=1777", "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *_KERNEL_FS),
    ]
    if node.rootless and host_network:  # only the owner of the network namespace may mount a new sysfs: bind the host's
        result.append(_mount("/sys", "none", "/sys", "rbind", *_KERNEL_FS, "ro"))
        return result
    result.append(_mount("/sys", "sysfs", "sysfs", *_KERNEL_FS, *readonly))
    if node.unified or not node.rootless:
        # runtimes accept the type cgroup for both versions; they refuse cgroup2 on a host with version 1
        result.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *_KERNEL_FS, "relatime", *readonly))
    return result


def _mount(destination: str, kind: str, source: str, *options: str) -> Document:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def device_rules(privileged: bool) -> list[Document]:
    """The rules of linux.resources.devices: only the devices that every container has, or all when privileged."""
    rules: list[Document] = [{"allow": privileged, "access": "rwm"}]
    if not privileged:
        for major, minor in _DEVICES:
            rule: Document = {"allow": True, "type": "c", "major": major, "access": "rwm"}
            if minor is not None:
                rule["minor"] = minor
            rules.append(rule)
    return rules
