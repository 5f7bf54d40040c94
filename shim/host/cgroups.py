"""Control groups: what this host has, and where a built container's group goes.

`survey` looks and changes nothing; `place` chooses the path for config.json's cgroupsPath, and where the builder itself
runs in a container makes room beside its own process.  Everything goes through a Tree, so that tests bring their own.
Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst; OCI runtime specification, "Cgroups Path".
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from shim.errors import HostError, RequestError
from shim.host import kernel

VARIABLE = "CHANDLER_CGROUP_PARENT"
LEAF, CONTAINERS = "init", "containers"  # the builder's own group, and the one that containers' groups go into
REMEDIES = (
    "start the container that Chandler runs in with the host's cgroup namespace (--cgroupns=host), "
    f"or set {VARIABLE} to a group that can be written to, or make /sys/fs/cgroup writable"
)
_HOST_INITS = ("/", "/init.scope")  # where a host's own first process is
_LIMITS = {
    "memory": "memory",
    "cpu": "cpu",
    "pids": "pids",
    "blockIO": "io",
    "hugepageLimits": "hugetlb",
}  # linux.resources: the controller
_NEEDED = ("memory", "cpu", "pids", "devices")  # of version 1: the hierarchies in which a container gets a group
_MAX_FILE = 1 << 20


class CgroupTree:
    """The host's files below `root`; '' for the host itself."""

    def __init__(self, root: str = "") -> None:
        self._root = root

    def read(self, path: str) -> str:
        """The text of a file; '' when it cannot be read."""
        try:
            with open(self._root + path, encoding="utf-8", errors="surrogateescape") as file:
                return file.read(_MAX_FILE)
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether there is something at `path`."""
        return os.path.exists(self._root + path)

    def writable(self, path: str) -> bool:
        """Whether groups can be made in a directory."""
        return os.access(self._root + path, os.W_OK | os.X_OK)

    def make(self, path: str) -> None:
        """A group, if it is not there.  Raises OSError."""
        os.makedirs(self._root + path, exist_ok=True)

    def write(self, path: str, text: str) -> bool:
        """One write to a file that is there; False when the kernel does not take it."""
        try:
            descriptor = os.open(self._root + path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            os.write(descriptor, text.encode())
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


class Survey(NamedTuple):
    """What there is.

    `version`: none, v1, v2 or hybrid (both; containers then live in v1).  `mount`: where the hierarchy with the
    controllers is mounted (v1: the directory with one for each).  `own`: the path of our own group below that, with
    /init taken off where Chandler made it; '' where the hierarchies disagree.  `nested`: whether this process runs in
    a container.  `writable`: whether groups can be made at the top, and beside us.  `controllers`: all that are there;
    `delegated`: those that groups made beside us would have.
    """

    version: str
    mount: str
    own: str
    nested: bool
    root_writable: bool
    own_writable: bool
    controllers: List[str]
    delegated: List[str]


class Placement(NamedTuple):
    """`path` for config.json ('' leaves it to the runtime), who said so, and what was tried in vain."""

    path: str
    chosen_by: str
    notes: List[str]


class _Mount(NamedTuple):
    root: str
    point: str
    options: List[str]


def survey(tree: Optional[CgroupTree] = None) -> Survey:
    """A look at the host's control groups."""
    tree = tree or CgroupTree()
    second, first = _mounts(tree.read("/proc/self/mountinfo"))
    ours, init = _groups(tree.read("/proc/self/cgroup")), _groups(tree.read("/proc/1/cgroup"))
    if first:
        return _survey_first(tree, first, bool(second), ours, init)
    if second is None:
        return Survey("none", "", "", False, False, False, [], [])
    own = _below(ours.get("", "/"), second.root)
    at_init = _below(init.get("", "/"), second.root)
    if own.endswith(f"/{LEAF}") and tree.exists(f"{second.point}{own[: -len(LEAF)]}{CONTAINERS}"):
        own = own[: -len(LEAF) - 1] or "/"
    here = _join(second.point, own)
    # the real root group has no cgroup.type: one that has is somebody's, shown to us as a root by a namespace
    nested = tree.exists(f"{second.point}/cgroup.type") or at_init not in _HOST_INITS
    return Survey(
        "v2",
        second.point,
        own,
        nested,
        tree.writable(second.point),
        tree.writable(here),
        tree.read(f"{second.point}/cgroup.controllers").split(),
        tree.read(f"{here}/cgroup.subtree_control").split(),
    )


