"""A lock between processes (flock(2)).  Part of the create path where there are leases."""

from __future__ import annotations

import fcntl
import posix

from shim.host import trust


class Lock:
    """An advisory lock on a file, held for the `with` block.  Entering waits for it.

    Entering raises OSError, and TrustError for a file that others may write, since they could hold the lock for ever.

    `shared`: processes that take it shared hold it at the same time.
    """

    def __init__(self, path: str, shared: bool = False) -> None:
        self.path = path
        self.descriptor = -1
        self.shared = shared

    def __enter__(self) -> Lock:
        flags = posix.O_RDWR | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW
        self.descriptor = posix.open(self.path, flags, 0o600)
        try:
            trust.check_own_file(self.path, posix.fstat(self.descriptor))
        except BaseException:
            posix.close(self.descriptor)
            raise
        fcntl.flock(self.descriptor, fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        posix.close(self.descriptor)
