"""Whether somebody may still use a container's devices, by what the kernel alone says.  What cannot be seen is alive.

Whoever asks has an entry: a lease or a grant record, with the id, what shim.host.kernel.creation noted of the process
that made the container, and `group`, linux.cgroupsPath.  An entry that an older Chandler wrote lacks these; it is
taken to be of this boot and of our own namespaces.  Part of the release of a lease: no os, no json.
"""

from __future__ import annotations

import posix

from shim.errors import ChandlerError
from shim.host import files, kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterable, Iterator, List, Tuple

    Entry = Dict[str, Any]

NO_GROUP = (
    "//"  # as `group`: the runtime was told to make none (crun's --cgroup-manager=disabled), so there is nothing to see
)
_INITIAL = (
    "pid:[4026531836]"  # PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h; from there every process is seen
)
_INITIAL_USER = "user:[4026531837]"  # PROC_USER_INIT_INO, the same
_PAGE, _MAX = 4095, 64 << 20  # bytes of a file in /proc: what most have at the most, and a bound


def of_another_boot(entry: Entry) -> bool:
    """Whether the machine has been started anew since: nothing of that time lives."""
    boot = kernel.boot()
    return bool(boot) and entry.get("boot", "") not in ("", boot)


def sees(entry: Entry) -> bool:
    """Whether we see every process of the container, if it has any."""
    own = kernel.namespace("pid")
    return own in (_INITIAL, entry.get("pidns", own)) and not _hidden(entry)


def _hidden(entry: Entry) -> bool:
    """Whether /proc may hide the container's processes from us: where it is mounted with hidepid, a user namespace
    shows its own and those of the namespaces below it.  Source: proc(5), ptrace(2)."""
    if not any(
        word in line
        for line in _read("/proc/self/mountinfo").splitlines()
        if " /proc " in line
        for word in ("hidepid=", "subset=")
    ):
        return False
    own = kernel.namespace("user")
    return bool(own != entry.get("userns")) and not (own == _INITIAL_USER and posix.geteuid() == 0)


def creating(entry: Entry) -> bool:
    """Whether the process that makes the container may still be at work; only for one who `sees`."""
    theirs = entry.get("pidns", "")
    if theirs in ("", kernel.namespace("pid")):
        now = kernel.started(entry["pid"])
        # start times are those of the reader's time namespace
        return bool(now) and (
            now == entry["started"] or entry.get("timens", kernel.namespace("time")) != kernel.namespace("time")
        )
    return any(kernel.namespace("pid", pid) == theirs and _inner_pid(pid) == entry["pid"] for pid in _processes())


def occupants(entry: Entry, groups: Iterable[str] = ()) -> List[int]:
    """The processes in the container's control group and below it, those aside that have ended and wait for their
    parent.

    `groups`: where the runtime says that the container is, as paths in a hierarchy or in /sys/fs/cgroup.
    From /proc, since every mount namespace sees the same there, whatever it has at /sys/fs/cgroup.
    """
    wanted = [*patterns(entry.get("group", ""), entry["id"]), *(_components(group) for group in groups)]
    wanted = [pattern for pattern in wanted if pattern]
    found = []
    for pid in _processes():
        if any(_in_group(table, wanted) for table in _tables(pid)) and not _ended(pid):
            found.append(int(pid))
    return found


def _tables(pid: str) -> Iterator[str]:
    """What the kernel says of the control groups of a process.  cgroup v1 shows a first thread that has ended in the
    root group: then the threads that live on are looked at, too."""
    table = _read(f"/proc/{pid}/cgroup")
    yield table
    if ":/\n" in table and kernel.stat(pid)[:1] == ["Z"]:
        try:
            threads = posix.listdir(f"/proc/{pid}/task")
        except OSError:
            return
        yield from (_read(f"/proc/{pid}/task/{thread}/cgroup") for thread in threads if thread != pid)


def _in_group(table: str, wanted: List[List[str]]) -> bool:
    """Whether a table of control groups names one that ends in any of some patterns."""
    if not any(pattern[-1] in table for pattern in wanted):
        return False
    paths = [path.split("/") for path in kernel.cgroups(table).values()]
    return any(_within(path, pattern) for path in paths for pattern in wanted)


