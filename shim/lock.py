"""A lock among processes: compiling takes it, the create path does without."""

from __future__ import annotations

import fcntl
import os


class Lock:
    """An advisory lock on a file, for as long as the `with` block lasts (flock(2)); raises OSError."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = -1

    def __enter__(self) -> Lock:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.descriptor = os.open(self.path, flags, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
