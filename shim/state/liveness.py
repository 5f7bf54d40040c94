"""Whether processes may still use a container's devices, judged only by what the kernel says.

What we cannot see (another PID namespace, a hidden mount) counts as alive: a GPU that stays leased is a nuisance, a GPU
that two containers hold is an error.

The functions take an entry: a lease or a grant record.  It has the container's id; the pid, start time, boot and
namespaces of the process that created it (shim.host.kernel.creation); and `group`, its linux.cgroupsPath.  An older
Chandler's entry has no boot, namespaces or group; it is taken to be of this boot and of our own namespaces.  Part of
the release of a lease: no os, no json.
"""

from __future__ import annotations

import posix

from shim.errors import ChandlerError
from shim.host import files, kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.state.leases import Entry

# The value of `group` when the runtime makes no control group (crun's --cgroup-manager=disabled).
NO_GROUP = "//"
_PF_EXITING = 4  # in the flags of /proc/PID/stat.  Source: include/linux/sched.h
# The initial PID namespace, from which every process is seen.  Source: PROC_PID_INIT_INO, include/linux/proc_ns.h.
_INITIAL = "pid:[4026531836]"
_INITIAL_USER = "user:[4026531837]"  # PROC_USER_INIT_INO, in the same file
_INITIAL_CGROUP = "cgroup:[4026531835]"  # PROC_CGROUP_INIT_INO
_PAGE, _MAX = 4095, 64 << 20  # bytes of a file in /proc: the first read, enough for most, and the limit


def of_another_boot(entry: Entry) -> bool:
    """Whether the machine was restarted since the entry was written, so that none of its processes can live."""
    boot = kernel.boot()
    return bool(boot) and entry.get("boot", "") not in ("", boot)


def sees_all_processes(entry: Entry) -> bool:
    """Whether we would see every process of the container."""
    ours = kernel.namespace("pid")
    return ours in (_INITIAL, entry.get("pidns", ours)) and not _hidden(entry)


def sees_every_process(entry: Entry) -> bool:
    """Whether we see all processes of this machine, for an entry without the PID namespace of its create."""
    return kernel.namespace("pid") == _INITIAL and not _hidden(entry)


def _hidden(entry: Entry) -> bool:
    """Whether /proc may hide the container's processes from us.

    Where /proc is mounted with hidepid or subset, a process sees only those of its own user namespace and of the
    namespaces below it.  Source: proc(5), ptrace(2).
    """
    if not any(
        word in line
        for line in _read("/proc/self/mountinfo").splitlines()
        if " /proc " in line
        for word in ("hidepid=", "subset=")
    ):
        return False
    ours = kernel.namespace("user")
    return bool(ours != entry.get("userns")) and not (ours == _INITIAL_USER and posix.geteuid() == 0)


def creator_runs(entry: Entry) -> bool:
    """Whether the process that creates the container may still run.  The caller has checked `sees_all_processes`."""
    return runs(entry, entry["pid"], entry["started"])


def runs(entry: Entry, pid: int, started: int) -> bool:
    """Whether a process of the PID namespace in which the container was created may still run.

    `started`: when it started, in clock ticks, 0 where that is not known.  A zombie does not run.  The caller has
    checked `sees_all_processes`.
    """
    pid_namespace = entry.get("pidns", "")
    if pid_namespace in ("", kernel.namespace("pid")):
        # the kernel gives start times in the reader's time namespace: another one's cannot be compared
        return not _ended(str(pid)) and (started in (0, kernel.started(pid)) or not in_our_time_namespace(entry))
    return any(
        kernel.namespace("pid", other) == pid_namespace and _inner_pid(other) == pid and not _ended(other)
        for other in _processes()
    )


