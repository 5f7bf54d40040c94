"""Reads processes, namespaces, control groups and the boot id from the kernel.  Part of the create path: no os."""

from __future__ import annotations

import posix

from shim.host import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Tuple, TypedDict, Union

    class Creation(TypedDict, total=False):
        """The process that creates a container.  An older Chandler's entry has only the first two, or none."""

        pid: int
        started: int  # clock ticks
        boot: str
        pidns: str
        timens: str
        userns: str
        place: Tuple[str, int, int]


def stat(pid: Union[int, str]) -> List[str]:
    """The fields of /proc/PID/stat from the state on, the third field in proc(5); [] when there is no such process."""
    try:
        return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except OSError:
        return []


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is no such process."""
    try:
        return int(stat(pid)[19])
    except (ValueError, IndexError):
        return 0


def cgroups(table: str) -> Dict[str, str]:
    """The control groups in the text of a /proc/PID/cgroup: the path in each hierarchy, by the hierarchy's controllers.

    The controllers are as they are written there, such as `cpu,cpuacct`; '' is cgroup v2.  Source: cgroups(7).
    """
    lines = (line.split(":", 2) for line in table.split("\n"))
    return {line[1]: line[2] for line in lines if len(line) == 3}


def cgroups_of(pid: Union[int, str]) -> Dict[str, str]:
    """The control groups of a process.  Raises OSError."""
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        return cgroups(file.read().decode("utf-8", "replace"))


def boot() -> str:
    """The kernel's boot id, '' when it cannot be read."""
    try:
        return _text("/proc/sys/kernel/random/boot_id").strip()
    except OSError:
        return ""


def namespace(kind: str, pid: str = "self") -> str:
    """The namespace of one kind (`pid`, `time`, `user`) that a process is in, such as `pid:[4026531836]`.

    '' when it cannot be read.
    """
    try:
        return posix.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def creation(root: str) -> Creation:
    """What shim.state.liveness needs later to tell whether the create that runs in this process goes on.

    pid and started (clock ticks) of this process; the boot, PID and time namespace in which these numbers count; the
    user namespace; `place`: path, device number and inode of the runtime's root, or of the nearest directory above it
    that exists.
    """
    pid = posix.getpid()
    nearest = root
    while True:
        try:
            status = posix.stat(nearest)
            break
        except OSError:
            nearest = nearest.rpartition("/")[0] or "/"
    return {
        "pid": pid,
        "started": started(pid),
        "boot": boot(),
        "pidns": namespace("pid"),
        "timens": namespace("time"),
        "userns": namespace("user"),
        "place": (nearest, status.st_dev, status.st_ino),
    }


def unified_cgroups() -> bool:
    """Whether this node has only cgroup v2.  Source: cgroups(7)."""
    return files.exists("/sys/fs/cgroup/cgroup.controllers")


def oom_score() -> int:
    """The oom_score_adj of this process, 0 when it cannot be read.  Source: proc_pid_oom_score_adj(5)."""
    try:
        return int(_text("/proc/self/oom_score_adj"))
    except (OSError, ValueError):
        return 0


def _text(path: str) -> str:
    """The first 4 KiB of a file in /proc.  Raises OSError."""
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return posix.read(descriptor, 4096).decode("utf-8", "replace")
    finally:
        posix.close(descriptor)