def _survey_first(
    tree: CgroupTree, mounts: Dict[str, _Mount], hybrid: bool, ours: Dict[str, str], init: Dict[str, str]
) -> Survey:
    needed = [name for name in _NEEDED if name in mounts] or list(mounts)
    paths = {_below(ours.get(name, "/"), mounts[name].root) for name in needed}
    own = paths.pop() if len(paths) == 1 else ""
    nested = any(
        _below(init.get(name, "/"), mounts[name].root) not in _HOST_INITS or mounts[name].root != "/" for name in needed
    )
    points = [mounts[name].point for name in needed]
    return Survey(
        "hybrid" if hybrid else "v1",
        os.path.dirname(points[0]),
        own,
        nested,
        all(tree.writable(point) for point in points),
        all(tree.writable(_join(point, own or "/")) for point in points),
        sorted(mounts),
        sorted(mounts),
    )


def _mounts(text: str) -> Tuple[Optional[_Mount], Dict[str, _Mount]]:
    """The mount of version 2, and those of version 1 by controller (proc(5), mountinfo)."""
    second: Optional[_Mount] = None
    first: Dict[str, _Mount] = {}
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(), rest.split()
        if len(words) < 6 or len(kind) < 3:
            continue
        mount = _Mount(words[3], words[4], kind[2].split(","))
        # what is mounted over a place hides what was there and below it
        if second is not None and _hides(mount.point, second.point):
            second = None
        first = {name: below for name, below in first.items() if not _hides(mount.point, below.point)}
        if kind[0] == "cgroup2":
            second = second or mount
        elif kind[0] == "cgroup":
            for name in mount.options:
                if name not in ("rw", "ro", "xattr", "noprefix", "clone_children") and "=" not in name:
                    first.setdefault(name, mount)
    return second, first


def _hides(above: str, point: str) -> bool:
    return (point + "/").startswith(above.rstrip("/") + "/") and above != "/"


def _groups(text: str) -> Dict[str, str]:
    """The path by controller; version 2's under ''."""
    return {name: path for controllers, path in kernel.cgroups(text).items() for name in controllers.split(",")}