def occupants(entry: Entry, groups: Iterable[str] = ()) -> list[int]:
    """The pids of the processes in the container's control group and below it, without zombies.

    `groups`: the container's groups as its runtime names them, as paths in a hierarchy or in /sys/fs/cgroup.
    Read from /proc, since a mount namespace may have something else at /sys/fs/cgroup, or nothing.
    """
    wanted = [*patterns(entry.get("group", ""), entry["id"]), *(_components(group) for group in groups)]
    wanted = [pattern for pattern in wanted if pattern]
    inner = kernel.namespace("cgroup") not in ("", _INITIAL_CGROUP)
    pids = []
    for pid in _processes():
        if any(_in_group(table, wanted, inner) for table in _tables(pid)) and not _ended(pid):
            pids.append(int(pid))
    return pids


def _tables(pid: str) -> Iterator[str]:
    """The text of /proc/PID/cgroup of a process, and of its threads where that is needed.

    cgroup v1 shows a thread that has begun to end in the root group.  A process with much memory needs seconds to end,
    and closes its files last; and other threads may live on after the first one.  So for such a process each thread is
    asked, and its /proc/PID/cpuset, which tells the group up to the end.
    Source: kernel/cgroup/cgroup.c (proc_cgroup_show), kernel/exit.c (do_exit).
    """
    table = _read(f"/proc/{pid}/cgroup")
    yield table
    if ":/\n" not in table:
        return
    fields = kernel.stat(pid)
    if not fields or fields[0] != "Z" and not int(fields[6]) & _PF_EXITING:
        return
    try:
        threads = posix.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        task = f"{pid}/task/{thread}"
        if kernel.stat(task)[:1] not in ([], ["Z"], ["X"]):
            yield _read(f"/proc/{task}/cgroup")
            yield f"0:cpuset:{_read(f'/proc/{task}/cpuset')}"


def _in_group(table: str, wanted: list[list[str]], inner: bool) -> bool:
    """Whether a /proc/PID/cgroup text has a group that matches one of the patterns, or is below one that does.

    `inner`: see `_within`.
    """
    if not any(pattern[-1] in table for pattern in wanted):
        return False
    paths = [path.split("/") for path in kernel.cgroups(table).values()]
    return any(_within(path, pattern, inner) for path in paths for pattern in wanted)


def has_group(entry: Entry) -> bool:
    """Whether the container has a control group of its own: linux.cgroupsPath may be /, too."""
    group = entry.get("group", "")
    return not group or bool(_components(group))


def patterns(group: str, container: str) -> list[list[str]]:
    """The possible last names of a container's control group, each pattern a list of path components.

    `group` is linux.cgroupsPath ('' where the runtime chooses).  The cgroupfs driver reads it as a path, the systemd
    driver as SLICE:PREFIX:NAME.  We do not know which runtime and driver it was, and what one of them refuses or names
    in its own way may be a name to another one.  So these are all names that any of them makes, of any text.

    Source, for the systemd driver: runc's libcontainer/cgroups/systemd/common.go (getUnitName), crun's
    cgroup-systemd.c (get_systemd_scope_and_slice), youki's libcgroups/src/systemd/manager.rs.  For a path that the
    runtime chooses: crun's cgroup-cgroupfs.c, youki's libcontainer/src/utils.rs (get_cgroup_path).  Engines put the id
    into the name.
    """
    names = _components(group)
    if not group:
        return [
            [container],
            [f":youki:{container}"],  # the cgroupfs driver of youki takes its name for the systemd driver as a path
            *(
                [f"{prefix}-{container}.scope"]
                for prefix in ("runc", "crun", "youki", "libpod", "docker", "crio", "cri-containerd")
            ),
        ]
    if not names:
        return []
    candidates = [names, [*names[:-1], names[-1] + ".scope"]]
    slice_name, colon, unit = group.partition(":")
    if colon:
        # crun accepts any number of colons, and makes a dash of the second; an empty PREFIX leaves the dash.
        candidates.append([unit.replace(":", "-", 1) + ".scope"])
        candidates.append([f"{slice_name}-{unit}.scope"])  # youki takes two words for PREFIX:NAME
        name = unit.rpartition(":")[2]
        candidates.append([name if name.endswith(".slice") else name + ".scope"])
    return candidates