def patterns(group: str, container: str) -> List[List[str]]:
    """What the names of a container's control group end in: `group` is linux.cgroupsPath ('' for the runtime's own
    choice), which one driver takes for a path and another for a slice, a prefix and a name.

    Source: runc's libcontainer/cgroups, crun's cgroup-systemd.c, youki's libcgroups; engines put the id in such a name.
    """
    names = _components(group)
    if group == NO_GROUP:
        return []
    if not names:
        return [
            [container],
            *(
                [f"{prefix}-{container}.scope"]
                for prefix in ("runc", "crun", "youki", "libpod", "docker", "crio", "cri-containerd")
            ),
        ]
    found = [names, [*names[:-1], names[-1] + ".scope"]]
    if group.count(":") == 2:
        _, prefix, name = group.split(":")
        found += [[f"{prefix}-{name}.scope"] if prefix else [f"{name}.scope"]]
        if name.endswith(".slice"):
            found.append([name])
    return found


def in_use(entry: Entry) -> bool:
    """Whether processes of a container that its runtime has ended are there, or may be."""
    return not of_another_boot(entry) and (not sees(entry) or bool(occupants(entry)))


def _components(path: str) -> List[str]:
    """The names of a group's path, without /sys/fs/cgroup and the name after it, which may be a hierarchy of version
    1."""
    names: List[str] = []
    for name in path.split("/"):
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            names.append(name)
    if names[:3] == ["sys", "fs", "cgroup"]:
        names = names[4:] if len(names) > 4 else names[3:]
    return names


def _within(path: List[str], pattern: List[str]) -> bool:
    """Whether the names of `pattern` follow one another somewhere in `path`."""
    length = len(pattern)
    return any(path[at : at + length] == pattern for at in range(len(path) - length + 1))


def _processes() -> Iterator[str]:
    return (name for name in posix.listdir("/proc") if name.isdigit())


def _read(path: str) -> str:
    """One of the kernel's files, '' when it cannot be read."""
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return files.read_all(descriptor, _PAGE, _MAX, path).decode("utf-8", "surrogateescape")
    except (OSError, ChandlerError):
        return ""
    finally:
        posix.close(descriptor)


def _ended(pid: str) -> bool:
    """Whether a process has ended with all of its threads: it holds no file any more."""
    fields = kernel.stat(pid)
    return not fields or fields[0] in "ZX" and int(fields[17]) <= 1


def goes_on_in_threads(pid: int) -> bool:
    """Whether the first thread of a process has ended, which runtimes take for its end, and others have not."""
    fields = kernel.stat(pid)
    return bool(fields) and fields[0] == "Z" and int(fields[17]) > 1


def _inner_pid(pid: str) -> int:
    """A process' number in its own PID namespace, 0 when it is gone.  Source: proc(5), NSpid."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0


def in_our_time(entry: Entry) -> bool:
    """Whether start times of the container's processes are those that we read: a runtime that compares them with what
    it noted in another time namespace takes a running container for a stopped one."""
    own = kernel.namespace("time")
    return bool(entry.get("timens", own) == own)


def visible(entry: Entry) -> bool:
    """Whether we see the file system that the runtime's root is on: a container that is not in it is gone, not hidden.

    A mount that was made since, or that another mount namespace has there, hides what is below.
    """
    place = entry.get("place")
    if place is None:
        return True
    path, device, inode = place
    mounts = _mounts()
    point, top = _mount_of(mounts, f"{entry['root']}/{entry['id']}")
    if len(point) > len(path) and point != "/":
        return False  # it lies between the place and the container
    there = path
    while True:
        try:
            found = posix.stat(there)
            break
        except OSError:
            if there == "/":
                return False
            there = there.rpartition("/")[0] or "/"
    # a directory that was removed and made anew has another inode, but so has a part of the same file system bound
    # over it
    return found.st_dev == device and (there == path and found.st_ino == inode or top == "/")


def _mounts() -> List[Tuple[str, str]]:
    """Every mount: where, and which directory of its file system.  Source: proc(5), /proc/pid/mountinfo."""
    return [
        (_unescaped(fields[4]), fields[3])
        for fields in (line.split(" ", 5) for line in _read("/proc/self/mountinfo").splitlines())
        if len(fields) > 5
    ]


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _mount_of(mounts: List[Tuple[str, str]], path: str) -> Tuple[str, str]:
    """The mount that a path without links lies on: of those whose point is the longest, the last."""
    best = ("", "")
    for point, top in mounts:
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, top)
    return best
