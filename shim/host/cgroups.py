"""Control groups: finds what this host has, and chooses the group of a container that `chandler bundle` builds.

`survey` looks and changes nothing.  `choose_group` chooses config.json's cgroupsPath.  If the builder itself runs in a
container, `choose_group` makes a group for containers beside the builder's own process.  All files are read and written
through a CgroupTree, which tests replace.
Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst; OCI runtime specification, "Cgroups Path".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from shim.errors import HostError, RequestError
from shim.host import kernel
from shim.shapes import Document

VARIABLE = "CHANDLER_CGROUP_PARENT"
LEAF, CONTAINERS = "init", "containers"  # the builder's own group, and the parent of the containers' groups
REMEDIES = (
    "start the container that Chandler runs in with the host's cgroup namespace (--cgroupns=host), "
    f"or set {VARIABLE} to a group that can be written to, or make /sys/fs/cgroup writable"
)
_HOST_INITS = ("/", "/init.scope")  # the groups that process 1 of a host can be in
# key of linux.resources: the v2 controller that it needs
_LIMITS = {"memory": "memory", "cpu": "cpu", "pids": "pids", "blockIO": "io", "hugepageLimits": "hugetlb"}
_NEEDED = ("memory", "cpu", "pids", "devices")  # the v1 hierarchies in which a container gets a group
_MAX_FILE = 1 << 20  # characters


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
        """Whether `path` exists."""
        return os.path.exists(self._root + path)

    def writable(self, path: str) -> bool:
        """Whether we may make groups in a directory."""
        return os.access(self._root + path, os.W_OK | os.X_OK)

    def make(self, path: str) -> None:
        """Makes a group, if it does not exist.  Raises OSError."""
        os.makedirs(self._root + path, exist_ok=True)

    def write(self, path: str, text: str) -> bool:
        """Writes `text` to an existing file in one call; False when the kernel refuses it."""
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
    """The control groups of this host, as this process sees them.

    `version`: none, v1, v2 or hybrid (both; containers then use v1).  `mount`: the mount point of the hierarchy with
    the controllers (v1: the directory of all of their mount points).  `own`: the path of our own group below that,
    without an /init that Chandler made; '' when the v1 hierarchies disagree.  `nested`: whether this process runs in a
    container.  `root_writable`, `own_writable`: whether we may make groups at the top, and in `own`.  `controllers`:
    all that exist; `delegated`: those that groups in `own` would have.
    """

    version: str
    mount: str
    own: str
    nested: bool
    root_writable: bool
    own_writable: bool
    controllers: list[str]
    delegated: list[str]


class Placement(NamedTuple):
    """Where a container's group goes.

    `path`: cgroupsPath for config.json, '' to leave it to the runtime.  `chosen_by`: what decided this, for people.
    `notes`: what could not be set up, for people.
    """

    path: str
    chosen_by: str
    notes: list[str]


class _Mount(NamedTuple):
    root: str
    point: str
    options: list[str]


def survey(tree: CgroupTree | None = None) -> Survey:
    """Looks at the host's control groups."""
    tree = tree or CgroupTree()
    v2_mount, v1_mounts = _mounts(tree.read("/proc/self/mountinfo"))
    ours, init = _groups(tree.read("/proc/self/cgroup")), _groups(tree.read("/proc/1/cgroup"))
    if v1_mounts:
        return _survey_v1(tree, v1_mounts, bool(v2_mount), ours, init)
    if v2_mount is None:
        return Survey("none", "", "", False, False, False, [], [])
    own = _below(ours.get("", "/"), v2_mount.root)
    at_init = _below(init.get("", "/"), v2_mount.root)
    if own.endswith(f"/{LEAF}") and tree.exists(f"{v2_mount.point}{own[: -len(LEAF)]}{CONTAINERS}"):
        own = own[: -len(LEAF) - 1] or "/"
    here = _join(v2_mount.point, own)
    # The real root group has no cgroup.type.  One that has it is another group, which a cgroup namespace shows as root.
    nested = tree.exists(f"{v2_mount.point}/cgroup.type") or at_init not in _HOST_INITS
    return Survey(
        "v2",
        v2_mount.point,
        own,
        nested,
        tree.writable(v2_mount.point),
        tree.writable(here),
        tree.read(f"{v2_mount.point}/cgroup.controllers").split(),
        tree.read(f"{here}/cgroup.subtree_control").split(),
    )


def _survey_v1(
    tree: CgroupTree, mounts: dict[str, _Mount], hybrid: bool, ours: dict[str, str], init: dict[str, str]
) -> Survey:
    """`survey` for cgroup v1, and for hybrid."""
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


def _mounts(text: str) -> tuple[_Mount | None, dict[str, _Mount]]:
    """The mount of v2, and the mounts of v1 by controller.  Source: proc(5), mountinfo."""
    v2_mount: _Mount | None = None
    v1_mounts: dict[str, _Mount] = {}
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(), rest.split()
        if len(words) < 6 or len(kind) < 3:
            continue
        mount = _Mount(words[3], words[4], kind[2].split(","))
        # a later mount hides the earlier ones at and below its mount point
        if v2_mount is not None and _hides(mount.point, v2_mount.point):
            v2_mount = None
        v1_mounts = {name: below for name, below in v1_mounts.items() if not _hides(mount.point, below.point)}
        if kind[0] == "cgroup2":
            v2_mount = v2_mount or mount
        elif kind[0] == "cgroup":
            for name in mount.options:
                if name not in ("rw", "ro", "xattr", "noprefix", "clone_children") and "=" not in name:
                    v1_mounts.setdefault(name, mount)
    return v2_mount, v1_mounts


