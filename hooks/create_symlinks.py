"""create-symlinks: makes links in a container, each given as `--link WHAT-IT-SAYS::PATH`.

A link is written, never followed.  What the image has in its place stays, unless it is a link, too, or an empty file,
which is what a runtime that mounts libraries leaves in an image that is made from its container.  A link that cannot be
made is told of and passed over, since most programs do without.
"""

from __future__ import annotations

import errno
import os
import stat

from hooks.bounds import say
from hooks.container import Container, Wrong

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Tuple

    from shim.host.inroot import Root


MAX_LINKS = 4096
MAX_PATH = 1024  # bytes of a path, and of what a link says; the kernel's limit is 4096


def parse(arguments: List[str]) -> List[Tuple[str, str]]:
    """Pairs of path and what the link there says.  Raises Wrong."""
    if len(arguments) % 2 or set(arguments[::2]) - {"--link"} or len(arguments) > 2 * MAX_LINKS:
        raise Wrong(f"the arguments are `--link WHAT-IT-SAYS::PATH`, at most {MAX_LINKS} times")
    pairs = []
    for word in arguments[1::2]:
        says, _, path = word.partition("::")
        if not says or not path.startswith("/") or path.endswith("/") or path.rpartition("/")[2] in (".", ".."):
            raise Wrong(f"{word[:MAX_PATH]!r} is not of the form WHAT-IT-SAYS::/ABSOLUTE/PATH")
        if max(len(os.fsencode(says)), len(os.fsencode(path))) > MAX_PATH:
            raise Wrong(f"the link {path[:60]}… or what it says is longer than {MAX_PATH} bytes")
        pairs.append((path, says))
    return pairs


def run(container: Container, pairs: List[Tuple[str, str]]) -> int:
    """Makes the links; always 0."""
    nodes = container.nodes()
    for path, says in pairs:
        if path.startswith("/dev/") and os.path.normpath(os.path.join(os.path.dirname(path), says)) not in nodes:
            continue  # a link to a device that this container does not have
        try:
            root, inside = _root(container, path)
            make(root, inside, says)
        except OSError as error:
            why = "something is mounted there" if error.errno == errno.EXDEV else error.strerror
            say(f"create-symlinks: {path} was not made: {why}")
    return 0


def _root(container: Container, path: str) -> Tuple[Root, str]:
    """The file system to make a link in.  /dev is one of its own, and may be written to when it is the container's:
    config.json mounts a new tmpfs there, not a directory of the host."""
    if not path.startswith("/dev/"):
        return container.root, path
    mounts = container.mounts_at("/dev")
    if not mounts:
        return container.root, path
    if mounts[-1].get("type") != "tmpfs" or {"bind", "rbind"} & set(mounts[-1].get("options") or ()):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    found = container.root.find("/dev", cross=True, follow=False)
    try:
        return type(container.root)(f"/proc/self/fd/{found}", container.root.kernel), path[len("/dev") :]
    finally:
        os.close(found)


def make(root: Root, path: str, says: str) -> None:
    """One link; OSError when it cannot be made, EEXIST when the image has something else there."""
    folder, _, name = path.rpartition("/")
    directory = root.directory(folder or "/", make=True)
    try:
        try:
            os.symlink(says, name, dir_fd=directory)
        except FileExistsError:
            found = os.lstat(name, dir_fd=directory)
            if stat.S_ISLNK(found.st_mode):
                present = os.readlink(name, dir_fd=directory)
            elif stat.S_ISREG(found.st_mode) and not found.st_size:
                present = ""
            else:
                raise FileExistsError(errno.EEXIST, "the image has a file of that name") from None
            if present != says:
                os.unlink(name, dir_fd=directory)
                os.symlink(says, name, dir_fd=directory)
    finally:
        os.close(directory)
