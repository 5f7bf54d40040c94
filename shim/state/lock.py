"""A lock between processes (flock(2)).  Part of the create path where there are leases."""

from __future__ import annotations

import fcntl
import posix


class Lock:
    """An advisory lock on a file, held for the `with` block.  Entering waits for it, and raises OSError.

    `shared`: processes that take it shared hold it at the same time.
    """

    def __init__(self, path: str, shared: bool = False) -> None:
        self.path = path
        self.descriptor = -1
        self.shared = shared

    def __enter__(self) -> Lock:
        flags = posix.O_RDWR | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW
        self.descriptor = posix.open(self.path, flags, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        posix.close(self.descriptor)
