"""The host as the generators see it: reads files, links and device nodes, with limits and in sorted order.

A generator reaches the host only through a HostTree.  So in a test a directory with a few files (`prefix`) and a
function that answers for device nodes (`read_node`) make a host.  What cannot be read counts as missing, because /proc
and /sys differ between drivers, and a generator itself reports what it lacks.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Callable

from shim import pathtext
from shim.errors import ChandlerError, HostError
from shim.host import device_nodes, files

if TYPE_CHECKING:
    # path -> (type, major, minor, permission bits, group), or HostError
    ReadNode = Callable[[str], tuple[str, int, int, int, int]]

MAX_TEXT = 1 << 20  # bytes of a file in /proc or /sys, or of another text file
MAX_NAMES = 1 << 16  # entries of a directory


class HostTree:
    """The host below `prefix`.  Paths in arguments and results never contain the prefix.

    `elsewhere` has the real paths of top directories, such as /proc, that are not below the prefix.
    """

    def __init__(
        self, prefix: str = "", read_node: ReadNode = device_nodes.read_node, elsewhere: dict[str, str] | None = None
    ) -> None:
        self.prefix = prefix
        self._look = read_node
        self._elsewhere = elsewhere or {}

    def at(self, path: str) -> str:
        """The real path of a path of the host."""
        top = "/" + path[1:].partition("/")[0]
        return self._elsewhere[top] + path[len(top) :] if top in self._elsewhere else self.prefix + path

    def data(self, path: str, limit: int = MAX_TEXT) -> bytes:
        """The bytes of a regular file; none when it cannot be read or has more than `limit` bytes."""
        try:
            descriptor = os.open(self.at(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError):
            return b""
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return b""
            # not by their size: files in /proc and /sys have no size, or a wrong one
            return files.read_all(descriptor, 65536, limit, path)
        except (OSError, ChandlerError):
            return b""
        finally:
            os.close(descriptor)

    def text(self, path: str, limit: int = MAX_TEXT) -> str:
        """The text of a file, without surrounding blanks; "" when it cannot be read."""
        return self.data(path, limit).decode("utf-8", "replace").strip()

    def names(self, path: str) -> list[str]:
        """The sorted names in a directory; none when it cannot be listed.  Raises HostError for more than MAX_NAMES."""
        names: list[str] = []
        try:
            with os.scandir(self.at(path)) as entries:
                for entry in entries:
                    names.append(entry.name)
                    if len(names) > MAX_NAMES:
                        raise HostError(f"{path} holds more than {MAX_NAMES} entries")
        except OSError:
            return []
        return sorted(names)

    def link(self, path: str) -> str:
        """The target of a symbolic link; "" where there is none."""
        try:
            return os.readlink(self.at(path))
        except (OSError, ValueError):
            return ""

    def real(self, path: str, root: str = "") -> str:
        """`path` inside `root`, with every link followed as by a process whose root directory is `root`.

        Returns "" when the path leads to nothing.
        """
        root = root.rstrip("/")
        resolved = pathtext.follow(path, lambda directory, name: self.link(f"{root}{directory}/{name}"))
        return resolved if resolved and self.kind(root + resolved) else ""

    def kind(self, path: str) -> str:
        """`file`, `directory`, `socket`, `link` or `other`, without following links; "" where there is nothing."""
        try:
            mode = os.lstat(self.at(path)).st_mode
        except (OSError, ValueError):
            return ""
        return _KINDS.get(stat.S_IFMT(mode), "other")

    def node(self, path: str) -> tuple[str, int, int, int, int] | None:
        """(type, major, minor, permission bits, group) of a device node; None where there is none."""
        try:
            return self._look(self.at(path))
        except HostError:
            return None


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket", stat.S_IFLNK: "link"}