def in_use(entry: Entry) -> bool:
    """Whether a container that its runtime has ended has processes left, or may have some that we cannot see."""
    return not of_another_boot(entry) and (not sees_all_processes(entry) or bool(occupants(entry)))


def _components(path: str) -> list[str]:
    """The components of a group's path, without /sys/fs/cgroup.

    The component after /sys/fs/cgroup is left out, too: with cgroup v1 it names the hierarchy.  With v2 that shortens
    the pattern, which still matches.
    """
    names: list[str] = []
    for name in path.split("/"):
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            names.append(name)
    if names[:3] == ["sys", "fs", "cgroup"]:
        names = names[4:] if len(names) > 4 else names[3:]
    return names


def _within(path: list[str], pattern: list[str], inner: bool) -> bool:
    """Whether the names of `pattern` follow one another somewhere in `path`.

    `inner`: we read in a cgroup namespace, which shows paths without the names above its root.  So the path may also
    begin with the last names of the pattern, after a `..` for each level.  Source: cgroup_namespaces(7).
    """
    length = len(pattern)
    if any(path[at : at + length] == pattern for at in range(len(path) - length + 1)):
        return True
    shown = [name for name in path if name not in ("", "..")]
    return inner and any(shown[: length - at] == pattern[at:] for at in range(1, length))


def _processes() -> Iterator[str]:
    return (name for name in posix.listdir("/proc") if name.isdigit())


def _read(path: str) -> str:
    """The text of a file in /proc, '' when it cannot be read."""
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
    """Whether a process has ended with all of its threads, so that it has no open files any more."""
    fields = kernel.stat(pid)
    return not fields or fields[0] in "ZX" and int(fields[17]) <= 1


def has_other_threads(pid: int) -> bool:
    """Whether the first thread of a process has ended and others run.  Runtimes take such a process for ended."""
    fields = kernel.stat(pid)
    return bool(fields) and fields[0] == "Z" and int(fields[17]) > 1


def _inner_pid(pid: str) -> int:
    """A process's pid in its own PID namespace, 0 when it is gone.  Source: proc(5), NSpid."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0


def in_our_time_namespace(entry: Entry) -> bool:
    """Whether the container was created in our time namespace.

    Start times differ between time namespaces.  A runtime that compares one with a start time from another namespace
    takes a running container for a stopped one, so its answer counts only in the same namespace.
    """
    ours = kernel.namespace("time")
    return bool(entry.get("timens", ours) == ours)


def sees_root(entry: Entry) -> bool:
    """Whether we see the file system on which the create saw the runtime's root (`place` of the entry).

    Only then does a missing state directory mean that the container is gone.  A mount that was made since, or that our
    mount namespace has there, could hide it.
    """
    place = entry.get("place")
    if place is None:
        return True
    path, device, inode = place
    mounts = _mounts()
    point, top = _mount_of(mounts, f"{entry['root']}/{entry['id']}")
    if len(point) > len(path) and point != "/":
        return False  # this mount is between `path` and the container's state directory
    nearest = path
    while True:
        try:
            status = posix.stat(nearest)
            break
        except OSError:
            if nearest == "/":
                return False
            nearest = nearest.rpartition("/")[0] or "/"
    # Another inode: the directory was made anew, or another part of the same file system is bind-mounted over it.  Only
    # a mount of the whole file system rules the second out.
    return status.st_dev == device and (nearest == path and status.st_ino == inode or top == "/")


def _mounts() -> list[tuple[str, str]]:
    """(mount point, root of the mount in its file system) of every mount.  Source: proc(5), /proc/pid/mountinfo."""
    return [
        (_unescaped(fields[4]), fields[3])
        for fields in (line.split(" ", 5) for line in _read("/proc/self/mountinfo").splitlines())
        if len(fields) > 5
    ]


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _mount_of(mounts: list[tuple[str, str]], path: str) -> tuple[str, str]:
    """The mount that a path without symbolic links is on: the longest mount point, and of equal ones the last."""
    best = ("", "")
    for point, top in mounts:
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[0]):
            best = (point, top)
    return best
