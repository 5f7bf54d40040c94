"""Where a path inside a container leads once the links of its image are followed, before anything is mounted there.

A request and a CDI file name targets of mounts; the image decides where they lead.  With a link `/l -> /proc/sys` in
the image, a mount on /l covers /proc/sys.  So every target is resolved as the runtime is going to resolve it, judged,
and written to config.json resolved, so that the runtime meets no link.  The engine's own mounts hide what the image
has below them.  The root file system is taken to stand still between create and start.  Part of the create path.
"""

from __future__ import annotations

import posix

from shim import errors, pathtext
from shim.edits import MOUNT, Edits
from shim.pathtext import absolute, clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional

_FORMAT, _LINK = 0o170000, 0o120000
_KERNEL = ("/proc", "/sys")
# Most targets are not there yet, and access costs a tenth of lstat.  A C library that cannot leave links alone says
# of / itself that it is not there.
_ACCESS = posix.access("/", posix.F_OK, follow_symlinks=False)
_DOTS = ("", ".", "..")
_KERNEL_TYPES = ("proc", "sysfs", "cgroup", "cgroup2")


def judged(document: Dict[str, Any], edits: Edits, root: str) -> Edits:
    """The same edits, the targets of mounts resolved in `root`, the container's root file system on the host ('' where
    it is not known: the edits stay as they are).

    Raises BundleError for a target that a link leads below /proc or /sys.
    """
    if not root:
        return edits
    image = ImageRoot(root, document)
    hosts, mounts = image.hosts, image.mounts
    moved: Dict[str, str] = {}
    ours: Dict[str, Any] = {}
    directories = set()
    for kind, path, mount, origin in edits.items:
        if kind != MOUNT:
            continue
        ours[path] = mount
        # most targets are files that are not there yet, in a directory that was looked at for the one before
        at = path.rfind("/")
        directory = path[:at]
        directories.add(directory)
        above = hosts.get(directory)
        if (
            above is not None
            and _ACCESS
            and path[at + 1 :] not in _DOTS
            and path not in mounts
            and not (above and posix.access(above + path[at:], posix.F_OK, follow_symlinks=False))
        ):
            continue
        resolved = image.resolve(path, origin)
        if resolved != path and path not in mounts:
            moved[path] = resolved  # a mount of the engine's at the very same path is replaced, and found by that path
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


def _check_nested(mounts: Dict[str, Any], outer: str, origins: Dict[str, str]) -> None:
    """A target below a directory that is mounted by the same edits, `outer`: no link in it may lead the target
    elsewhere."""
    source = mounts[outer].get("source")
    if not _bound(mounts[outer]):
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

    `mounts`: the engine's mounts by destination; `hosts`: what `_host` has found so far.  `exact`: the destinations are
    resolved, too; costs a look at each.
    """

    __slots__ = ("mounts", "_root", "hosts")

    def __init__(self, root: str, document: Dict[str, Any], exact: bool = False) -> None:
        self.mounts: Dict[str, Dict[str, Any]] = {}
        self._root = root
        self.hosts: Dict[str, Optional[str]] = {"": root}
        mounts = document.get("mounts")
        found = {
            absolute(mount["destination"]): mount
            for mount in (mounts if isinstance(mounts, list) else ())
            if isinstance(mount, dict) and isinstance(mount.get("destination"), str)
        }
        if exact:
            found = {self._walk(path, "config.json"): mount for path, mount in found.items()}
            self.hosts = {"": root}  # what was seen without the mounts
        found.pop("/", None)
        self.mounts = found

    def resolve(self, path: str, origin: str) -> str:
        """The path with all links followed.  Raises BundleError, which begins with `origin`, when a link leads below
        /proc or /sys, or into a mount of the engine's in which somebody else may move links."""
        if "/." in path or "//" in path or path[-1:] == "/":
            path = clean(path)
        if self._host(path) is not None:
            return path
        resolved = self._walk(path, origin)
        kernel = self.kernel(resolved)
        if kernel and not self.kernel(path):
            raise errors.BundleError(
                f"{origin}: the image leads {path} to {resolved}, and nothing is mounted over {kernel}",
                "take another target, or another image",
            )
        return resolved

    def plain(self, path: str) -> bool:
        """Whether no link is on the way to a path, nor at its end."""
        return self._host(path) is not None

    def kernel(self, path: str) -> str:
        """The kernel's file system that a resolved path is in, or ''."""
        kernel = [destination for destination, mount in self.mounts.items() if mount.get("type") in _KERNEL_TYPES]
        return next((each for each in (*_KERNEL, *kernel) if path == each or path.startswith(each + "/")), "")

    def within_bind(self, path: str) -> str:
        """The destination of a bind mount of the engine's that a resolved path lies below, or ''."""
        return next(
            (
                destination
                for destination, mount in self.mounts.items()
                if path.startswith(destination + "/") and _bound(mount)
            ),
            "",
        )

    def _host(self, path: str) -> Optional[str]:
        """Where a path of the container lies on the host: '' while nothing is there, None when the path, or a
        directory on the way to it, is a link."""
        if path in self.hosts:
            return self.hosts[path]
        above = self._host(path.rpartition("/")[0])
        mount = self.mounts.get(path) if self.mounts else None
        found: Optional[str] = above
        if above is not None and mount is not None:
            found = str(mount.get("source") or "") if _bound(mount) else ""
        elif above:
            found = f"{above}/{path.rpartition('/')[2]}"
            try:
                if not _ACCESS or posix.access(found, posix.F_OK, follow_symlinks=False):
                    if posix.lstat(found).st_mode & _FORMAT == _LINK:
                        found = None
                else:
                    found = ""
            except (OSError, ValueError):  # nothing there, or a NUL in the path
                found = ""
        self.hosts[path] = found
        return found

    def _walk(self, path: str, origin: str) -> str:
        """The path as chroot(2) would resolve it."""

        def link(here: str, part: str) -> str:
            above = self._host(here)
            if self._host(f"{here}/{part}") is not None:
                return ""
            if here in self.mounts or self.within_bind(here):
                raise errors.BundleError(
                    f"{origin}: {here}/{part}, on the way to {path}, is a link in a directory that the engine mounts",
                    "take a target without links",
                )
            return posix.readlink(f"{above}/{part}")

        resolved = pathtext.follow(path, link)
        if not resolved:
            raise errors.BundleError(
                f"{origin}: the image has more than {pathtext.MAX_LINKS} links on the way to {path}"
            )
        return resolved


def _bound(mount: Dict[str, Any]) -> bool:
    options = mount.get("options")
    return mount.get("type") == "bind" or isinstance(options, list) and ("bind" in options or "rbind" in options)
