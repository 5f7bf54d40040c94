"""Resolves the targets of mounts through the links of a container's image, and refuses links into /proc and /sys.

Requests and CDI files name the targets of mounts, and links in the image decide where these lead.  With a link
`/l -> /proc/sys` in the image, a mount on /l covers /proc/sys.  So this module resolves every target as the runtime
would, checks where it leads, and writes the resolved path into config.json: the runtime then finds no link on the way.

The engine's own mounts hide what the image has below them.  The root file system is assumed not to change between
create and start.  Part of the create path.
"""

from __future__ import annotations

import posix

from shim import errors, pathtext
from shim.edits import MOUNT, Edits
from shim.pathtext import absolute, clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Mapping, Optional

    from shim.edits import Mount
    from shim.shapes import Document

_FORMAT, _LINK = 0o170000, 0o120000
_KERNEL = ("/proc", "/sys")
# Whether access(2) can be asked without following links.  It costs a tenth of lstat, and most targets do not exist yet.
# Where the C library cannot do that, access fails even for /, and lstat is used.
_ACCESS = posix.access("/", posix.F_OK, follow_symlinks=False)
_DOTS = ("", ".", "..")
_KERNEL_TYPES = ("proc", "sysfs", "cgroup", "cgroup2")


def with_resolved_targets(document: Document, edits: Edits, root: str) -> Edits:
    """The edits with the targets of mounts resolved.

    `root` is the container's root file system on the host; with '', for unknown, the edits are returned unchanged.
    Raises BundleError for a target that ImageRoot.resolve refuses, and for one below another mount of these edits that
    a link in that mount's source leads elsewhere.
    """
    if not root:
        return edits
    image = ImageRoot(root, document)
    hosts, mounts = image.hosts, image.mounts
    moved: Dict[str, str] = {}
    ours: Dict[str, Mount] = {}
    directories = set()
    for kind, path, mount, origin in edits.items:
        if kind != MOUNT:
            continue
        ours[path] = mount
        # The common case, without the cost of resolve(): a target that does not exist yet, in a directory that an
        # earlier target has already made known.
        slash = path.rfind("/")
        directory = path[:slash]
        directories.add(directory)
        host_directory = hosts.get(directory)
        if (
            host_directory is not None
            and _ACCESS
            and path[slash + 1 :] not in _DOTS
            and path not in mounts
            and not (host_directory and posix.access(host_directory + path[slash:], posix.F_OK, follow_symlinks=False))
        ):
            continue
        resolved = image.resolve(path, origin)
        if resolved != path and path not in mounts:
            # A target where the engine mounts something, too, stays: the writer finds the engine's mount by this path.
            moved[path] = resolved
    for directory in directories:
        while directory:
            if directory in ours:
                _check_nested(ours, directory, {edit[1]: edit[3] for edit in edits.items if edit[0] == MOUNT})
            directory = directory[: directory.rfind("/")] if "/" in directory else ""
    if not moved:
        return edits
    return Edits(
        [
            (MOUNT, moved[edit[1]], {**edit[2], "destination": moved[edit[1]]}, edit[3])
            if edit[0] == MOUNT and edit[1] in moved
            else edit
            for edit in edits.items
        ]
    )


def _check_nested(mounts: Dict[str, Mount], outer: str, origins: Dict[str, str]) -> None:
    """Raises BundleError when a link in the source of the mount on `outer` leads the target of another mount elsewhere.

    `mounts`: our mounts by target; `origins`: where each of them came from.
    """
    source = mounts[outer].get("source")
    if not _is_bind(mounts[outer]):
        return
    inside = ImageRoot(str(source), {})
    for target, origin in origins.items():
        if target.startswith(outer + "/") and not inside.plain(clean(target[len(outer) :])):
            raise errors.BundleError(
                f"{origin}: a link in {source}, which is mounted on {outer}, leads {target} elsewhere",
                "take a target without links",
            )


