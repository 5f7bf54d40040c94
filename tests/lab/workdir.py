"""A directory for some tests, and the end of the containers that run in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from lab import cgroups


@contextlib.contextmanager
def within(lab: str) -> Iterator[str]:
    """A new directory in `lab` that everybody can enter.

    On exit, containers whose root file system is in it are ended.
    """
    directory = tempfile.mkdtemp(dir=lab)
    os.chmod(directory, 0o755)
    try:
        yield directory
    finally:
        cgroups.end(directory)
        shutil.rmtree(directory, ignore_errors=True)
