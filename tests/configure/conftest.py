"""The machine on which the tests of this directory run `chandler configure`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from configure import world as worlds


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., worlds.World]:
    """Makes a machine with an engine on it."""
    tmp_path.chmod(0o755)
    worlds.use_root(tmp_path, monkeypatch)
    return lambda engine, version="1.7.24": worlds.World(tmp_path, engine, version)
