"""Files of the host: reads with a size limit that do not block, atomic replacement, and checksums.

Part of the create path: no module but posix.
"""

from __future__ import annotations

import posix

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Tuple

MAX_CONFIG_JSON = 16 << 20  # bytes

_FORMAT, _REGULAR = 0o170000, 0o100000
# O_NONBLOCK: to open a FIFO would otherwise wait for a writer.
_READ = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY


def read(path: str, limit: int, follow: bool = False) -> Tuple[bytes, posix.stat_result]:
    """The bytes of a regular file of at most `limit` bytes, and its fstat.

    `follow`: whether `path` may be a symbolic link.  Raises OSError, or HostError when it is not a regular file or is
    larger than `limit`.
    """
    descriptor = posix.open(path, _READ if follow else _READ | posix.O_NOFOLLOW)
    try:
        status = posix.fstat(descriptor)
        if status.st_mode & _FORMAT != _REGULAR:
            raise errors.HostError(f"{path} is not a regular file")
        if status.st_size > limit:
            raise errors.HostError(f"{path} has {status.st_size} bytes, more than the limit of {limit}")
        return read_all(descriptor, status.st_size, limit, path), status
    finally:
        posix.close(descriptor)


def cannot_read_now(error: OSError) -> bool:
    """Whether a read failed because memory or descriptors were short, which says nothing about the file."""
    return error.errno in (12, 23, 24)  # ENOMEM, ENFILE, EMFILE


def read_all(descriptor: int, size: int, limit: int, path: str) -> bytes:
    """All bytes of an open file.  Raises OSError, or HostError when there are more than `limit`.

    `size`: the expected number of bytes; a file that has grown since, or a file in /proc, may have more.
    """
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
    """Writes all of `data` to a descriptor.  Raises OSError."""
    while data:
        data = data[posix.write(descriptor, data) :]


def replace(
    path: str, data: bytes, mode: int = 0o644, owner: Optional[Tuple[int, int]] = None, temporary: str = ""
) -> None:
    """Writes `data` to a temporary file and renames it to `path`, so that a reader sees the old bytes or the new ones.

    `owner`: (uid, gid), None for the caller's.  `temporary`: a fixed path for the temporary file, for a caller that
    holds a lock: a file that a killed process left is then replaced by the next write.
    Raises OSError, and then removes the temporary file.
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
    """Makes the directory `path`, and its parents with mode 0755.  Does nothing if `path` exists.  Raises OSError."""
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
_SEALED = len(_SEAL) + 64 + 2  # the checksum has 64 characters; a quote and a comma follow it


def seal(text: bytes) -> bytes:
    """The text of a JSON object with a checksum of its other members added as the first, and a newline at the end.

    `text`: a JSON object with at least one member.
    """
    rest = text[1:]
    return _SEAL + digest(rest).encode("ascii") + b'",' + rest + b"\n"


def unseal(data: bytes) -> Optional[bytes]:
    """The text that `seal` was given; None when there is no checksum.  Raises HostError when the checksum is wrong."""
    if data[: len(_SEAL)] != _SEAL:
        return None
    rest = data[_SEALED:-1]
    if data[len(_SEAL) : _SEALED] != digest(rest).encode("ascii") + b'",' or data[-1:] != b"\n":
        raise errors.HostError("its checksum is wrong")
    return b"{" + rest


def exists(path: str) -> bool:
    """Whether `path` exists; symbolic links are followed."""
    try:
        return posix.access(path, posix.F_OK)
    except ValueError:  # the path has a NUL character
        return False
