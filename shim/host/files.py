"""Files of the host: bounded reads that do not block, and atomic replacement.

Part of the create path: posix alone.
"""

from __future__ import annotations

import posix

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Tuple

MAX_CONFIG_JSON = 16 << 20

_FORMAT, _REGULAR = 0o170000, 0o100000
# O_NONBLOCK: a FIFO in the way must not hold us up
_READ = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY


def read(path: str, limit: int, follow: bool = False) -> Tuple[bytes, posix.stat_result]:
    """The bytes of a regular file of at most `limit` bytes, and its fstat.

    Raises OSError, or HostError when it is no regular file or larger.
    """
    descriptor = posix.open(path, _READ if follow else _READ | posix.O_NOFOLLOW)
    try:
        found = posix.fstat(descriptor)
        if found.st_mode & _FORMAT != _REGULAR:
            raise errors.HostError(f"{path} is not a regular file")
        if found.st_size > limit:
            raise errors.HostError(f"{path} has {found.st_size} bytes, more than the limit of {limit}")
        return read_all(descriptor, found.st_size, limit, path), found
    finally:
        posix.close(descriptor)


def read_all(descriptor: int, size: int, limit: int, path: str) -> bytes:
    """All bytes behind a descriptor; `size` is what fstat said, which may grow meanwhile up to `limit`."""
    data = posix.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    total = len(data)
    while data:
        data = posix.read(descriptor, 1 << 20)
        parts.append(data)
        total += len(data)
        if total > limit:
            raise errors.HostError(f"{path} has more than the limit of {limit} bytes")
    return b"".join(parts)


def write_all(descriptor: int, data: bytes) -> None:
    """All of `data` to a descriptor; raises OSError."""
    while data:
        data = data[posix.write(descriptor, data) :]


def replace(
    path: str, data: bytes, mode: int = 0o644, owner: Optional[Tuple[int, int]] = None, temporary: str = ""
) -> None:
    """`data` at `path`, by a temporary file beside it and a rename: a reader sees the old bytes or the new.

    `owner` is (uid, gid).  Nothing stays behind on failure; raises OSError.  Where only one process writes, a fixed
    name for the temporary file lets the next one clear up after a kill.
    """
    temporary = temporary or f"{path}.chandler-{posix.getpid()}"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
    try:
        descriptor = posix.open(temporary, flags, 0o600)
    except FileExistsError:  # left by a killed process
        posix.unlink(temporary)
        descriptor = posix.open(temporary, flags, 0o600)
    try:
        try:
            write_all(descriptor, data)
            if owner is not None and owner != (posix.geteuid(), posix.getegid()):
                posix.fchown(descriptor, owner[0], owner[1])
            posix.fchmod(descriptor, mode)
        finally:
            posix.close(descriptor)
        posix.rename(temporary, path)
    except BaseException:
        posix.unlink(temporary)
        raise


def make_directory(path: str, mode: int = 0o755) -> None:
    """`path` as a directory with its parents; raises OSError.  One that is there stays as it is."""
    try:
        posix.mkdir(path, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = path.rstrip("/").rpartition("/")[0]
        if not parent:
            raise
        make_directory(parent)
        posix.mkdir(path, mode)


def digest(data: bytes) -> str:
    """BLAKE2b-256 of some bytes, as `b2sum -l 256` prints it (a third of SHA-256's cost without OpenSSL)."""
    from _blake2 import blake2b

    return blake2b(data, digest_size=32).hexdigest()


_SEAL = b'{"checksum":"'
_SEALED = len(_SEAL) + 64 + 2  # with the quote and the comma behind the checksum


def seal(text: bytes) -> bytes:
    """A file's bytes: the text of a JSON object that has members, with the checksum of the rest as its first member."""
    rest = text[1:]
    return _SEAL + digest(rest).encode("ascii") + b'",' + rest + b"\n"


def unseal(data: bytes) -> Optional[bytes]:
    """The text that `seal` was given; None for bytes that were never sealed.  Raises HostError when the checksum is
    wrong."""
    if data[: len(_SEAL)] != _SEAL:
        return None
    rest = data[_SEALED:-1]
    if data[len(_SEAL) : _SEALED] != digest(rest).encode("ascii") + b'",' or data[-1:] != b"\n":
        raise errors.HostError("its checksum is wrong")
    return b"{" + rest


def exists(path: str) -> bool:
    """Whether there is something at `path`, links followed."""
    try:
        return posix.access(path, posix.F_OK)
    except ValueError:  # a NUL in it
        return False
