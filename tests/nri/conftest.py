"""Fixtures of the plugin in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lab.peer import Peer
from lab.served import Served, inventory

from shim.nri.plugin import Connection


@pytest.fixture
def service(tmp_path: Any) -> Callable[..., Served]:
    return lambda text=None, **config: Served(str(tmp_path / "state"), inventory(text, **config))


@pytest.fixture
def peer(service: Callable[..., Served]) -> Callable[..., Peer]:
    """A connection that has been through its handshake with a runtime of some version."""

    def connected(
        version: str = "2.1.9",
        text: bytes | None = None,
        size: int = 0,
        name: str = "containerd",
        nri: str = "",
        **config: Any,
    ) -> Peer:
        made = Peer(Connection("chandler", "50", service(text, **config)), size)
        made.handshake(name, version, nri)
        return made

    return connected
