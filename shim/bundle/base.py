"""The configuration that every built bundle begins with, before what its service asks for is edited in.

Source: OCI runtime specification 1.0.2; defaults as Docker and containerd have them.  Pure.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Sequence

from shim.shapes import Document

OCI_VERSION = "1.0.2"  # every runtime takes it; some refuse a newer one
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = "TERM=xterm"
ROOTFS = "rootfs"  # a root file system in the bundle itself
_TTY_GROUP = 5  # devpts(5): the group of terminals on every distribution

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
# null, zero, full, random, urandom, tty, console, ptmx, and every pts
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))
_KERNEL_FS = ("nosuid", "noexec", "nodev")

Mapping = Dict[str, int]  # containerID, hostID, size


class Node(NamedTuple):
    """What the host is like: `unified`, control groups of version 2 alone; `own_uids` and `own_gids`, the mappings of
    a user namespace for the container, none where it needs none; `uids` and `gids`, the ids that then exist in it
    (None: all); `rootless`, whether devices and most mounts are beyond the caller."""

    unified: bool = False
    rootless: bool = False
    own_uids: Sequence[Mapping] = ()
    own_gids: Sequence[Mapping] = ()
    uids: Any = None
    gids: Any = None


class Process(NamedTuple):
    """What runs: arguments, environment without the service's own, working directory."""

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
    """The config.json of a container with the root file system `root`; `confined`: no program gains privileges."""
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


def environment(*layers: Sequence[str]) -> List[str]:
    """The layers one over the other, a later value in the place of an earlier, with PATH and TERM where none sets
    them."""
    found: Dict[str, str] = {}
    for layer in layers:
        for entry in layer:
            found[entry.partition("=")[0]] = entry
    for entry in (PATH, TERM):
        found.setdefault(entry.partition("=")[0], entry)
    return list(found.values())


def namespaces(node: Node, host_network: bool) -> List[str]:
    """The namespaces of the container's own.  On version 2 the cgroup namespace hides the host's tree."""
    kinds = ["pid", "ipc", "uts", "mount"]
    if not host_network:
        kinds.append("network")
    if node.own_uids:
        kinds.append("user")
    if node.own_uids or node.unified:
        kinds.append("cgroup")
    return kinds


def mounts(node: Node, host_network: bool, privileged: bool) -> List[Document]:
    """What is mounted in every container."""
    readonly = () if privileged else ("ro",)
    tty = (f"gid={_TTY_GROUP}",) if node.gids is None or _TTY_GROUP in node.gids else ()
    made = [
        _mount("/proc", "proc", "proc", *_KERNEL_FS),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *tty),
        _mount("/dev/shm", "tmpfs", "shm", *_KERNEL_FS, "mode=1777", "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *_KERNEL_FS),
    ]
    if node.rootless and host_network:  # sysfs(5) is for who owns the network namespace
        made.append(_mount("/sys", "none", "/sys", "rbind", *_KERNEL_FS, "ro"))
        return made
    made.append(_mount("/sys", "sysfs", "sysfs", *_KERNEL_FS, *readonly))
    if node.unified or not node.rootless:
        # the type that runtimes take for either version; cgroup2 is refused on a host of version 1
        made.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *_KERNEL_FS, "relatime", *readonly))
    return made


def _mount(destination: str, kind: str, source: str, *options: str) -> Document:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def device_rules(privileged: bool) -> List[Document]:
    """The device cgroup: nothing but what every container has, or everything."""
    rules: List[Document] = [{"allow": privileged, "access": "rwm"}]
    if not privileged:
        for major, minor in _DEVICES:
            rule: Document = {"allow": True, "type": "c", "major": major, "access": "rwm"}
            if minor is not None:
                rule["minor"] = minor
            rules.append(rule)
    return rules
