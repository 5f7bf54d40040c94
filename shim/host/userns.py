"""The user namespace that Chandler runs in: its ids, and whose files Chandler may trust there.

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

# The overflow uid by uid map; -1 without CAP_FOWNER, since the test in `has_outside_owner` works only with it.
_overflow: Dict[str, int] = {}


def user_namespace() -> str:
    """The uid map of our user namespace, words separated by single blanks; INITIAL_NAMESPACE in the initial one.

    Source: user_namespaces(7).
    """
    try:
        descriptor = posix.open("/proc/self/uid_map", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return " ".join(posix.read(descriptor, 65536).decode().split())
        finally:
            posix.close(descriptor)
    except OSError:
        return INITIAL_NAMESPACE  # without /proc assume the initial namespace, in which only root is trusted


def trusted_owners(uid_map: str) -> Dict[int, str]:
    """The uids whose files may decide what Chandler does, with their names for a message.

    In the initial user namespace: root, and the caller.  In another namespace: its root, the caller, and the overflow
    uid, which files of the host's root show there.  If the uid map gives the overflow uid to somebody, it is left out,
    and trust.check_trust tests each file with `has_outside_owner`.
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
    """The uid that an id of the user namespace has in its parent namespace; the id itself if it is not mapped."""
    numbers = [int(word) for word in uid_map.split()]
    for inside, outside, count in zip(numbers[0::3], numbers[1::3], numbers[2::3]):
        if inside <= uid < inside + count:
            return outside + uid - inside
    return uid


def overflow_uid() -> int:
    """The uid that files show whose owner has no id in our user namespace.  Source: proc_sys_kernel(5)."""
    try:
        descriptor = posix.open("/proc/sys/kernel/overflowuid", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            return int(posix.read(descriptor, 64))
        finally:
            posix.close(descriptor)
    except (OSError, ValueError):
        return 65534


def has_outside_owner(path: str, status: posix.stat_result) -> bool:
    """Whether `path`, whose lstat is `status`, certainly belongs to an id that our user namespace does not have.

    The test: O_NOATIME is allowed to the file's owner, and with CAP_FOWNER for every owner that our namespace has an id
    for.  So EPERM means that it has none (open(2), user_namespaces(7)).
    A link cannot be opened.  It counts as the work of those who may write to its directory, which the caller has
    checked before.  In a directory that others may write to, such as /tmp, anybody may have made it.
    """
    namespace = user_namespace()
    if namespace == INITIAL_NAMESPACE:
        return False
    if namespace not in _overflow:
        _overflow[namespace] = overflow_uid() if _effective_capabilities() & _CAP_FOWNER else -1
    if status.st_uid != _overflow[namespace]:
        return False
    kind = status.st_mode & _FORMAT
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
    """The effective capabilities of this process as a bit set, 0 when unknown.  Source: proc_pid_status(5)."""
    try:
        descriptor = posix.open("/proc/self/status", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            text = posix.read(descriptor, 65536)
        finally:
            posix.close(descriptor)
        return int(text.partition(b"CapEff:")[2].split(None, 1)[0], 16)
    except (OSError, ValueError, IndexError):
        return 0
