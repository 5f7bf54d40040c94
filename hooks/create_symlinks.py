"""create-symlinks: makes symbolic links in a container, each given as `--link TARGET::PATH`.

The hook writes links and never follows them.  It replaces a link or an empty file of the image, and leaves anything
else in place.  (A runtime that mounts libraries into a container leaves empty files in an image that is made from it.)
When a link cannot be made, the hook prints a line and goes on, since most programs work without it.
"""

from __future__ import annotations

import errno
import os
import stat

from hooks.bounds import say
from hooks.container import Container, HookError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.host.inroot import Root


MAX_LINKS = 4096
MAX_PATH = 1024  # bytes of a path and of a link's target; the kernel's limit is 4096


def parse(arguments: list[str]) -> list[tuple[str, str]]:
    """The links as (path, target).  Raises HookError."""
    if len(arguments) % 2 or set(arguments[::2]) - {"--link"} or len(arguments) > 2 * MAX_LINKS:
        raise HookError(f"the arguments are `--link TARGET::PATH`, at most {MAX_LINKS} times")
    pairs = []
    for word in arguments[1::2]:
        target, _, path = word.partition("::")
        if not target or not path.startswith("/") or path.endswith("/") or path.rpartition("/")[2] in (".", ".."):
            raise HookError(f"{word[:MAX_PATH]!r} is not of the form TARGET::/ABSOLUTE/PATH")
        if max(len(os.fsencode(target)), len(os.fsencode(path))) > MAX_PATH:
            raise HookError(f"the link {path[:60]}… or its target is longer than {MAX_PATH} bytes")
        pairs.append((path, target))
    return pairs


def run(container: Container, pairs: list[tuple[str, str]]) -> int:
    """Makes the links.  Always returns 0."""
    nodes = container.nodes()
    for path, target in pairs:
        if path.startswith("/dev/") and os.path.normpath(os.path.join(os.path.dirname(path), target)) not in nodes:
            continue  # a link to a device that this container does not have
        try:
            root, inside = _root(container, path)
            make(root, inside, target)
        except OSError as error:
            why = "something is mounted there" if error.errno == errno.EXDEV else error.strerror
            say(f"create-symlinks: {path} was not made: {why}")
    return 0


def _root(container: Container, path: str) -> tuple[Root, str]:
    """The root to make a link in, and the link's path from there.

    /dev is a file system of its own.  The hook writes to it only when it is the container's, which means that
    config.json mounts a new tmpfs there.  Raises OSError (EXDEV) when it is another file system, which may be the
    host's.
    """
    if not path.startswith("/dev/"):
        return container.root, path
    mounts = container.mounts_at("/dev")
    if not mounts:
        return container.root, path
    if mounts[-1].get("type") != "tmpfs" or {"bind", "rbind"} & set(mounts[-1].get("options") or ()):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    descriptor = container.root.find("/dev", cross=True, follow=False)
    try:
        return type(container.root)(f"/proc/self/fd/{descriptor}", container.root.kernel), path[len("/dev") :]
    finally:
        os.close(descriptor)


def make(root: Root, path: str, target: str) -> None:
    """Makes one link.  Raises OSError when that fails, with EEXIST when the image has something else there."""
    folder, _, name = path.rpartition("/")
    directory = root.directory(folder or "/", make=True)
    try:
        try:
            os.symlink(target, name, dir_fd=directory)
        except FileExistsError:
            status = os.lstat(name, dir_fd=directory)
            if stat.S_ISLNK(status.st_mode):
                present = os.readlink(name, dir_fd=directory)
            elif stat.S_ISREG(status.st_mode) and not status.st_size:
                present = ""  # no link has an empty target
            else:
                raise FileExistsError(errno.EEXIST, "the image has a file of that name") from None
            if present != target:
                os.unlink(name, dir_fd=directory)
                os.symlink(target, name, dir_fd=directory)
    finally:
        os.close(directory)
