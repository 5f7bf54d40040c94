"""Fixtures of the engines' tests.  Each module defines its own `scene`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def strict(scene: Any) -> Iterator[None]:
    """A policy that allows `env` to one namespace only."""
    scene.configure(
        '[policy]\nallow = ["gpu"]\n[[policy.rule]]\nname = "prod"\nmatch = {namespace = ["prod"]}\n'
        'allow = ["gpu", "env"]\n'
    )
    yield
    scene.configure()