def _hides(above: str, point: str) -> bool:
    """Whether a mount at `above` hides a mount at `point`."""
    return (point + "/").startswith(above.rstrip("/") + "/") and above != "/"


def _groups(text: str) -> dict[str, str]:
    """The group's path by controller; that of v2 is under ''."""
    return {name: path for controllers, path in kernel.cgroups(text).items() for name in controllers.split(",")}


def _below(path: str, root: str) -> str:
    """A group's path relative to a mount whose root is the group `root` (a bind mount, or another namespace)."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :] or "/"
    return "/" if path.startswith("/..") else path


def _join(*parts: str) -> str:
    return "/" + "/".join(part.strip("/") for part in parts if part.strip("/"))


# --- placement ------------------------------------------------------------------------------------------------


def in_parent(parent: str, name: str, systemd: bool = False) -> str:
    """cgroupsPath for the container `name` in a parent group that was asked for.  Raises RequestError.

    `systemd`: whether the runtime has systemd make the group (--systemd-cgroup); the parent is then a slice.
    """
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


def controllers(resources: Document) -> list[str]:
    """The v2 controllers that the limits in linux.resources need."""
    needed = [controller for key, controller in _LIMITS.items() if resources.get(key)]
    cpu = resources.get("cpu") or {}
    return [*needed, "cpuset"] if "cpus" in cpu or "mems" in cpu else needed


def choose_group(
    name: str,
    asked: str = "",
    variable: str = "",
    systemd: bool = False,
    rootless: bool = False,
    move: int | None = None,
    tree: CgroupTree | None = None,
    needed: Sequence[str] = (),
) -> Placement:
    """Chooses where the group of container `name` goes.

    The first of these that applies: `asked`, the parent in its request; `variable`, the value of
    CHANDLER_CGROUP_PARENT; beside this process, if it runs in a container; the runtime's own choice.
    `systemd`: see in_parent.  `move`: the pid to move into the group LEAF, None to change nothing; a second call
    changes nothing more.  `needed`: the controllers that the container's limits need.
    Raises RequestError for a parent that is not a control group.  Raises HostError, with remedies, when we may not
    write to the parent, or it cannot pass a needed controller on.
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
    host = survey(tree)
    if host.version == "none" or rootless and not host.nested:
        return Placement("", "the runtime", [])
    if not host.nested:
        if not host.root_writable:
            raise _no_parent(name, host.mount)
        return Placement("", "the runtime", [])
    if not host.own:
        return Placement("", "the runtime", ["the control groups of this process disagree between hierarchies"])
    notes: list[str] = []
    if move is not None and host.version == "v2":
        notes = _make_room(tree, _join(host.mount, host.own), move, name, needed)
    elif not host.own_writable and not tree.writable(_join(host.mount, host.own, CONTAINERS)):
        raise _no_parent(name, _join(host.mount, host.own))
    return Placement(_join(host.own, CONTAINERS, name), "/proc/self/cgroup", notes)


def _make_room(tree: CgroupTree, here: str, process: int, name: str, needed: Sequence[str]) -> list[str]:
    """Makes the groups CONTAINERS and LEAF in `here`, moves `process` into LEAF, and enables all controllers.

    A group with processes cannot enable controllers for its children (cgroups(7), the "no internal processes" rule), so
    the process has to leave `here`.  Gives the notes of Placement.  Raises HostError.
    """
    available = tree.read(f"{here}/cgroup.controllers").split()
    for controller in needed:
        if controller not in available:
            raise _no_controller(name, here, controller, "the group above does not hand it on")
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
    for controller in available:
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


def remedy(host: Survey, rootless: bool) -> list[Document]:
    """What prevents containers or their limits from working: a list of dicts with `problem` and `remedy`."""
    problems: list[Document] = []
    if host.version == "none":
        problems.append(
            {
                "problem": "no control groups are mounted, so no container can have a limit",
                "remedy": "mount -t cgroup2 none /sys/fs/cgroup",
            }
        )
    elif rootless:
        if host.version == "v2" and not host.own_writable:
            problems.append(
                {
                    "problem": "limits do not work without root: the control group of this session is not yours",
                    "remedy": "systemctl edit user@.service, with Delegate=cpu cpuset io memory pids",
                }
            )
    elif not (host.own_writable if host.nested else host.root_writable):
        problems.append({"problem": f"no control group can be made in {host.mount}", "remedy": REMEDIES})
    missing = [name for name in ("cpu", "memory", "pids") if name not in host.controllers]
    if host.version != "none" and missing and not rootless:
        problems.append(
            {
                "problem": f"there is no control group controller for {', '.join(missing)}",
                "remedy": "see cgroup_disable= on the kernel's command line, and what the outer container hands on",
            }
        )
    return problems
