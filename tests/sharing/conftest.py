"""Fixtures of the sharing tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from lab.sharing_host import Host


@pytest.fixture
def host(needs_root: None) -> Iterator[Host]:
    directory = tempfile.mkdtemp(
        prefix="mps-", dir="/var/lib"
    )  # short: the path of a socket; root's own all the way up
    os.chmod(directory, 0o755)
    made = Host(directory)
    yield made
    made.commands.end()
    shutil.rmtree(directory)
