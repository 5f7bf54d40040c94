"""The host as the generators see it: bounded, sorted looks at files, links and device nodes.

A Tree is the only way in which a generator reaches the host, so a directory with a few files (`prefix`) and a function
that answers for device nodes (`look`) make a host in a test.  What cannot be read is the same as what is not there:
/proc and /sys differ between drivers, and a generator says what it misses.
"""

from __future__ import annotations

import os
import stat

from shim import pathtext
from shim.errors import ChandlerError, HostError
from shim.host import device_nodes, files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Tuple

    # path -> (type, major, minor, permission bits, group), or HostError
    Look = Callable[[str], Tuple[str, int, int, int, int]]

MAX_TEXT = 1 << 20  # bytes of a file in /proc or /sys, or of a list of files
MAX_CACHE = 32 << 20  # bytes of a dynamic loader's cache
MAX_NAMES = 1 << 16  # entries of a directory


class HostTree:
    """The host below `prefix`; paths that go in and out never contain the prefix.  `elsewhere` says of top directories
    such as /proc where they really are."""

    def __init__(
        self, prefix: str = "", look: Look = device_nodes.look, elsewhere: Optional[Dict[str, str]] = None
    ) -> None:
        self.prefix = prefix
        self._look = look
        self._elsewhere = elsewhere or {}

    def at(self, path: str) -> str:
        """Where a path of the host really is."""
        top = "/" + path[1:].partition("/")[0]
        return self._elsewhere[top] + path[len(top) :] if top in self._elsewhere else self.prefix + path

    def data(self, path: str, limit: int = MAX_TEXT) -> bytes:
        """The bytes of a regular file of at most `limit`; none when it cannot be read."""
        try:
            descriptor = os.open(self.at(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError):
            return b""
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return b""
            return files.read_all(descriptor, 65536, limit, path)  # /proc and /sys tell no size, or a wrong one
        except (OSError, ChandlerError):
            return b""
        finally:
            os.close(descriptor)

    def text(self, path: str, limit: int = MAX_TEXT) -> str:
        """The text of a file, without blanks around it; nothing when it cannot be read."""
        return self.data(path, limit).decode("utf-8", "replace").strip()

    def names(self, path: str) -> List[str]:
        """The names in a directory, sorted; none when it cannot be listed.  HostError for more than MAX_NAMES."""
        found: List[str] = []
        try:
            with os.scandir(self.at(path)) as entries:
                for entry in entries:
                    found.append(entry.name)
                    if len(found) > MAX_NAMES:
                        raise HostError(f"{path} holds more than {MAX_NAMES} entries")
        except OSError:
            return []
        return sorted(found)

    def link(self, path: str) -> str:
        """What a symbolic link says; nothing where there is none."""
        try:
            return os.readlink(self.at(path))
        except (OSError, ValueError):
            return ""

    def real(self, path: str, root: str = "") -> str:
        """`path` inside `root` with every link followed as a process would whose root directory that is.

        Nothing when it does not end at something that is there.
        """
        root = root.rstrip("/")
        found = pathtext.follow(path, lambda directory, name: self.link(f"{root}{directory}/{name}"))
        return found if found and self.kind(root + found) else ""

    def kind(self, path: str) -> str:
        """`file`, `directory`, `socket`, `link` or `other`, links not followed; nothing where there is nothing."""
        try:
            mode = os.lstat(self.at(path)).st_mode
        except (OSError, ValueError):
            return ""
        return _KINDS.get(stat.S_IFMT(mode), "other")

    def node(self, path: str) -> Optional[Tuple[str, int, int, int, int]]:
        """(type, major, minor, permission bits, group) of a device node; None where there is none."""
        try:
            return self._look(self.at(path))
        except HostError:
            return None


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket", stat.S_IFLNK: "link"}
