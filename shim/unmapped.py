"""Whether a file that shows the kernel's overflow uid is nobody's of our own user namespace.

Rootless podman lends a namespace 65,536 ids, so 65534 is one of them, and every file of the host's root shows that
number, too.  The kernel itself tells them apart: who holds CAP_FOWNER in a namespace may open with O_NOATIME what
belongs to an id of it, and nothing else.  Source: open(2), user_namespaces(7).
"""

from __future__ import annotations

import posix

from shim import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict

_FORMAT, _REGULAR, _DIRECTORY, _LINK = 0o170000, 0o100000, 0o040000, 0o120000
_OTHERS_WRITE = 0o022
_CAP_FOWNER = 1 << 3
_PROBE = posix.O_RDONLY | posix.O_NOATIME | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_NOCTTY | posix.O_CLOEXEC

_overflow: Dict[str, int] = {}  # the uid by our namespace's map; -1 where the kernel would not tell us


def owner(path: str, found: posix.stat_result) -> bool:
    """Whether `path`, whose lstat is `found`, certainly belongs to an id that our user namespace does not have.

    A link cannot be opened.  It is the work of those who may write to its directory, on which the caller's eye was
    before; in one where others may, as in /tmp, it is anybody's.
    """
    namespace = host.user_namespace()
    if namespace == host.INITIAL_NAMESPACE:
        return False
    if namespace not in _overflow:
        _overflow[namespace] = host.overflow_uid() if _effective_capabilities() & _CAP_FOWNER else -1
    if found.st_uid != _overflow[namespace]:
        return False
    kind = found.st_mode & _FORMAT
    try:
        if kind == _LINK:
            return not posix.lstat(path.rpartition("/")[0] or "/").st_mode & _OTHERS_WRITE
        if kind in (_REGULAR, _DIRECTORY):
            posix.close(posix.open(path, _PROBE))
    except PermissionError as error:
        return error.errno == 1  # EPERM; EACCES says nothing about the owner
    except OSError:
        pass
    return False


def _effective_capabilities() -> int:
    """Source: proc_pid_status(5)."""
    try:
        descriptor = posix.open("/proc/self/status", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            text = posix.read(descriptor, 65536)
        finally:
            posix.close(descriptor)
        return int(text.partition(b"CapEff:")[2].split(None, 1)[0], 16)
    except (OSError, ValueError, IndexError):
        return 0