def _below(path: str, root: str) -> str:
    """A group's path as seen below a mount whose root is another group (a bind mount, or another namespace)."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :] or "/"
    return "/" if path.startswith("/..") else path


def _join(*parts: str) -> str:
    return "/" + "/".join(part.strip("/") for part in parts if part.strip("/"))


# --- placement ------------------------------------------------------------------------------------------------


def in_parent(parent: str, name: str, systemd: bool = False) -> str:
    """cgroupsPath for a container in a parent that somebody names.  Raises RequestError."""
    parts = [part for part in parent.split("/") if part]
    if ".." in parts or "." in parts or not parent.isprintable() or ":" in parent:
        raise RequestError(
            f"{parent!r} is no control group", "write a path such as /team-a, or a slice such as team-a.slice"
        )
    if systemd:
        if not parts or not parts[-1].endswith(".slice"):
            raise RequestError(
                f"{parent!r} is no slice, and systemd makes the control groups", "write a slice such as team-a.slice"
            )
        return f"{parts[-1]}:chandler:{name}"
    if not parent.startswith("/"):
        raise RequestError(
            f"{parent!r} is no control group",
            "write it from the top, such as /team-a"
            + ("; a slice is for --systemd-cgroup" if parent.endswith(".slice") else ""),
        )
    return _join(*parts, name)


def controllers(resources: Dict[str, Any]) -> List[str]:
    """The controllers of version 2 that the limits in linux.resources need."""
    found = [controller for key, controller in _LIMITS.items() if resources.get(key)]
    cpu = resources.get("cpu") or {}
    return [*found, "cpuset"] if "cpus" in cpu or "mems" in cpu else found


def place(
    name: str,
    asked: str = "",
    variable: str = "",
    systemd: bool = False,
    rootless: bool = False,
    move: Optional[int] = None,
    tree: Optional[CgroupTree] = None,
    needed: Sequence[str] = (),
) -> Placement:
    """Where the group of container `name` goes: `asked` by its request, else `variable` (CHANDLER_CGROUP_PARENT), else
    beside this process where it runs in a container, else wherever the runtime puts it.

    `move`: the process to move into the leaf (None: nothing is changed).  Doing it again changes nothing more.
    `needed`: the controllers without which the container cannot have its limits. Raises RequestError for a parent
    that is none, and HostError, with the remedies, when no parent can be written to, or one of ours cannot hand on
    what is needed.
    """
    for parent, by in ((asked, "cgroup_parent"), (variable, VARIABLE)):
        if parent:
            try:
                return Placement(in_parent(parent, name, systemd), by, [])
            except RequestError as error:
                raise error.within(by) from None
    if systemd:
        return Placement(in_parent("user.slice" if rootless else "system.slice", name, True), "systemd", [])
    tree = tree or CgroupTree()
    found = survey(tree)
    if found.version == "none" or rootless and not found.nested:
        return Placement("", "the runtime", [])
    if not found.nested:
        if not found.root_writable:
            raise _no_parent(name, found.mount)
        return Placement("", "the runtime", [])
    if not found.own:
        return Placement("", "the runtime", ["the control groups of this process disagree between hierarchies"])
    notes: List[str] = []
    if move is not None and found.version == "v2":
        notes = _make_room(tree, _join(found.mount, found.own), move, name, needed)
    elif not found.own_writable and not tree.writable(_join(found.mount, found.own, CONTAINERS)):
        raise _no_parent(name, _join(found.mount, found.own))
    return Placement(_join(found.own, CONTAINERS, name), "/proc/self/cgroup", notes)


def _make_room(tree: CgroupTree, here: str, process: int, name: str, needed: Sequence[str]) -> List[str]:
    """A group for containers beside one for us, since a group with processes hands no controllers on."""
    there = tree.read(f"{here}/cgroup.controllers").split()
    for controller in needed:
        if controller not in there:
            raise _no_controller(name, here, controller, "it was handed on to nobody here")
    try:
        tree.make(f"{here}/{LEAF}")
        tree.make(f"{here}/{CONTAINERS}")
    except OSError:
        raise _no_parent(name, here) from None
    notes = []
    if str(process) not in tree.read(f"{here}/{LEAF}/cgroup.procs").split() and not tree.write(
        f"{here}/{LEAF}/cgroup.procs", str(process)
    ):
        notes.append(f"process {process} could not be moved into {here}/{LEAF}")
    for controller in there:
        for group in (here, f"{here}/{CONTAINERS}"):
            if controller in tree.read(f"{group}/cgroup.subtree_control").split():
                continue
            if not tree.write(f"{group}/cgroup.subtree_control", f"+{controller}"):
                if controller in needed:
                    others = tree.read(f"{group}/cgroup.procs").split()
                    raise _no_controller(
                        name,
                        group,
                        controller,
                        f"other processes are in it, such as {', '.join(others[:3])}"
                        if others
                        else "the kernel does not let it",
                    )
                notes.append(f"{group} does not hand on the controller {controller}: other processes may be in it")
                break
    return notes


def _no_controller(name: str, group: str, controller: str, why: str) -> HostError:
    return HostError(
        f"{name} is to have a limit, and {group} cannot hand on the controller {controller} that it needs: {why}",
        f"start the builder in a group of its own that has it, or set {VARIABLE} to a group that hands it on",
    )


def _no_parent(name: str, where: str) -> HostError:
    return HostError(f"there is no control group to put {name} into: {where} cannot be written to", REMEDIES)


def remedy(found: Survey, rootless: bool) -> List[Dict[str, Any]]:
    """What stands in the way of containers and their limits, each as `problem` and `remedy`."""
    problems: List[Dict[str, Any]] = []
    if found.version == "none":
        problems.append(
            {
                "problem": "no control groups are mounted, so no container can have a limit",
                "remedy": "mount -t cgroup2 none /sys/fs/cgroup",
            }
        )
    elif rootless:
        if found.version == "v2" and not found.own_writable:
            problems.append(
                {
                    "problem": "limits do not work without root: the control group of this session is not yours",
                    "remedy": "systemctl edit user@.service, with Delegate=cpu cpuset io memory pids",
                }
            )
    elif not (found.own_writable if found.nested else found.root_writable):
        problems.append({"problem": f"no control group can be made in {found.mount}", "remedy": REMEDIES})
    missing = [name for name in ("cpu", "memory", "pids") if name not in found.controllers]
    if found.version != "none" and missing and not rootless:
        problems.append(
            {
                "problem": f"there is no control group controller for {', '.join(missing)}",
                "remedy": "see cgroup_disable= on the kernel's command line, and what the outer container hands on",
            }
        )
    return problems