class ImageRoot:
    """A container's root file system with the engine's mounts in it.

    `mounts`: the engine's mounts by destination; `hosts`: the results of `_host` so far, by path.  `exact`: resolve the
    destinations of the engine's mounts as well, which costs file system calls for each.
    """

    __slots__ = ("mounts", "_root", "hosts")

    def __init__(self, root: str, document: Document, exact: bool = False) -> None:
        self.mounts: Dict[str, Document] = {}
        self._root = root
        self.hosts: Dict[str, Optional[str]] = {"": root}
        mounts = document.get("mounts")
        by_destination = {
            absolute(mount["destination"]): mount
            for mount in (mounts if isinstance(mounts, list) else ())
            if isinstance(mount, dict) and isinstance(mount.get("destination"), str)
        }
        if exact:
            by_destination = {self._walk(path, "config.json"): mount for path, mount in by_destination.items()}
            self.hosts = {"": root}  # forget what _walk has stored: it did not know the mounts yet
        by_destination.pop("/", None)
        self.mounts = by_destination

    def resolve(self, path: str, origin: str) -> str:
        """The path with all links followed.

        Raises BundleError, whose text begins with `origin`, when links lead into /proc, /sys or another file system of
        the kernel's, when a link on the way lies in a directory that the engine mounts, where somebody may change it
        later, or when there are more than pathtext.MAX_LINKS links.
        """
        if "/." in path or "//" in path or path[-1:] == "/":
            path = clean(path)
        if self._host(path) is not None:
            return path
        resolved = self._walk(path, origin)
        kernel = self.kernel(resolved)
        if kernel and not self.kernel(path):
            raise errors.BundleError(
                f"{origin}: the image leads {path} to {resolved}, and nothing may be mounted in {kernel}",
                "take another target, or another image",
            )
        return resolved

    def plain(self, path: str) -> bool:
        """Whether neither the path nor a directory on the way to it is a link."""
        return self._host(path) is not None

    def kernel(self, path: str) -> str:
        """The destination of the kernel's file system (proc, sysfs, cgroup) that a resolved path is in; '' for none."""
        mounted = [destination for destination, mount in self.mounts.items() if mount.get("type") in _KERNEL_TYPES]
        return next((top for top in (*_KERNEL, *mounted) if path == top or path.startswith(top + "/")), "")

    def within_bind(self, path: str) -> str:
        """The destination of the engine's bind mount that a resolved path lies below; '' for none."""
        return next(
            (
                destination
                for destination, mount in self.mounts.items()
                if path.startswith(destination + "/") and _is_bind(mount)
            ),
            "",
        )

    def _host(self, path: str) -> Optional[str]:
        """The path on the host of a path in the container.

        '' when nothing exists there on the host; None when the path, or a directory on the way to it, is a link.
        """
        if path in self.hosts:
            return self.hosts[path]
        above = self._host(path.rpartition("/")[0])
        mount = self.mounts.get(path) if self.mounts else None
        host: Optional[str] = above
        if above is not None and mount is not None:
            host = str(mount.get("source") or "") if _is_bind(mount) else ""
        elif above:
            host = f"{above}/{path.rpartition('/')[2]}"
            try:
                if not _ACCESS or posix.access(host, posix.F_OK, follow_symlinks=False):
                    if posix.lstat(host).st_mode & _FORMAT == _LINK:
                        host = None
                else:
                    host = ""
            except (OSError, ValueError):  # nothing there, or a NUL in the path
                host = ""
        self.hosts[path] = host
        return host

    def _walk(self, path: str, origin: str) -> str:
        """The path as a process in the container's root (chroot(2)) would resolve it."""

        def link(directory: str, name: str) -> str:
            above = self._host(directory)
            if self._host(f"{directory}/{name}") is not None:
                return ""
            if directory in self.mounts or self.within_bind(directory):
                raise errors.BundleError(
                    f"{origin}: {directory}/{name}, on the way to {path}, is a link in a directory that the engine "
                    "mounts",
                    "take a target without links",
                )
            return posix.readlink(f"{above}/{name}")

        resolved = pathtext.follow(path, link)
        if not resolved:
            raise errors.BundleError(
                f"{origin}: the image has more than {pathtext.MAX_LINKS} links on the way to {path}"
            )
        return resolved


def _is_bind(mount: Mapping[str, object]) -> bool:
    options = mount.get("options")
    return mount.get("type") == "bind" or isinstance(options, list) and ("bind" in options or "rbind" in options)
