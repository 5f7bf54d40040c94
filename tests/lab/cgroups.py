"""Which control groups this host has, and mount namespaces in which a runtime sees others.

A command wrapped with one of the tuples below runs in a mount namespace of its own. Containers that it starts outlive
that command.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import time

SYSFS = "/sys/fs/cgroup"


def private(change: str) -> tuple[str, ...]:
    return ("unshare", "-m", "--propagation", "private", "sh", "-c", f'{change} && exec "$@"', "sh")


HOST: tuple[str, ...] = ()
# crun refuses version 1 with version 2 beside it ("hybrid"). With version 2 unmounted the host has plain version 1,
# with every controller.
LEGACY = private(f"umount {SYSFS}/unified")
# Version 2 without controllers: device rules are eBPF programs and enforced, limits cannot be set.
UNIFIED = private(f"mount -t cgroup2 none {SYSFS}")


def mode() -> str:
    if os.path.exists(f"{SYSFS}/cgroup.controllers"):
        return "unified"
    return "hybrid" if os.path.exists(f"{SYSFS}/unified/cgroup.controllers") else "legacy"


def limit(controller: str, version1: str, version2: str, pid: int) -> int:
    """A limit of the control group of process `pid`, read from the kernel."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as table:
        groups = dict(line.rstrip("\n").split(":", 2)[1:] for line in table)
    for controllers, path in groups.items():
        if controller in controllers.split(","):
            file = f"{SYSFS}/{controllers}{path}/{version1}"
            break
    else:
        file = f"{SYSFS}{groups['']}/{version2}"
    with open(file, encoding="ascii") as value:
        return int(value.read())


class Group:
    """A control group in every hierarchy of this host, for a machine that sees it as the root of all groups."""

    def __init__(self, name: str) -> None:
        self.points: dict[str, str] = {}  # each hierarchy's place below SYSFS, and mount(8)'s options for it
        if mode() == "unified":
            _delegate()
            self.points["."] = "-t cgroup2"
        else:
            with open("/proc/self/cgroup", encoding="utf-8") as table:
                for controllers in [line.split(":")[1] for line in table]:
                    options = f"none,{controllers}" if controllers.startswith("name=") else controllers
                    point = controllers.removeprefix("name=") or "unified"
                    if os.path.isdir(f"{SYSFS}/{point}"):
                        self.points[point] = f"-t cgroup -o {options}" if controllers else "-t cgroup2"
        self.directories = [os.path.normpath(f"{SYSFS}/{point}/{name}") for point in self.points]
        for directory in self.directories:
            os.mkdir(directory)
            if directory.startswith(f"{SYSFS}/cpuset/"):  # a new group has neither, and takes no process
                for file in ("cpuset.cpus", "cpuset.mems"):
                    shutil.copyfile(f"{SYSFS}/cpuset/{file}", f"{directory}/{file}")

    @property
    def wrap(self) -> tuple[str, ...]:
        """Precedes a command, which runs in this group and sees it as the root."""
        joined = "".join(f"echo 0 >{directory}/cgroup.procs\n" for directory in self.directories)
        return ("sh", "-c", f'set -e\n{joined}exec unshare -C "$@"', "sh")

    @property
    def mounts(self) -> str:
        """For a shell that runs so: mount the hierarchies at sys/fs/cgroup."""
        if "." in self.points:
            # A group with processes of its own can give its groups no controllers.
            return (
                "mount -t cgroup2 cgroup2 sys/fs/cgroup; mkdir sys/fs/cgroup/init\n"
                "echo 0 >sys/fs/cgroup/init/cgroup.procs\n"
            )
        return "mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup\n" + "".join(
            f"mkdir sys/fs/cgroup/{point}; mount {options} cgroup sys/fs/cgroup/{point}\n"
            for point, options in self.points.items()
        )

    def remove(self) -> None:
        """Remove it and what is in it. Its processes must have been killed."""
        remove({path for directory in self.directories for path, _, _ in os.walk(directory)})


def _delegate() -> None:
    """Let the groups of version 2 have every controller.

    In a container, the first group is not the host's root, and its processes must leave it before.
    """
    with open(f"{SYSFS}/cgroup.controllers", encoding="ascii") as file:
        wanted = " ".join(f"+{name}" for name in file.read().split())
    try:
        _write(f"{SYSFS}/cgroup.subtree_control", wanted)
    except OSError:
        os.makedirs(f"{SYSFS}/init", exist_ok=True)
        with open(f"{SYSFS}/cgroup.procs", encoding="ascii") as file:
            for pid in file.read().split():
                with contextlib.suppress(OSError):  # it may have ended
                    _write(f"{SYSFS}/init/cgroup.procs", pid)
        _write(f"{SYSFS}/cgroup.subtree_control", wanted)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def end(directory: str) -> None:
    """End every container whose root file system is below `directory`, also frozen ones.

    Removes their control groups and unmounts what killed runtimes left.
    """
    groups = set()
    for pid in inside(directory):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as table:
                paths = [line.rstrip("\n").split(":", 2)[1:] for line in table]
            of_pid = {
                f"{SYSFS}/{controllers.removeprefix('name=') or ('unified' if mode() == 'hybrid' else '')}{path}"
                for controllers, path in paths
                if path != "/"
            }
            os.kill(pid, signal.SIGKILL)
            for group in of_pid:
                for file, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                    with contextlib.suppress(OSError), open(f"{group}/{file}", "r+", encoding="ascii") as freezer:
                        freezer.write(thawed)
            groups |= of_pid
    remove(groups)
    for _, point in sorted(_mounts("self", directory), reverse=True):
        if point.startswith(directory + "/"):
            subprocess.run(["umount", "-l", point], check=True)


def inside(directory: str) -> list[int]:
    """The processes whose mount namespace has a mount of `directory` that our mount namespace does not have.

    Such a mount in our own namespace proves nothing: a runtime that is killed while it starts leaves a mount (runc: of
    its binary) in its caller's namespace, which is ours, and then every process of the host sees it.
    """
    ours, found = os.stat("/proc/self/ns/mnt").st_ino, []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            # twice: a mount that comes or goes between the two readings would look the same
            if os.stat(f"/proc/{pid}/ns/mnt").st_ino != ours and all(
                _mounts(str(pid), directory) - _mounts("self", directory) for _ in range(2)
            ):
                found.append(pid)
    return found


def _mounts(pid: str, directory: str) -> set[tuple[str, str]]:
    """A process' mounts from or in `directory`: (path within the file system, mount point), see proc(5), mountinfo."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8") as file:
        return {(fields[3], fields[4]) for line in file if directory in line for fields in [line.split(" ", 5)]}


def sweep(prefix: str) -> None:
    """Remove the empty groups whose names begin with `prefix`: some runtimes leave them behind."""
    remove(set(glob.glob(f"{SYSFS}/{prefix}*") + glob.glob(f"{SYSFS}/*/{prefix}*")))


def remove(groups: set[str]) -> None:
    for _ in range(50):  # a killed process takes a moment to leave
        for group in sorted(groups):
            with contextlib.suppress(OSError):
                os.rmdir(group)
        groups = {group for group in groups if os.path.isdir(group)}
        if not groups:
            return
        time.sleep(0.02)
