"""What tests share: parts of a host, real runtimes and engines, and fakes where nothing real is available."""

from __future__ import annotations

import os
from typing import Any

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def partial(value: Any) -> Any:
    """A value without all keys that its type demands: what a test does not read, it does not give."""
    return value
