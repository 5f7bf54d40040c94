"""Our own user namespace: its ids, and whose files may decide what Chandler does there.

Part of the create path.  Source: user_namespaces(7).
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict

INITIAL_NAMESPACE = "0 0 4294967295"
_FORMAT, _REGULAR, _DIRECTORY, _LINK = 0o170000, 0o100000, 0o040000, 0o120000
_OTHERS_WRITE = 0o022
_CAP_FOWNER = 1 << 3
_PROBE = posix.O_RDONLY | posix.O_NOATIME | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_NOCTTY | posix.O_CLOEXEC

_overflow: Dict[str, int] = {}  # the uid by our namespace's map; -1 where the kernel would not tell us


def user_namespace() -> str:
    """The uid map of our user namespace with single blanks; `0 0 4294967295` is the initial one.

    Source: user_namespaces(7).
    """
    try:
        descriptor = posix.open("/proc/self/uid_map", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return " ".join(posix.read(descriptor, 65536).decode().split())
        finally:
            posix.close(descriptor)
    except OSError:
        return "0 0 4294967295"  # no /proc: an initial namespace is the careful guess, it trusts root alone


def trusted_owners(uid_map: str) -> Dict[int, str]:
    """The uids whose files may decide what we do, with their names for a message.

    In the initial user namespace root, and the caller when that is somebody else.  In another namespace its
    root, and the kernel's overflow uid, as which the host's root shows there, unless the map gives that number
    to somebody: then files.check_trust has to look at each file.
    """
    euid = posix.geteuid()
    owners: Dict[int, str] = {0: "root"}
    if euid:
        owners[euid] = "the caller"
    if uid_map != INITIAL_NAMESPACE:
        overflow = overflow_uid()
        numbers = [int(word) for word in uid_map.split()]
        inside = zip(numbers[0::3], numbers[2::3])
        if not any(first <= overflow < first + count for first, count in inside):
            owners[overflow] = "the host's root"
    return owners


def outer_uid(uid: int, uid_map: str) -> int:
    """The number that an id of a user namespace has outside of it."""
    numbers = [int(word) for word in uid_map.split()]
    for inside, outside, count in zip(numbers[0::3], numbers[1::3], numbers[2::3]):
        if inside <= uid < inside + count:
            return outside + uid - inside
    return uid


def overflow_uid() -> int:
    """The number that files of owners without an id in our user namespace show.  Source: proc_sys_kernel(5)."""
    try:
        descriptor = posix.open("/proc/sys/kernel/overflowuid", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return int(posix.read(descriptor, 64))
        finally:
            posix.close(descriptor)
    except (OSError, ValueError):
        return 65534


def owner(path: str, found: posix.stat_result) -> bool:
    """Whether `path`, whose lstat is `found`, certainly belongs to an id that our user namespace does not have.

    A link cannot be opened.  It is the work of those who may write to its directory, on which the caller's eye was
    before; in one where others may, as in /tmp, it is anybody's.
    """
    namespace = user_namespace()
    if namespace == INITIAL_NAMESPACE:
        return False
    if namespace not in _overflow:
        _overflow[namespace] = overflow_uid() if _effective_capabilities() & _CAP_FOWNER else -1
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
