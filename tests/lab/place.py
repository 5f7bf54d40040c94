"""A directory for some tests, and the end of what runs in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from lab import cgroups


@contextlib.contextmanager
def within(lab: str) -> Iterator[str]:
    """A new directory in `lab` that everybody can enter; containers whose root file system lies there are ended with it."""
    directory = tempfile.mkdtemp(dir=lab)
    os.chmod(directory, 0o755)
    try:
        yield directory
    finally:
        cgroups.end(directory)
        shutil.rmtree(directory, ignore_errors=True)
